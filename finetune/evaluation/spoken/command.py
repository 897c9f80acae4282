"""The work of `evaluate.py swuggy`, `sblimp`, `tstory`, `sstory` and `all`: accuracies on spoken pairs."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import LongTensor

from finetune.errors import ConfigError, DataError
from finetune.evaluation.long_context.identity import digest, home_of, model_identity
from finetune.evaluation.out_folder import check_out
from finetune.evaluation.spoken.accuracy import HEADLINE
from finetune.evaluation.spoken.encoding import encode_items
from finetune.evaluation.spoken.items import Benchmark, Item
from finetune.evaluation.spoken.measure import Encoded, Measured, codes_digest, encode, measure, take_ids
from finetune.evaluation.spoken.options import add_options, bootstrap_of, check, settings_of
from finetune.evaluation.spoken.results import (
    COMPARISON_FILE,
    RESULTS_FILE,
    comparison_json,
    comparison_lines,
    data_fingerprint,
    item_entries,
    results_json,
    score_lines,
    task_entry,
    write_object,
    write_submission,
)
from finetune.evaluation.spoken.semantic_weight import SemanticWeight, semantic_weight
from finetune.evaluation.spoken.tasks import TASKS, Found, find_task, find_tasks
from finetune.inference.options import load_from_options
from finetune.inference.speech_model import SpeechModel
from finetune.inference.terminal import say
from finetune.loading import Checkpoint, open_checkpoint

__all__ = ["ALL", "add_options", "help_of", "run"]

ALL = "all"


@dataclass(frozen=True)
class _Plan:
    """What to measure, checked before anything slow.

    Attributes:
        benchmarks: by task, cut to `--limit`.
        num_ids: of each whole benchmark.
        absent: why tasks of `all` are left out.
        weight: of the semantic codebook.
        folder: of the results.
    """

    benchmarks: dict[str, Benchmark]
    num_ids: dict[str, int]
    absent: dict[str, str]
    weight: SemanticWeight
    folder: Path


def help_of(name: str) -> str:
    """What a measurement is, in a line."""
    return "all of these that there are below a folder" if name == ALL else TASKS[name].title


def run(name: str, options: argparse.Namespace) -> None:
    """Measure, write and print.

    Args:
        name: of a task, or `all`.
        options: of the command line.

    Raises:
        UserError: an option, a file or a checkpoint cannot be used, or too many items failed.
    """
    plan = _plan(name, options)
    for task, reason in plan.absent.items():
        say(f"{task}: left out, {reason}")
    say(f"results: {plan.folder}")
    if options.compare is None:
        measured = _measure_model(options, options.checkpoint, plan, plan.folder)[0]
        _check_failures(options, plan.folder, [measured])
        return
    folders = [plan.folder / part for part in ("first", "second")]
    (first, model), (second, other) = (
        _measure_model(options, path, plan, folder)
        for path, folder in zip(options.compare, folders, strict=True)
    )
    comparison = comparison_json(
        first,
        second,
        models=[model, other],
        settings=settings_of(options),
        bootstrap=bootstrap_of(options),
    )
    write_object(plan.folder / COMPARISON_FILE, comparison)
    for line in comparison_lines(comparison):
        say(line)
    _check_failures(options, plan.folder, [first, second])


def _plan(name: str, options: argparse.Namespace) -> _Plan:
    check(options)
    check_out(options.out)
    paths = options.compare or [options.checkpoint]
    checkpoints = [open_checkpoint(path, base=options.base) for path in paths]
    weight = _common_weight(options, checkpoints)
    data = Path(options.data).expanduser()
    found = find_tasks(data) if name == ALL else Found({name: find_task(data, name)}, {})
    whole = {task: TASKS[task].load(folder, options.split) for task, folder in found.folders.items()}
    benchmarks = {task: take_ids(each, options.limit, seed=options.seed) for task, each in whole.items()}
    num_ids = {task: len({pair.id for pair in each.pairs}) for task, each in whole.items()}
    folder = _folder(name, options, checkpoints[0])
    return _Plan(benchmarks, num_ids, found.absent, weight, folder)


def _common_weight(options: argparse.Namespace, checkpoints: Sequence[Checkpoint]) -> SemanticWeight:
    """The weight of the semantic codebook, one for both models of a comparison."""
    weights = [semantic_weight(checkpoint, given=options.semantic_weight) for checkpoint in checkpoints]
    if len({weight.value for weight in weights}) > 1:
        values = " and ".join(
            f"{weight.value:g} for {checkpoint.folder} ({weight.source})"
            for weight, checkpoint in zip(weights, checkpoints, strict=True)
        )
        raise ConfigError(
            f"--compare: the semantic codebook weighs {values}; give one --semantic-weight for both."
        )
    return weights[0]


def _folder(name: str, options: argparse.Namespace, checkpoint: Checkpoint) -> Path:
    """Where the results go; without --out the same settings go to the same folder.

    Raises:
        ConfigError: the folder that was asked for holds results.
    """
    if options.out is not None:
        for file in (RESULTS_FILE, COMPARISON_FILE):
            if (Path(options.out) / file).exists():
                raise ConfigError(f"--out: {options.out} holds a {file} already; choose another folder.")
        return Path(options.out)
    given = ("compare", "base", "dtype", "no_fuse_lora", "semantic_weight")
    key = settings_of(options) | {option: getattr(options, option) for option in given}
    tag = digest(key | {"data": _data_path(options), "name": name})[:8]
    path = options.checkpoint or options.compare[0]
    kind = "" if options.compare is None else "compare-"
    home = home_of(checkpoint, given=path)
    return home / "evaluation" / "spoken" / f"{kind}step_{checkpoint.step:06d}-{tag}"


def _measure_model(
    options: argparse.Namespace, path: str, plan: _Plan, folder: Path
) -> tuple[dict[str, Measured], dict[str, Any]]:
    """Measure one model on all benchmarks; results are written after each."""
    speech = load_from_options(options, checkpoint=path)
    say(f"model: {speech.source}")
    weight = {"semantic_weight": plan.weight.value, "semantic_weight_source": plan.weight.source}
    say(f"semantic codebook weighs {plan.weight.value:g} ({plan.weight.source})")
    model = model_identity(speech, fuse_lora=not options.no_fuse_lora) | weight
    prompt = _prompt(options, speech)
    settings = settings_of(options) | weight
    settings["prompt_codes_sha256"] = None if prompt is None else codes_digest(prompt)
    by_task, tasks, items = {}, {}, {}
    for name, benchmark in plan.benchmarks.items():
        progress = sys.stderr.isatty()
        encoded = encode(
            benchmark,
            speech,
            user=options.user,
            text=options.text,
            cache_dir=options.cache_dir,
            progress=progress,
        )
        measured = measure(
            speech.lm,
            encoded,
            semantic_weight=plan.weight.value,
            batch_size=options.batch_size,
            max_frames_per_batch=options.batch_frames,
            prompt=prompt,
            progress=progress,
        )
        by_task[name] = measured
        tasks[name], items[name] = _entries(options, plan, folder, encoded, measured)
        results = results_json(tasks, items, absent=plan.absent, model=model, settings=settings)
        write_object(folder / RESULTS_FILE, results)
        _say_task(name, tasks[name])
    for line in score_lines(tasks):
        say(line)
    return by_task, model


def _entries(
    options: argparse.Namespace, plan: _Plan, folder: Path, encoded: Encoded, measured: Measured
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What results.json says about a task, and about its items; writes the file for the challenge."""
    codes = encoded.codes_sha256()
    asked = len({pair.id for pair in encoded.pairs})
    entry = task_entry(measured, encoded, bootstrap_of(options))
    entry |= {
        "num_ids_of_data": plan.num_ids[measured.name],
        "subset": asked < plan.num_ids[measured.name],
        "data": {"path": _data_path(options), "fingerprint": data_fingerprint(codes)},
        "submission": write_submission(
            folder,
            measured,
            split=options.split,
            complete=asked == plan.num_ids[measured.name],
        ),
    }
    return entry, item_entries(measured, codes)


def _prompt(options: argparse.Namespace, speech: SpeechModel) -> LongTensor | None:
    """The codes of the recording in front of every item.

    Raises:
        ConfigError: it cannot be used.
    """
    if options.prompt is None:
        return None
    item = Item("prompt", Path(options.prompt))
    codes, failures = encode_items(
        [item], speech, user=options.user, text=options.text, cache_dir=options.cache_dir
    )
    if codes[0] is None:
        raise ConfigError(f"--prompt: {failures[item.name]}")
    say(f"prompt: {options.prompt}, {codes[0].shape[1]} frames in front of every item")
    return codes[0]


def _say_task(name: str, entry: Mapping[str, Any]) -> None:
    value = entry["accuracy"][HEADLINE]["value"]
    shown = "nothing to score" if value is None else f"{100 * value:.1f} %"
    of_data = f"{entry['num_ids']} of {entry['num_ids_of_data']} ids" if entry["subset"] else "all ids"
    say(
        f"{name}: {shown} of {entry['num_pairs']} pairs ({of_data}), "
        f"{1000 * entry['seconds_per_item']:.1f} ms an item"
    )
    for item, reason in entry["failures"].items():
        say(f"failed: {item}: {reason}")
    submission = entry["submission"]
    if submission is not None and not submission["complete"]:
        say(f"{submission['file']} holds {submission['num_items']} items; the challenge wants all of them")


def _check_failures(
    options: argparse.Namespace, folder: Path, models: Sequence[Mapping[str, Measured]]
) -> None:
    """Say at the end, when all is saved, that too many items failed.

    Raises:
        DataError: more than `--max-failures` in one of the models.
    """
    for by_task in models:
        failures = {
            f"{task} {name}": reason
            for task, measured in by_task.items()
            for name, reason in measured.failures.items()
        }
        if len(failures) > options.max_failures:
            name, reason = next(iter(failures.items()))
            raise DataError(
                f"--max-failures: {len(failures)} items failed, {options.max_failures} may; "
                f"{name}: {reason.rstrip('.')}. The others are in {folder}."
            )


def _data_path(options: argparse.Namespace) -> str:
    return os.path.abspath(Path(options.data).expanduser())
