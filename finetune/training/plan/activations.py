"""How the memory of activations and gradients rises and falls in the parts of a training step.

Counted, not guessed: the real step runs on fake tensors while every storage that it makes is counted until
it is freed.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from moshi.models.lm import LMModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.args import TrainArgs
from finetune.base_model.streams import depth_layers
from finetune.training.plan.fake_step import (
    LayerKind,
    StepPart,
    fake_model,
    layer_kinds,
    reduced,
    run_step,
    walk,
)
from finetune.wrapped_model import context_frames


class Level(NamedTuple):
    """Bytes relative to the start of a part, after an operation."""

    activations: float
    gradients: float
    operation: str


Curve = list[Level]
Curves = dict[StepPart, Curve]


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages made inside it that are still alive.

    Attributes:
        live: bytes alive now.
        history: name of each operation that took memory, and the bytes alive after it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.history: list[tuple[str, int]] = []
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def ignore(self, tensor: Tensor) -> None:
        """Do not count what this tensor holds."""
        self._watch(tensor.untyped_storage(), counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = self.live
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage(), counted=True)
        if self.live > before:
            self.note(str(func))
        return out

    def note(self, event: str) -> None:
        """Add to the history what happened and the bytes alive now."""
        self.history.append((event, self.live))

    def _watch(self, storage: torch.UntypedStorage, *, counted: bool) -> None:
        key, num_bytes = storage._cdata, storage.nbytes() if counted else 0
        if key in self._known:
            return

        def forget(_: object) -> None:
            del self._known[key]
            self.live -= num_bytes

        self._known[key] = weakref.ref(storage, forget)
        self.live += num_bytes


@dataclass(frozen=True)
class StepPeak:
    """The most that a step needs above weights, optimiser and what it found; bytes.

    Attributes:
        activations: largest sum of all that is neither a weight nor a finished gradient.
        with_gradients: the same with the gradients that the step makes itself.
    """

    activations: int
    with_gradients: int


def step_peak(args: TrainArgs, lm_kwargs: dict[str, Any], model: LMModel) -> StepPeak:
    """Peak of the forward and backward pass of one micro-batch, with `args.gradient_checkpointing` or not.

    Args:
        model: of `build_meta_model(args, lm_kwargs)`.
    """
    kinds = layer_kinds(model)
    small_args, small_kwargs, chosen = reduced(args, lm_kwargs, kinds)
    num_depformer_layers = len(depth_layers(model))
    small_kwargs["depformer_num_layers"] = min(2, num_depformer_layers)
    context = context_frames(model) if args.carries_memory else 0
    curves = trace_step(small_args, small_kwargs, num_frames=context + args.chunk_frames)

    level, gradients, peak = 0.0, 0.0, [0.0, 0.0]
    for part in walk(len(kinds), num_depformer_layers):
        curve = curves.get(_representative(part, kinds, chosen), [])
        for step in curve:
            peak[0] = max(peak[0], level + step.activations)
            peak[1] = max(peak[1], level + step.activations + gradients + step.gradients)
        if curve:
            level, gradients = level + curve[-1].activations, gradients + curve[-1].gradients
    return StepPeak(round(peak[0]), round(peak[1]))


def _representative(part: StepPart, kinds: Sequence[LayerKind], chosen: Sequence[LayerKind]) -> StepPart:
    """The part of the small model that stands for this part of the whole one."""
    if part.name == "layer":
        return replace(part, index=chosen.index(kinds[part.index]))
    return replace(part, index=min(part.index, 1))


def trace_step(args: TrainArgs, lm_kwargs: dict[str, Any], *, num_frames: int) -> Curves:
    """Run one step on fake tensors and take down the memory of each of its parts."""
    with fake_model(args, lm_kwargs) as model:
        tracker = StorageTracker()
        starts: list[tuple[StepPart, int]] = []
        created: list[tuple[int, int]] = []  # after so many operations, so many bytes of new gradient

        def mark(part: StepPart) -> None:
            tracker.note("part")
            starts.append((part, len(tracker.history)))

        def count_gradient(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            created.append((len(tracker.history), parameter.grad.untyped_storage().nbytes()))

        for parameter in model.parameters():
            tracker.ignore(parameter)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(count_gradient)
        with tracker:
            run_step(model, args, num_frames=num_frames, mark=mark)
            tracker.note("end")
    return _cut(tracker.history, starts, created)


def _cut(
    history: list[tuple[str, int]], starts: list[tuple[StepPart, int]], created: list[tuple[int, int]]
) -> Curves:
    """Cut the history of a step into the curves of its parts."""
    new_gradients = [0] * (len(history) + 1)
    for position, num_bytes in created:
        new_gradients[position] += num_bytes
    levels = [Level(0, 0, "")]
    gradients = 0
    for (operation, live), new in zip(history, new_gradients, strict=False):
        gradients += new
        levels.append(Level(live - gradients, gradients, operation))
    last, new = levels[-1], new_gradients[-1]
    levels[-1] = Level(last.activations - new, last.gradients + new, last.operation)
    stops = [position for _, position in starts[1:]] + [len(history)]
    return {
        part: [
            level._replace(
                activations=level.activations - levels[start].activations,
                gradients=level.gradients - levels[start].gradients,
            )
            for level in levels[start + 1 : stop + 1]
        ]
        for (part, start), stop in zip(starts, stops, strict=True)
    }
