"""The work of `evaluate.py transcription`: word error rates by position."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.errors import CheckpointError, DataError
from finetune.evaluation.bootstrap import RatioBootstrap
from finetune.evaluation.identity import home_of, model_identity, weights_key
from finetune.evaluation.long_context.arms import choose_arms
from finetune.evaluation.options import add_bootstrap, add_max_failures
from finetune.evaluation.out_folder import (
    check_default,
    check_out,
    check_settings,
    make_folder_of,
    unwritable,
    write_results,
)
from finetune.evaluation.sources import find_sources
from finetune.evaluation.text_table import aligned
from finetune.evaluation.transcription.measure import (
    Transcript,
    compare,
    error_rates,
    reference_words,
    transcribing,
    written_words,
)
from finetune.evaluation.word_errors import import_jiwer
from finetune.files import hash_json
from finetune.inference.options import (
    add_model_options,
    choose_checkpoint,
    load_from_options,
    positive_integer,
)
from finetune.inference.terminal import say
from finetune.ttt_integration import attention_windows

__all__ = ["HELP", "add_options", "run"]

HELP = "word error rates of a speech-to-text model, by position in the recording"
TRANSCRIPTS_DIR = "transcripts"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the model, the data and the rates."""
    add_model_options(parser)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", required=True, metavar="PATH", help="manifest, folder or audio file, words beside each"
    )
    group.add_argument("--limit", type=positive_integer, metavar="N", help="the first N recordings (all)")
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--compare", action="store_true", help="the memory learning, frozen and left out, not --ttt alone"
    )
    group.add_argument(
        "--bin-frames",
        type=positive_integer,
        metavar="N",
        help="positions in bins of N frames of 80 ms (the shortest attention window)",
    )
    add_bootstrap(group, units="recordings", seeds="the resamples")
    add_max_failures(group, units="recordings")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the results; one that holds an unfinished measurement is gone on with "
        "(evaluation/transcription/… in the run directory)",
    )


def run(options: argparse.Namespace) -> None:
    """Measure, write and print.

    Raises:
        UserError: an option, a file or the checkpoint cannot be used, or too many recordings failed.
    """
    choose_checkpoint(options)
    check_out(options.out)
    import_jiwer()
    sources = find_sources(options.data)[: options.limit]
    speech = load_from_options(options, must_speak=False)
    if speech.lm.dep_q:
        raise CheckpointError(
            f"{speech.checkpoint.folder}: this model speaks (dep_q: {speech.lm.dep_q}) and does not write "
            "down what it hears; transcription is measured of a speech-to-text model (dep_q: 0)."
        )
    say(f"model: {speech.source}")
    arms = choose_arms(speech.lm, compare=options.compare, source=str(speech.checkpoint.folder))
    model = model_identity(speech, fuse_lora=not options.no_fuse_lora)
    settings = {**weights_key(model), "data": str(Path(options.data).expanduser().absolute())}
    folder = _folder(options, settings, home_of(speech.checkpoint, given=options.checkpoint), model["step"])
    bin_frames = options.bin_frames or min(filter(None, attention_windows(speech.lm)))
    measured: dict[str, list[Transcript]] = {arm: [] for arm in arms}
    failures: dict[str, str] = {}
    with transcribing(speech) as write, tqdm(total=len(sources) * len(arms), unit="recording") as bar:
        for number, source in enumerate(sources):
            try:
                reference = reference_words(source, speech.checkpoint.text)
                found = {}
                for arm in arms:
                    kept = folder / TRANSCRIPTS_DIR / arm / f"{number:05d}.json"
                    found[arm] = compare(
                        source.name, reference, written_words(source, arm, speech, write, kept)
                    )
                    bar.update()
            except DataError as error:
                failures[source.name] = str(error)
                continue
            except OSError as error:
                raise unwritable(folder, error) from None
            for arm, transcript in found.items():
                measured[arm].append(transcript)
    _report(options, folder, model, measured, failures, bin_frames)


def _folder(options: argparse.Namespace, settings: Mapping[str, Any], home: Path, step: int) -> Path:
    name = f"step_{step:06d}-{hash_json(dict(settings))[:8]}"
    folder = home / "evaluation" / "transcription" / name if options.out is None else Path(options.out)
    check_settings(folder, settings)
    check_default(folder)
    make_folder_of(
        folder, settings, *(f"{TRANSCRIPTS_DIR}/{arm}" for arm in ("on", "frozen", "off", "plain"))
    )
    say(f"results: {folder}")
    return folder


def _report(
    options: argparse.Namespace,
    folder: Path,
    model: Mapping[str, Any],
    measured: Mapping[str, list[Transcript]],
    failures: Mapping[str, str],
    bin_frames: int,
) -> None:
    for reason in failures.values():
        say(f"failed: {reason}")
    bootstrap = RatioBootstrap(options.resamples, seed=options.seed)
    rates = {
        arm: error_rates(transcripts, bin_frames=bin_frames, bootstrap=bootstrap)
        for arm, transcripts in measured.items()
        if transcripts
    }
    results = {
        "model": model,
        "settings": {
            "data": options.data,
            "bin_frames": bin_frames,
            "resamples": options.resamples,
            "seed": options.seed,
            "recordings": [transcript.name for transcript in next(iter(measured.values()))],
        },
        "arms": rates,
        "failures": dict(failures),
    }
    write_results(folder, results)
    for line in _table(rates):
        say(line)
    if len(failures) > options.max_failures:
        first = next(iter(failures.values())).rstrip(".")
        raise DataError(
            f"--max-failures: {len(failures)} recordings failed, {options.max_failures} may; {first}. The "
            f"others are in {folder}."
        )


def _table(rates: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each bin: the words there and each arm's error rate."""
    if not rates:
        return []
    parts = [[found["all"], *found["bins"]] for found in rates.values()]
    names = ["all", *(f"from {each['start_frame']:,}" for each in parts[0][1:])]
    lines = [["frames", "words", *rates]]
    for name, row in zip(names, zip(*parts, strict=True), strict=True):
        lines.append([name, f"{row[0]['words']:,}", *map(_cell, row)])
    return aligned(lines)


def _cell(rate: Mapping[str, Any]) -> str:
    return "-" if rate["wer"] is None else f"{100 * rate['wer']:.1f} %"
