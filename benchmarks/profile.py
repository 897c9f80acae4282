"""Where the time of a training step goes: the quickstart's, and that of one layer of Moshi 7B.

From torch.profiler: the time of every operation itself, without what it calls, added up by what it is for.
"""

import gc
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.settings import Settings
from benchmarks.layer import MODES, training_case
from benchmarks.quickstart import quickstart_args
from finetune.training.run import run_training
from finetune.training.trainer import Trainer

_WARM_UP, _PROFILED = 2, 3  # steps
# In this order: an operation counts where it, or else what it is called from, is named first.
GROUPS = {
    "TTT operator, forward": ("_ManualInnerLoop",),
    "TTT operator, backward": ("_ManualInnerLoopBackward",),
    "optimiser": ("Optimizer.step#AdamW.step", "aten::_fused_adamw_"),
    "attention": (
        "aten::scaled_dot_product_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "aten::_scaled_dot_product_efficient_attention_backward",
        "aten::_scaled_dot_product_flash_attention_backward",
        "ScaledDotProductFlashAttentionForCpuBackward0",
    ),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous"),
    "embeddings": ("aten::embedding", "aten::embedding_dense_backward"),
}
OTHER = "norms, elementwise, the rest"


def run(settings: Settings) -> dict[str, Any]:
    """Seconds of each group in a training step, the mean of some steps after others that are not counted.

    The profiler costs something at every operation, so that sums are larger than times without it.
    """
    cases = {"quickstart": _profile_quickstart(settings)}
    for mode in MODES:
        case = training_case(mode, settings)
        for name, call in case.calls.items():
            cases[f"layer, {mode}, {name}"] = _profile(call, settings)
        del case, call
        gc.collect()  # gigabytes, before those of the next mode
    return {"cases": cases}


def group_seconds(events: Iterable[FunctionEvent], *, device_time: bool) -> dict[str, float]:
    """Seconds by group of `GROUPS`, and `OTHER`.

    Args:
        events: of torch.profiler.
        device_time: of the kernels on the GPU, not of the CPU.
    """
    seconds: Counter[str] = Counter(dict.fromkeys((*GROUPS, OTHER), 0.0))
    for event in events:
        spent = event.self_device_time_total if device_time else event.self_cpu_time_total
        seconds[_group_of(event)] += spent / 1e6
    return dict(seconds)


def _group_of(event: FunctionEvent) -> str:
    lineage = []
    ancestor: FunctionEvent | None = event
    while ancestor is not None:
        lineage.append(ancestor.name)
        ancestor = ancestor.cpu_parent
    for group, names in GROUPS.items():
        if any(name in names for name in lineage):
            return group
    return OTHER


def _profile(call: Any, settings: Settings) -> dict[str, float]:
    for _ in range(_WARM_UP):
        call()
    with _profiler(settings) as profiler:
        for _ in range(_PROFILED):
            call()
    return _per_step(profiler, settings)


def _profiler(settings: Settings) -> profile:
    activities = [ProfilerActivity.CPU]
    if settings.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities)


def _per_step(profiler: profile, settings: Settings) -> dict[str, float]:
    found = group_seconds(profiler.events(), device_time=settings.device.type == "cuda")
    return {name: seconds / _PROFILED for name, seconds in found.items()}


def _profile_quickstart(settings: Settings) -> dict[str, float]:
    """Steps of the trainer as example/quickstart.yaml configures it, metrics and data loading included."""
    with tempfile.TemporaryDirectory() as folder:
        args = quickstart_args(Path(folder), settings, max_steps=_WARM_UP + _PROFILED)
        profiler = _profiler(settings)
        step = Trainer._train_step

        def watched(trainer: Trainer, *arguments: Any) -> Any:
            if trainer.step != _WARM_UP:
                return step(trainer, *arguments)
            profiler.start()
            return step(trainer, *arguments)

        with patch.object(Trainer, "_train_step", watched):
            run_training(args)
        profiler.stop()
        return _per_step(profiler, settings)
