"""An epoch of the data loader on the demo's dialogues, with an empty and with a full code cache."""

import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from moshi.models import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo

from benchmarks.common.settings import Settings
from benchmarks.common.timing import interleaved
from finetune.args import TrainArgs
from finetune.base_model.codec import load_codec
from finetune.config_io import build_args
from finetune.data.pipeline import build_datasets, build_train_batches, load_recordings
from finetune.demo.assets import DemoAssets, make_demo_assets
from finetune.demo.model_folder import open_repository

DEMO: dict[str, Any] = {"num_train": 16, "num_eval": 1, "minutes": 3.0, "seed": 0}
QUICK_DEMO: dict[str, Any] = {"num_train": 2, "num_eval": 1, "minutes": 1 / 3, "seed": 0}
_CHUNK_SEC = 20.48
_BATCH_SIZE = 8


def run(settings: Settings) -> dict[str, Any]:
    """From the manifest to the last batch of an epoch, as `train.py` does it, loading in this process.

    cold: Mimi encodes all recordings into a new cache; warm: their codes come from the cache. Codec and
    model are loaded before, on the CPU or GPU of the run.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _run(Path(folder), settings)


def _run(folder: Path, settings: Settings) -> dict[str, Any]:
    demo = make_demo_assets(folder / "demo", **(QUICK_DEMO if settings.quick else DEMO))
    info = open_repository(demo.model_dir)
    mimi = load_codec(info, settings.device)
    model = info.get_moshi(device="cpu")
    numbers = count()

    def epoch(cache_name: Callable[[], str]) -> int:
        return _epoch(_args(demo, folder / cache_name()), info, model, mimi)

    calls = {
        "cold": partial(epoch, lambda: f"cold-{next(numbers)}"),
        "warm": partial(epoch, lambda: "warm"),
    }
    recordings = load_recordings(_args(demo, folder / "warm")).train
    num_batches = calls["warm"]()
    times = interleaved(calls, settings)
    return {
        "recordings": len(recordings),
        "audio_seconds": sum(recording.duration_sec for recording in recordings),
        "batches": num_batches,
        "batch_size": _BATCH_SIZE,
        "candidates": {name: times[name].record() for name in calls},
        "cold_over_warm": times["cold"].median / times["warm"].median,
    }


def _args(demo: DemoAssets, cache_dir: Path) -> TrainArgs:
    data = {"train_data": str(demo.train_jsonl), "cache_dir": str(cache_dir), "num_workers": 0}
    return build_args(
        TrainArgs,
        {
            "data": data | {"shuffle": True},
            "full_finetuning": True,  # without TTT, so that the chunks of an epoch come in any order
            "do_eval": False,
            "duration_sec": _CHUNK_SEC,
            "batch_size": _BATCH_SIZE,
        },
    )


def _epoch(args: TrainArgs, info: CheckpointInfo, model: LMModel, mimi: MimiModel) -> int:
    """Every chunk once, the last batch filled up with chunks of the next epoch; returns the batches."""
    chunks, _ = build_datasets(args, load_recordings(args), info, model, mimi)
    num_batches = -(-len(chunks) // args.batch_size)
    batches = build_train_batches(args, chunks, step=0, num_samples=0, pin_memory=False)
    return sum(1 for _ in islice(batches, num_batches))
