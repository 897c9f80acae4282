"""Options of `evaluate.py swuggy`, `sblimp`, `tstory`, `sstory` and `all`."""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple, get_args

from finetune.checkpoint.description import CheckpointDescription
from finetune.checkpoint.layout import FIRST_CODEBOOK_KEY, TRAINING_FILE, step_of
from finetune.config_io import ARGS_FILE, read_yaml
from finetune.errors import ConfigError
from finetune.evaluation.bootstrap import RatioBootstrap
from finetune.evaluation.options import add_bootstrap, add_cache_dir, add_max_failures
from finetune.evaluation.spoken.encoding import TextMode, UserMode
from finetune.evaluation.spoken.items import Split
from finetune.inference.options import (
    add_model_options,
    choose_checkpoint,
    conditions_from_options,
    positive_integer,
)

BATCH_SIZE = 16
FRAMES_PER_BATCH = 4096
MOSHI_WEIGHT = 100.0  # what Moshi itself was trained with (arXiv 2410.00037)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the model, the data, the passes and the scores."""
    model = add_model_options(parser)
    model.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two checkpoints on the same items, instead of --checkpoint",
    )
    _add_data_options(parser)
    _add_score_options(parser)
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the results (evaluation/spoken/… in the run directory)"
    )


def check(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other.

    Raises:
        ConfigError: names them.
    """
    if options.compare is None and options.base is not None:
        choose_checkpoint(options)
    if (options.checkpoint is None) == (options.compare is None):
        raise ConfigError("--checkpoint: give a checkpoint, or two with --compare A B.")
    if options.prompt is not None and not Path(options.prompt).is_file():
        raise ConfigError(f"--prompt: {options.prompt} is not a file.")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that scores depend on beside the model and the data."""
    named = ("split", "user", "text", "ttt", "limit", "seed", "resamples", "batch_size", "batch_frames")
    prompt = None if options.prompt is None else str(Path(options.prompt).resolve())
    settings = {name: getattr(options, name) for name in named} | {"prompt": prompt}
    # Without, the folder of results of models that have none is the one that it always was.
    return settings | ({"conditions": conditions_from_options(options)} if options.condition else {})


def bootstrap_of(options: argparse.Namespace) -> RatioBootstrap:
    """With fresh draws."""
    return RatioBootstrap(options.resamples, seed=options.seed)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder with lexical/, syntactic/ (ZeroSpeech 2021), tstory/ and sstory/ (Spoken StoryCloze) "
        "or some of them; of one measurement also its own folder",
    )
    group.add_argument(
        "--split",
        choices=get_args(Split),
        default="dev",
        help="of sWUGGY and sBLIMP, and of stories with such folders (%(default)s)",
    )
    group.add_argument(
        "--user",
        choices=get_args(UserMode),
        default="empty",
        help="what the model hears: empty, no input; silent, digital silence (%(default)s)",
    )
    group.add_argument(
        "--text",
        choices=get_args(TextMode),
        default="none",
        help="none, no input; own, what the model finds most likely, frame by frame and slower (%(default)s)",
    )
    group.add_argument(
        "--prompt", metavar="FILE", help="recording in front of every item, which memory and attention hear"
    )
    group.add_argument(
        "--limit",
        type=positive_integer,
        metavar="N",
        help="N ids of each benchmark, with all their voices, drawn with --seed (all)",
    )
    add_cache_dir(group)


def _add_score_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--batch-size",
        type=positive_integer,
        default=BATCH_SIZE,
        metavar="N",
        help="items per forward pass; changes time and memory, scores by rounding: less than 1e-4 nats per "
        "code in float32, up to 1e-3 in bfloat16, the default on a GPU (%(default)s)",
    )
    group.add_argument(
        "--batch-frames",
        type=positive_integer,
        default=FRAMES_PER_BATCH,
        metavar="N",
        help="frames per forward pass at most, where items are long (%(default)s)",
    )
    group.add_argument(
        "--semantic-weight",
        type=_weight,
        metavar="W",
        help="of the semantic codebook, where an acoustic one has 1 (that of the checkpoint's training)",
    )
    add_max_failures(group, units="items")
    add_bootstrap(group, units="ids", seeds="the resamples and of --limit")


def _weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed, must be a number greater than 0")
    return value


class SemanticWeight(NamedTuple):
    """A weight, where an acoustic codebook has 1, and what says so."""

    value: float
    source: str


def semantic_weight(checkpoint: CheckpointDescription, *, given: float | None = None) -> SemanticWeight:
    """The weight for a checkpoint: what is given, else that of its training, else Moshi's own.

    Raises:
        ConfigError: the configuration of an older checkpoint's run cannot be read, or the value is no weight.
    """
    if given is not None:
        return SemanticWeight(given, "--semantic-weight")
    if checkpoint.first_codebook_weight is not None:
        return SemanticWeight(checkpoint.first_codebook_weight, TRAINING_FILE)
    folder = checkpoint.folder.resolve()
    run_args = folder.parent.parent.parent / ARGS_FILE  # run/checkpoints/checkpoint_000100/consolidated
    if step_of(folder.parent) is not None and run_args.is_file():
        value = read_yaml(run_args).get(FIRST_CODEBOOK_KEY)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1e9:
            raise ConfigError(
                f"{run_args}: {FIRST_CODEBOOK_KEY}: {value!r} is not a number greater than 0; "
                "give --semantic-weight."
            )
        return SemanticWeight(float(value), ARGS_FILE)
    return SemanticWeight(MOSHI_WEIGHT, "not recorded: that of Moshi's own training")
