"""The work of `evaluate.py duplex`: how a model behaves in conversation, on Full-Duplex-Bench's samples."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finetune.annotation.recognise import Recogniser, make_recogniser
from finetune.errors import DataError
from finetune.evaluation.duplex.layout import SampleSet, find_sets
from finetune.evaluation.duplex.measure import make_outputs, measure_sets
from finetune.evaluation.duplex.options import (
    add_options,
    bootstrap_of,
    check,
    speech_settings,
    talk_settings,
)
from finetune.evaluation.duplex.results import result_lines, results_json
from finetune.evaluation.duplex.talk import talking
from finetune.evaluation.duplex.wer import WordErrorMeter
from finetune.evaluation.identity import home_of, model_identity, weights_key
from finetune.evaluation.out_folder import (
    check_default,
    check_out,
    check_settings,
    make_folder_of,
    write_results,
)
from finetune.evaluation.word_errors import import_jiwer
from finetune.files import hash_json
from finetune.inference.options import load_from_options, sampling_from_options
from finetune.inference.terminal import say

__all__ = ["HELP", "add_options", "run"]

HELP = "waiting in pauses, taking turns, interruptions and backchannels, on recordings of users"
OUTPUTS_DIR = "outputs"
TRANSCRIPTS_DIR = "transcripts"


def run(options: argparse.Namespace) -> None:
    """Measure, write and print.

    Raises:
        UserError: an option, a file or the checkpoint cannot be used, or too many samples failed.
    """
    check(options)
    check_out(options.out)
    sets = _find_sets(options)
    recogniser = _recogniser(options)
    if options.outputs is None:
        folder, root, model, failures = _talk(options, sets)
    else:
        root, model, failures = Path(options.outputs).expanduser(), None, {}
        folder = _folder_of_outputs(options)
    meter = None
    if recogniser is not None:
        name = options.wer if options.wer != "whisper" else f"whisper-{options.whisper_model}"
        meter = WordErrorMeter(recogniser, folder / TRANSCRIPTS_DIR / name.replace("/", "--"))
    measured = measure_sets(sets, root, speech_settings(options), failures=failures, meter=meter)
    results = results_json(
        sets, measured, bootstrap=bootstrap_of(options), model=model, settings=_settings(options)
    )
    write_results(folder, results)
    for line in result_lines(results):
        say(line)
    _check_failures(options, results, folder)


def _find_sets(options: argparse.Namespace) -> list[SampleSet]:
    distribution = None if options.distribution is None else Path(options.distribution).expanduser()
    sets, left_out = find_sets(Path(options.data).expanduser(), task=options.task, distribution=distribution)
    for name in left_out:
        say(f"{name}: left out, its name says no task")
    if options.limit is not None:
        sets = [replace(each, samples=each.samples[: options.limit]) for each in sets]
    for each in sets:
        say(f"{each.name}: {each.task}, {len(each.samples)} samples")
        if each.task == "backchannel" and not each.distributions:
            say(f"{each.name}: no distribution of people's backchannels, so no jsd; give --distribution")
    return sets


def _recogniser(options: argparse.Namespace) -> Recogniser | None:
    """What hears words, made before anything slow; None: nothing is asked for."""
    if options.wer is None:
        return None
    import_jiwer()
    device = "cpu" if options.device == "cpu" else None
    return make_recogniser(options.wer, whisper_model=options.whisper_model, device=device)


def _talk(
    options: argparse.Namespace, sets: Sequence[SampleSet]
) -> tuple[Path, Path, dict[str, Any], dict[str, str]]:
    """Let the model answer.

    Returns:
        The folders of the results and of the outputs, the model's identity, and failures by name.
    """
    speech = load_from_options(options)
    say(f"model: {speech.source}")
    model = model_identity(speech, fuse_lora=not options.no_fuse_lora)
    settings = {**weights_key(model), "data": _absolute(options.data), **talk_settings(options)}
    if options.out is not None:
        folder = Path(options.out)
    else:
        home = home_of(speech.checkpoint, given=options.checkpoint)
        name = f"step_{speech.checkpoint.step:06d}-{hash_json(settings)[:8]}"
        folder = home / "evaluation" / "duplex" / name
    _prepare(folder, settings)
    root = folder / OUTPUTS_DIR
    with talking(speech, sampling=sampling_from_options(options), seed=options.seed) as talker:
        num_kept, failures = make_outputs(talker, sets, root)
    if num_kept:
        say(f"{num_kept} answers were there already")
    return folder, root, model, failures


def _folder_of_outputs(options: argparse.Namespace) -> Path:
    """Where the scores of outputs go that were made before."""
    settings = {"data": _absolute(options.data), "outputs": _absolute(options.outputs)}
    name = f"{Path(settings['outputs']).name}-{hash_json(settings)[:8]}"
    folder = Path("evaluations") / "duplex" / name if options.out is None else Path(options.out)
    _prepare(folder, settings)
    return folder


def _prepare(folder: Path, settings: Mapping[str, Any]) -> None:
    check_settings(folder, settings)
    check_default(folder)
    make_folder_of(folder, settings)
    say(f"results: {folder}")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the figures depend on beside the model."""
    named = ("task", "distribution", "limit", "wer", "resamples", "seed", "max_failures")
    settings: dict[str, Any] = {
        "data": _absolute(options.data),
        "outputs": None if options.outputs is None else _absolute(options.outputs),
        "speech": asdict(speech_settings(options)),
        **{name: getattr(options, name) for name in named},
    }
    if options.wer == "whisper":
        settings["whisper_model"] = options.whisper_model
    return settings | ({} if options.outputs is not None else {"talk": talk_settings(options)})


def _check_failures(options: argparse.Namespace, results: Mapping[str, Any], folder: Path) -> None:
    """Name what failed, when all else is saved.

    Raises:
        DataError: more samples failed than may, or nothing is left of a set.
    """
    failures = results["failures"]
    for name, reason in failures.items():
        say(f"failed: {reason}" if name in reason else f"failed: {name}: {reason}")
    if not failures:
        return
    name, reason = next(iter(failures.items()))
    first = reason.rstrip(".") if name in reason else f"{name}: {reason.rstrip('.')}"
    if len(failures) > options.max_failures:
        raise DataError(
            f"--max-failures: {len(failures)} samples failed, {options.max_failures} may; {first}. The "
            f"others are in {folder}."
        )
    for name, entry in results["sets"].items():
        if not entry["num_samples"]:
            raise DataError(f"{name}: no sample is left, {first}.")


def _absolute(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())
