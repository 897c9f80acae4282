"""The work of `evaluate.py recall`: which answer a model finds likeliest, by the time in between."""

import argparse
import logging
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.base_model.conditions import condition_names
from finetune.data.codes.encode_audio import encode_silence
from finetune.errors import ConfigError, DataError
from finetune.evaluation.audio_codes import CodeStore
from finetune.evaluation.bootstrap import RatioBootstrap
from finetune.evaluation.identity import home_of, model_identity, weights_key
from finetune.evaluation.long_context.arms import PLAIN
from finetune.evaluation.out_folder import (
    RESULTS_FILE,
    check_default,
    check_out,
    check_settings,
    make_folder_of,
)
from finetune.evaluation.recall.conversations import Coder, Pieces
from finetune.evaluation.recall.items import Group, Items, read_items
from finetune.evaluation.recall.measure import Lengths, Measurement, Pass, RecallArm, look_at, measure_items
from finetune.evaluation.recall.options import ARMS, add_options, check
from finetune.evaluation.recall.plot import plot_accuracy
from finetune.evaluation.recall.results import differences, score, write_items
from finetune.evaluation.recall.score_file import ScoreFile
from finetune.evaluation.recall.table import comparison_tables, lag_name, tables
from finetune.files import hash_json, write_json
from finetune.inference.options import load_from_options
from finetune.inference.speech_model import SpeechModel
from finetune.inference.terminal import say
from finetune.ttt_integration import window_lines
from moshi_ttt.files.atomic_file import replacing
from moshi_ttt.hybrid_model import ttt_layers

__all__ = ["HELP", "add_options", "run"]

HELP = "which answer is likeliest to something said long before, with the memory on, frozen and off"
ITEMS_CSV, PLOT_FILE = "items.csv", "recall.png"
_SILENCE_FRAMES = 256

logger = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> None:
    """Measure, write and print.

    Raises:
        UserError: an option, a file or the checkpoint cannot be used, or too many items failed.
    """
    check(options)
    check_out(options.out)
    items = read_items(Path(options.data).expanduser())
    models = [_Model(options, options.checkpoint, items)]
    if options.compare is not None:
        models.append(_Model(options, options.compare, items, is_second=True))
    settings = {
        "models": [weights_key(model.identity) for model in models],
        "data": os.path.abspath(Path(options.data).expanduser()),
        "seed": options.seed,
    }
    folder = _folder(options, models[0].speech, settings)
    check_settings(folder, settings)
    check_default(folder)
    make_folder_of(folder, settings)
    say(f"results: {folder}")
    for number, model in enumerate(models):
        model.measure(folder / f"scores{'.second' if number else ''}.jsonl")
    _report(folder, options, models)
    failures = {name: reason for model in models for name, reason in model.failures.items()}
    if len(failures) > options.max_failures:
        name, reason = next(iter(failures.items()))
        line = reason if name in reason else f"{name}: {reason}"
        raise DataError(
            f"--max-failures: {len(failures)} of the items failed, {options.max_failures} may; "
            f"{line.rstrip('.')}. The others are in {folder}."
        )


class _Model:
    """A checkpoint and what it made of the items."""

    def __init__(
        self, options: argparse.Namespace, checkpoint: str, items: Items, *, is_second: bool = False
    ) -> None:
        self.options = options
        self.speech = load_from_options(options, checkpoint=checkpoint)
        self.arms = _arms(self.speech, options.arms, is_second=is_second)
        self.identity = model_identity(self.speech, fuse_lora=not options.no_fuse_lora)
        self.coder = _coder(self.speech, options)
        checkpoint_ = self.speech.checkpoint
        say(f"model: {checkpoint_.folder} (step {checkpoint_.step}), arms: {', '.join(self.arms)}")
        for name in condition_names(self.speech.lm):
            say(f"condition of all items: {name} {self.speech.conditions.get(name, 'unknown')!r}")
        for line in window_lines(self.speech.lm):
            say(line)
        self.groups, self.lengths, self.failures = look_at(items, self.coder, progress=sys.stderr.isatty())
        _check_lags(options.lags, self.lengths)
        self.measurement = Measurement({})

    def measure(self, path: Path) -> None:
        """Score the items that were chosen."""
        options = self.options
        how = Pass(
            self.speech.lm,
            self.coder,
            self.lengths,
            options.lags,
            options.batch_size,
            options.chunk_frames,
            self.speech.conditions,
        )
        self.measurement = measure_items(
            _chosen(self.groups, options.limit),
            how,
            arms=self.arms,
            file=ScoreFile(path),
            progress=sys.stderr.isatty(),
        )
        self.failures |= self.measurement.failures
        if self.measurement.num_reused:
            say(f"{self.measurement.num_reused} measurements were there already")


def _arms(speech: SpeechModel, asked: Sequence[RecallArm] | None, *, is_second: bool) -> Sequence[RecallArm]:
    if ttt_layers(speech.lm):
        return (asked or ARMS)[:1] if is_second else asked or ARMS
    if asked is not None and not is_second:
        raise ConfigError(f"--arms: {speech.checkpoint.folder} has no TTT layers; leave it out.")
    return (PLAIN,)


def _coder(speech: SpeechModel, options: argparse.Namespace) -> Coder:
    store = CodeStore(speech.mimi, speech.info, options.cache_dir)
    voice = encode_silence(speech.mimi, _SILENCE_FRAMES)  # [K, T]

    def silence(num_frames: int) -> torch.Tensor:
        times = -(-num_frames // _SILENCE_FRAMES) or 1
        rows = torch.cat([voice.repeat(2, times)])[:, :num_frames]
        text = torch.full((1, num_frames), speech.lm.text_padding_token_id)
        return torch.cat([text, rows])

    return Coder(Pieces(speech, store, speech.checkpoint.text), silence, seed=options.seed)


def _check_lags(lags: Sequence[int], lengths: Lengths) -> None:
    if lags[0] < lengths.cue:
        raise ConfigError(
            f"--lags: {lag_name(lags[0])} are {lags[0]} frames, shorter than the longest cue of the items "
            f"({lengths.cue} frames, {lag_name(lengths.cue)}); give longer ones."
        )


def _chosen(groups: Sequence[Group], limit: int | None) -> list[Group]:
    """So many items, the same for the same folder."""
    if limit is None or limit >= len(groups):
        return list(groups)
    kept = set(random.Random("recall").sample(range(len(groups)), limit))
    return [group for index, group in enumerate(groups) if index in kept]


def _folder(options: argparse.Namespace, speech: SpeechModel, settings: Mapping[str, Any]) -> Path:
    """Where the results go; without --out the same settings go to the same folder."""
    if options.out is not None:
        return Path(options.out)
    home = home_of(speech.checkpoint, given=options.checkpoint)
    return home / "evaluation" / "recall" / f"step_{speech.checkpoint.step:06d}-{hash_json(settings)[:8]}"


def _report(folder: Path, options: argparse.Namespace, models: Sequence[_Model]) -> None:
    bootstrap = RatioBootstrap(options.resamples, seed=options.seed)
    first = models[0]
    results: dict[str, Any] = {
        "kind": "moshi-ttt recall",
        "version": 1,
        "lags_frames": options.lags,
        **score(first.measurement, options.lags, bootstrap),
    }
    if len(models) > 1:
        results["comparison"] = _comparison(models, options.lags, bootstrap)
    results |= {
        "failures": first.failures,
        "models": [dict(model.identity) for model in models],
        "data": os.path.abspath(Path(options.data).expanduser()),
        "settings": {
            name: getattr(options, name)
            for name in ("limit", "batch_size", "chunk_frames", "resamples", "seed", "max_failures")
        },
    }
    try:
        with replacing(folder / RESULTS_FILE) as partial:
            write_json(partial, results)
        write_items(folder / ITEMS_CSV, first.measurement.measured, options.lags)
        if results["arms"]:
            plot_accuracy(folder / PLOT_FILE, results["arms"], options.lags)
    except OSError as error:
        raise ConfigError(f"--out: {folder}: cannot be written: {error.strerror}.") from None
    for line in tables(results, options.lags):
        say(line)
    if len(models) > 1:
        for line in comparison_tables(results["comparison"]["first - second"], options.lags):
            say(line)
    for name, reason in first.failures.items():
        say(f"failed: {reason if name in reason else f'{name}: {reason}'}")


def _comparison(models: Sequence[_Model], lags: Sequence[int], bootstrap: RatioBootstrap) -> dict[str, Any]:
    """What the first model has more than the second on the items that both could be measured on."""
    found = [next(iter(model.measurement.measured.values())) for model in models]
    shared = set.intersection(*({item.group.name for item in items} for items in found))
    one, two = ([item for item in items if item.group.name in shared] for items in found)
    arms = [next(iter(model.arms)) for model in models]
    return {"arms": arms, "num_items": len(one), "first - second": differences(one, two, lags, bootstrap)}
