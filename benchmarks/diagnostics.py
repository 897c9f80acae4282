"""What it costs a training step that the run measures its health: at every step, every 10th, never."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.common.settings import Settings
from benchmarks.common.timing import Times, interleaved
from benchmarks.quickstart import quickstart_args
from finetune.args import DiagnosticsArgs
from finetune.commands import StopRequest
from finetune.data.batches.dataset import Batch
from finetune.diagnose.monitor import Diagnostics
from finetune.training.run import run_training
from finetune.training.trainer import Trainer

FREQUENCIES = {"never": 0, "every 10th step": 10, "every step": 1}
_STEPS = 10  # of a timed call: one of them is a 10th


def run(settings: Settings) -> dict[str, Any]:
    """Steps of the trainer as example/quickstart.yaml configures it, data loading and records included.

    One trainer makes the steps of all candidates, only its diagnostics are exchanged in between: model,
    optimiser and data are the same. Logs are off, so what they share with the diagnostics, the inner
    loop's recorder, counts here in full.
    """
    times: dict[str, Times] = {}

    def measure(trainer: Trainer, stop: StopRequest) -> None:
        times.update(interleaved(_candidates(trainer), settings))
        train(trainer, stop)  # the one step that is left

    train = Trainer.train
    with tempfile.TemporaryDirectory() as folder, patch.object(Trainer, "train", measure):
        num_steps = len(FREQUENCIES) * (1 + settings.repetitions) * _STEPS
        args = quickstart_args(Path(folder), settings, max_steps=num_steps + 1)
        run_training(args)
    return {
        "steps_per_call": _STEPS,
        "candidates": {
            name: time.record(per=_STEPS) | {"over_never": time.median / times["never"].median}
            for name, time in times.items()
        },
    }


def _candidates(trainer: Trainer) -> dict[str, Callable[[], None]]:
    batches = trainer._train_batches()
    return {
        name: partial(_steps, trainer, batches, _diagnostics(trainer, freq))
        for name, freq in FREQUENCIES.items()
    }


def _diagnostics(trainer: Trainer, freq: int) -> Diagnostics:
    args = replace(trainer.args, diagnostics=DiagnosticsArgs(freq=freq))
    return Diagnostics(args, trainer.model, trainer.state.gates)


def _steps(trainer: Trainer, batches: Iterator[Batch], diagnostics: Diagnostics) -> None:
    trainer.diagnostics = diagnostics
    for _ in range(_STEPS):
        trainer._after_step(trainer._train_step(batches))
