"""The start of a run on a data set that is encoded already: reading the manifest, and the index of chunks."""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from moshi.models.loaders import FRAME_RATE

from benchmarks.check import SECONDS, write_recordings
from benchmarks.common.settings import Settings
from benchmarks.common.timing import interleaved
from finetune.args import TrainArgs
from finetune.config_io import build_args
from finetune.data.batches.chunks import build_index
from finetune.data.codes.cache import CodeCache
from finetune.data.codes.code_file import code_file_bytes
from finetune.data.pipeline import load_recordings, look_up

_NUM_RECORDINGS, _QUICK_RECORDINGS = 10_000, 20
_NUM_WORDS, _NUM_CODEBOOKS = 100, 8


def run(settings: Settings) -> dict[str, Any]:
    """Manifest and index of recordings of 3 minutes, whose files hold headers only."""
    num_recordings = _QUICK_RECORDINGS if settings.quick else _NUM_RECORDINGS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recordings = write_recordings(folder / "data", num_recordings, _NUM_WORDS)
        lines = (json.dumps({"path": r.path.name, "duration": r.duration_sec}) for r in recordings)
        (folder / "data" / "data.jsonl").write_text("\n".join(lines))
        data = {"train_data": str(folder / "data"), "cache_dir": str(folder / "codes")}
        args = build_args(TrainArgs, {"data": data, "full_finetuning": True})
        (folder / "mimi").write_bytes(b"weights")
        cache = CodeCache(
            mimi_weights=folder / "mimi",
            mimi_config=None,
            num_codebooks=_NUM_CODEBOOKS,
            cache_dir=folder / "codes",
        )
        recordings = load_recordings(args).train
        _write_codes(cache, recordings)
        candidates: dict[str, Callable[[], object]] = {
            "manifest, headers and words": partial(load_recordings, args),
            "index": partial(_index, args, cache, recordings),
        }
        times = interleaved(candidates, settings)
    return {
        "recordings": num_recordings,
        "candidates": {name: times[name].record() for name in candidates},
    }


def _index(args: TrainArgs, cache: CodeCache, recordings: list) -> None:
    assert not cache.missing(recordings)
    checked, entries = look_up(args.data.mono, cache, recordings, {})
    assert len(checked.usable) == len(recordings), checked.faults[:1]
    build_index([entry.num_frames for entry in entries.values()], chunk_frames=args.chunk_frames)


def _write_codes(cache: CodeCache, recordings: list) -> None:
    """Headers of code files; the codes themselves are holes in the file."""
    codes = torch.zeros(2, _NUM_CODEBOOKS, round(SECONDS * FRAME_RATE), dtype=torch.int64)
    for recording in recordings:
        path, key = cache.locate(recording)
        path.parent.mkdir(exist_ok=True)
        facts = {"audio_bytes": recording.path.stat().st_size, "audio_sha256": "0" * 64}
        content = code_file_bytes(codes, key=key, codec=cache.codec, **facts)
        with path.open("wb") as file:
            file.write(content[: len(content) - codes.numel() * 2])
            file.truncate(len(content))
