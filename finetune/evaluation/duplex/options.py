"""Options of `evaluate.py duplex`."""

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.annotation.recognise import RECOGNISERS
from finetune.errors import ConfigError
from finetune.evaluation.bootstrap import RatioBootstrap
from finetune.evaluation.duplex.figures import TASKS
from finetune.evaluation.duplex.outputs import SPEECH_SOURCES, SpeechSettings
from finetune.evaluation.options import add_bootstrap, add_max_failures
from finetune.inference.options import (
    add_model_options,
    add_sampling_options,
    choose_checkpoint,
    conditions_from_options,
    positive_integer,
    sampling_from_options,
    whole_number,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the model, the data, how speech is found, and the scores."""
    model = add_model_options(parser)
    model.add_argument(
        "--outputs",
        metavar="DIR",
        help="instead of --checkpoint: output.wav (and output.json) by set and sample; may be --data",
    )
    add_sampling_options(parser)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder of a set of Full-Duplex-Bench (a folder per sample), or of several sets",
    )
    group.add_argument(
        "--task", choices=TASKS, help="of the sets, where their names do not say it (by their names)"
    )
    group.add_argument(
        "--distribution",
        metavar="FILE",
        help="when people give backchannels, by sample (icc_gt_distribution.json in a set or in --data)",
    )
    group.add_argument(
        "--limit", type=positive_integer, metavar="N", help="the first N samples of each set (all)"
    )
    _add_measurement_options(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the results; one that holds an unfinished measurement is gone on with "
        "(evaluation/duplex/… in the run directory)",
    )


def check(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other.

    Raises:
        ConfigError: names them.
    """
    for name in ("data", "outputs"):
        if getattr(options, name) == "":  # as a path it would be the current directory
            raise ConfigError(f"--{name}: is empty; give a folder.")
    if options.outputs is None:
        choose_checkpoint(options)
    elif options.checkpoint is not None or options.base is not None:
        raise ConfigError("--outputs: are scored as they are; leave out --checkpoint and --base.")
    elif not Path(options.outputs).expanduser().is_dir():
        raise ConfigError(f"--outputs: {options.outputs} is not a folder.")


def speech_settings(options: argparse.Namespace) -> SpeechSettings:
    """How the model's speech is found."""
    return SpeechSettings(options.speech, options.threshold_db, options.hangover_frames)


def bootstrap_of(options: argparse.Namespace) -> RatioBootstrap:
    """With fresh draws."""
    return RatioBootstrap(options.resamples, seed=options.seed)


def talk_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the model's answers depend on beside the model and the recordings."""
    sampling = asdict(sampling_from_options(options))
    return {"ttt": options.ttt, "seed": options.seed, **sampling} | (
        {"conditions": conditions_from_options(options)} if options.condition else {}
    )


def _add_measurement_options(parser: argparse.ArgumentParser) -> None:
    defaults = SpeechSettings()
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--speech",
        choices=SPEECH_SOURCES,
        default=defaults.source,
        help="how the model's speech is found: energy, of output.wav; words, the times in output.json, which "
        "are those of the model's text stream, or of a recogniser (%(default)s)",
    )
    group.add_argument(
        "--threshold-db",
        type=_decibels,
        default=defaults.threshold_db,
        metavar="DB",
        help="frames of 80 ms above this RMS are speech, with --speech energy (%(default)g)",
    )
    group.add_argument(
        "--hangover-frames",
        type=_frames,
        default=defaults.hangover_frames,
        metavar="N",
        help="silence of up to N frames of 80 ms is part of the speech (%(default)s)",
    )
    group.add_argument(
        "--wer",
        choices=RECOGNISERS,
        help="also the word error rate of this recogniser against the model's text stream",
    )
    group.add_argument(
        "--whisper-model", default="medium", metavar="NAME", help="of --wer whisper (%(default)s)"
    )
    add_max_failures(group, units="samples")
    add_bootstrap(group, units="samples", seeds="what the model draws in each sample, and of the resamples")


def _frames(text: str) -> int:
    return whole_number(text, lowest=0, highest=10**4)


def _decibels(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -120 <= value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed, must be from -120 to below 0 dB")
    return value
