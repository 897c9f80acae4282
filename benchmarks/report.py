"""What is written about a run: a JSON object with every repetition, and the same as tables."""

import gc
import logging
import platform
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import check, diagnostics, epoch, index, layer, model, operator, profile, scaling, streaming
from benchmarks.common.settings import Settings, device_name
from benchmarks.common.timing import clock_name
from benchmarks.quantised import int8_base
from benchmarks.tables import markdown
from finetune.files import write_json

logger = logging.getLogger(__name__)

PARTS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "operator": operator.run,
    "scaling": scaling.run,
    "streaming": streaming.run,
    "layer": layer.run,
    "epoch": epoch.run,
    "check": check.run,
    "index": index.run,
    "diagnostics": diagnostics.run,
    "profile": profile.run,
    "int8": int8_base.run,
    "model": model.run,
}


def make_report(parts: Sequence[str], settings: Settings, path: Path) -> str:
    """Run parts, in the order of `PARTS`, and write the report after each: what is measured is kept.

    Args:
        parts: names, of `PARTS`.
        settings: of the run.
        path: of the JSON file, with `environment` and, by name, `parts`; the tables go beside it as `.md`.

    Returns:
        The tables.

    Raises:
        OSError: a file cannot be written, which is found out before anything is measured.
    """
    report: dict[str, Any] = {"environment": _environment(settings), "parts": {}}
    text = _write(path, report)
    for name, run in PARTS.items():
        if name in parts:
            logger.info("Measuring %s.", name)
            report["parts"][name] = run(settings)
            text = _write(path, report)
            gc.collect()  # modules refer to themselves, and theirs are gigabytes
    return text


def _write(path: Path, report: dict[str, Any]) -> str:
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
