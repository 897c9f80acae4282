"""What is written about a run: a JSON object with every repetition, and the same as tables."""

import gc
import platform
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import epoch, layer, operator, scaling, streaming
from benchmarks.settings import Settings, device_name
from benchmarks.tables import markdown
from benchmarks.timing import clock_name
from finetune.files import write_json

PARTS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "operator": operator.run,
    "scaling": scaling.run,
    "streaming": streaming.run,
    "layer": layer.run,
    "epoch": epoch.run,
}


def make_report(parts: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run parts, in the order of `PARTS`.

    Args:
        parts: names, of `PARTS`.
        settings: of the run.

    Returns:
        `environment` and, by name, `parts`.
    """
    results = {}
    for name, run in PARTS.items():
        if name in parts:
            results[name] = run(settings)
            gc.collect()  # modules refer to themselves, and theirs are gigabytes
    return {"environment": _environment(settings), "parts": results}


def write_report(path: Path, report: dict[str, Any]) -> str:
    """Write the report to `path` and its tables beside it as `.md`; returns the tables.

    Raises:
        OSError: a file cannot be written.
    """
    text = markdown(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def _environment(settings: Settings) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moshi": version("moshi"),
        "moshi_ttt": version("moshi-ttt"),
        "device": settings.device.type,
        "device_name": device_name(settings.device),
        "threads": settings.threads,
        "dtype": settings.dtype_name,
        "repetitions": settings.repetitions,
        "quick": settings.quick,
        "clock": clock_name(settings),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
