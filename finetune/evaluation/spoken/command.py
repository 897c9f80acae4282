"""The work of `evaluate.py swuggy`, `sblimp`, `tstory`, `sstory` and `all`: accuracies on spoken pairs."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from finetune.checkpoint.description import CheckpointDescription
from finetune.checkpoint.reading import open_checkpoint
from finetune.errors import ConfigError, DataError
from finetune.evaluation.identity import home_of, model_identity
from finetune.evaluation.out_folder import check_default, check_out
from finetune.evaluation.spoken.accuracy import HEADLINE
from finetune.evaluation.spoken.encoding import encode_items
from finetune.evaluation.spoken.items import Benchmark, Item
from finetune.evaluation.spoken.measure import (
    EncodedPairs,
    MeasuredItems,
    encode_pairs,
    item_codes_digest,
    measure_items,
    take_ids,
)
from finetune.evaluation.spoken.options import (
    SemanticWeight,
    add_options,
    bootstrap_of,
    check,
    semantic_weight,
    settings_of,
)
from finetune.evaluation.spoken.results import (
    comparison_json,
    comparison_lines,
    data_fingerprint,
    item_entries,
    pair_entries,
    score_lines,
    submission_file,
    task_entry,
)
from finetune.evaluation.spoken.saving import (
    ALL_FILES,
    COMPARISON_FILE,
    PARTS,
    SUBMISSION_DIR,
    ResultsFile,
    save_complete,
    write_submission,
)
from finetune.evaluation.spoken.tasks import TASKS, Found, find_task, find_tasks
from finetune.files import hash_json
from finetune.inference.options import load_from_options
from finetune.inference.speech_model import SpeechModel
from finetune.inference.terminal import say

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


class _Model(NamedTuple):
    """A model that was measured.

    Attributes:
        measured: by task.
        tasks: the same as in its results.json.
        identity: which model it is.
    """

    measured: dict[str, MeasuredItems]
    tasks: dict[str, dict[str, Any]]
    identity: dict[str, Any]


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
        models = [_measure_model(options, options.checkpoint, plan, plan.folder)]
    else:
        models = [
            _measure_model(options, path, plan, plan.folder / part)
            for path, part in zip(options.compare, PARTS, strict=True)
        ]
        _compare(options, plan.folder, models)
    _check_failures(options, plan.folder, models)


def _compare(options: argparse.Namespace, folder: Path, models: Sequence[_Model]) -> None:
    first, second = models
    comparison = comparison_json(
        (first.measured, second.measured),
        (first.tasks, second.tasks),
        models=[model.identity for model in models],
        settings=settings_of(options),
        bootstrap=bootstrap_of(options),
    )
    save_complete(folder / COMPARISON_FILE, comparison)
    for line in comparison_lines(comparison):
        say(line)


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
    num_ids = {task: len(each.ids) for task, each in whole.items()}
    folder = _folder(name, options, checkpoints[0])
    if options.out is None:
        check_default(folder)
    return _Plan(benchmarks, num_ids, found.absent, weight, folder)


def _common_weight(
    options: argparse.Namespace, checkpoints: Sequence[CheckpointDescription]
) -> SemanticWeight:
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


def _folder(name: str, options: argparse.Namespace, checkpoint: CheckpointDescription) -> Path:
    """Where the results go; without --out the same settings go to the same folder.

    Raises:
        ConfigError: the folder that was asked for holds results.
    """
    if options.out is not None:
        for file in ALL_FILES:
            if (Path(options.out) / file).exists():
                raise ConfigError(f"--out: {options.out} holds {file} already; choose another folder.")
        return Path(options.out)
    given = ("compare", "base", "dtype", "no_fuse_lora", "semantic_weight")
    key = settings_of(options) | {option: getattr(options, option) for option in given}
    tag = hash_json(key | {"data": _data_path(options), "name": name})[:8]
    path = options.checkpoint or options.compare[0]
    kind = "" if options.compare is None else "compare-"
    home = home_of(checkpoint, given=path)
    return home / "evaluation" / "spoken" / f"{kind}step_{checkpoint.step:06d}-{tag}"


def _measure_model(options: argparse.Namespace, path: str, plan: _Plan, folder: Path) -> _Model:
    """Measure one model on all benchmarks; each is saved when it is done."""
    speech = load_from_options(options, checkpoint=path)
    say(f"model: {speech.source}")
    weight = {"semantic_weight": plan.weight.value, "semantic_weight_source": plan.weight.source}
    say(f"semantic codebook weighs {plan.weight.value:g} ({plan.weight.source})")
    identity = model_identity(speech, fuse_lora=not options.no_fuse_lora) | weight
    prompt = _prompt(options, speech)
    settings = settings_of(options) | weight
    settings["prompt_codes_sha256"] = None if prompt is None else item_codes_digest(prompt)
    results = ResultsFile(folder, absent=plan.absent, model=identity, settings=settings)
    model = _Model({}, {}, identity)
    for name, benchmark in plan.benchmarks.items():
        encoded, measured = _measure_task(options, plan, speech, benchmark, prompt=prompt)
        model.measured[name] = measured
        codes = encoded.codes_sha256()
        items, pairs = item_entries(measured, codes), pair_entries(measured)
        # The scores are safe before the intervals are drawn, which may take more memory than there is.
        for bootstrap in (None, bootstrap_of(options)):
            model.tasks[name] = task_entry(measured, encoded, bootstrap)
            model.tasks[name] |= _data_entry(options, plan, encoded, measured)
            results.add(name, model.tasks[name], items=items, pairs=pairs)
        _say_task(name, model.tasks[name])
    results.finish()
    for measured in model.measured.values():
        write_submission(folder, measured, split=options.split)
    for line in score_lines(model.tasks):
        say(line)
    return model


def _measure_task(
    options: argparse.Namespace,
    plan: _Plan,
    speech: SpeechModel,
    benchmark: Benchmark,
    *,
    prompt: Tensor | None,
) -> tuple[EncodedPairs, MeasuredItems]:
    progress = sys.stderr.isatty()
    encoded = encode_pairs(
        benchmark,
        speech,
        user=options.user,
        text=options.text,
        cache_dir=options.cache_dir,
        progress=progress,
    )
    measured = measure_items(
        speech.lm,
        encoded,
        semantic_weight=plan.weight.value,
        batch_size=options.batch_size,
        max_frames_per_batch=options.batch_frames,
        prompt=prompt,
        conditions=speech.conditions,
        progress=progress,
    )
    return encoded, measured


def _data_entry(
    options: argparse.Namespace, plan: _Plan, encoded: EncodedPairs, measured: MeasuredItems
) -> dict[str, Any]:
    """What results.json says about the data of a task, and about its file for the challenge."""
    num_ids = plan.num_ids[measured.name]
    subset = len(plan.benchmarks[measured.name].ids) < num_ids
    file = submission_file(measured.name, split=options.split)
    fingerprint = data_fingerprint(encoded.pairs, encoded.codes_sha256())
    submission = {
        "file": f"{SUBMISSION_DIR}/{file}",
        "num_items": len(measured.scores),
        "complete": not subset and not measured.failures,
    }
    return {
        "num_ids_of_data": num_ids,
        "subset": subset,
        "data": {"path": _data_path(options), "fingerprint": fingerprint},
        "submission": None if file is None else submission,
    }


def _prompt(options: argparse.Namespace, speech: SpeechModel) -> Tensor | None:
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
    num_ids, of_data = entry["num_ids"], entry["num_ids_of_data"]
    ids = "all ids" if num_ids == of_data else f"{num_ids} of {of_data} ids"
    say(
        f"{name}: {shown} of {entry['num_pairs']} pairs ({ids}), "
        f"{1000 * entry['seconds_per_item']:.1f} ms an item"
    )
    for item, reason in entry["failures"].items():
        say(f"failed: {item}: {reason}")
    submission = entry["submission"]
    if submission is not None and not submission["complete"]:
        say(f"{submission['file']} holds {submission['num_items']} items; the challenge wants all of them")


def _check_failures(options: argparse.Namespace, folder: Path, models: Sequence[_Model]) -> None:
    """Say at the end, when all is saved, that too many items failed.

    Raises:
        DataError: more than `--max-failures` in one of the models, or nothing is left of a task.
    """
    for model in models:
        failures = {
            f"{task} {name}": reason
            for task, measured in model.measured.items()
            for name, reason in measured.failures.items()
        }
        if len(failures) > options.max_failures:
            raise DataError(
                f"--max-failures: {len(failures)} items failed, {options.max_failures} may; "
                f"{_first(failures)}. The others are in {folder}."
            )
        for task, measured in model.measured.items():
            if not measured.pairs:
                raise DataError(f"{task}: no pair is left, {_first(measured.failures)}.")
    for task in models[0].measured:
        if not set.intersection(*(set(model.measured[task].pairs) for model in models)):
            raise DataError(f"{task}: no pair is left that both models have scores of.")


def _first(failures: Mapping[str, str]) -> str:
    name, reason = next(iter(failures.items()))
    return f"{name}: {reason.rstrip('.')}"


def _data_path(options: argparse.Namespace) -> str:
    return os.path.abspath(Path(options.data).expanduser())
