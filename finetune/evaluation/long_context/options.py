"""Options of `evaluate.py long-context`."""

import argparse
from typing import get_args

from finetune.errors import ConfigError
from finetune.evaluation.long_context.results import ScoreSettings
from finetune.evaluation.long_context.streams import GroupMode, StreamOptions, TextMode, UserMode
from finetune.evaluation.options import add_bootstrap, add_cache_dir, add_max_failures
from finetune.inference.options import add_model_options, choose_checkpoint, positive_integer, whole_number

CHUNK_FRAMES = 256  # 20 s, whole mini-batches


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the model, the data, the pass and the scores."""
    add_model_options(parser)
    _add_data_options(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--compare",
        action="store_true",
        help="measure with the memory on, frozen and off, on the same frames, instead of --ttt",
    )
    group.add_argument(
        "--trajectories",
        action="store_true",
        help="record the inner losses of every frame as well, where the memory learns",
    )
    group.add_argument(
        "--chunk-frames",
        type=positive_integer,
        default=CHUNK_FRAMES,
        help="frames per forward pass; changes time and memory, not the losses (%(default)s)",
    )
    for kind, layers in (("ttt", "with TTT"), ("non-ttt", "without TTT")):
        group.add_argument(
            f"--{kind}-layer-context",
            type=positive_integer,
            metavar="FRAMES",
            help=f"attention window of layers {layers}, instead of the one they were trained with",
        )
    add_max_failures(group, units="recordings")
    _add_score_options(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the results; one that holds an unfinished measurement is gone on with "
        "(evaluation/long_context/… in the run directory)",
    )


def stream_options(options: argparse.Namespace) -> StreamOptions:
    """What the streams are made of.

    Raises:
        ConfigError: the options do not fit each other.
    """
    return StreamOptions(
        user=options.user,
        text=options.text,
        group=options.group,
        max_frames=options.max_frames,
        min_frames=options.min_frames,
        cache_dir=options.cache_dir,
    )


def score_settings(options: argparse.Namespace) -> ScoreSettings:
    """How losses become scores."""
    return ScoreSettings(options.at, options.half_width, options.bin_frames, options.resamples, options.seed)


def check(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other.

    Raises:
        ConfigError: names them.
    """
    choose_checkpoint(options)
    if options.compare and options.ttt != "on":
        raise ConfigError(f"--compare: measures every mode of the memory; leave out --ttt {options.ttt}.")
    if options.trajectories and options.ttt != "on":
        raise ConfigError(
            f"--trajectories: the memory does not learn with --ttt {options.ttt}; use --ttt on."
        )


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    defaults = StreamOptions()
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="folder of recordings, .jsonl manifest or audio file",
    )
    group.add_argument(
        "--user",
        choices=get_args(UserMode),
        default=defaults.user,
        help="what the model hears: empty, no input; silent, digital silence; real, the right channel of "
        "stereo files (%(default)s)",
    )
    group.add_argument(
        "--text",
        choices=get_args(TextMode),
        default=defaults.text,
        help="none, no input; given, the word timings beside each file; own, what the model finds most "
        "likely, frame by frame and slower (%(default)s)",
    )
    group.add_argument(
        "--group",
        choices=get_args(GroupMode),
        default=defaults.group,
        help="single: recording by recording; speaker: those of a speaker one after another (%(default)s)",
    )
    for name, effect in (("max", "longer recordings are cut"), ("min", "shorter ones are left out")):
        group.add_argument(f"--{name}-frames", type=_frames, metavar="N", help=effect)
    add_cache_dir(group)


def _add_score_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--at",
        type=_positions,
        default="2000,8000,16000,24000",
        metavar="FRAMES",
        help="centres of the windows (%(default)s)",
    )
    group.add_argument(
        "--half-width",
        type=positive_integer,
        default=500,
        metavar="FRAMES",
        help="of a window (%(default)s)",
    )
    group.add_argument(
        "--bin-frames",
        type=positive_integer,
        default=100,
        metavar="FRAMES",
        help="of a line in positions.csv (%(default)s)",
    )
    add_bootstrap(group, units="recordings", seeds="the resamples")


def _positions(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({_frames(part.strip()) for part in text.split(",")}))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; expected frames such as 2000,8000") from None


def _frames(text: str) -> int:
    return whole_number(text, lowest=1, highest=10**9)
