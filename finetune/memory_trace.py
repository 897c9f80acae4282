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
from finetune.fake_step import LayerKind, Part, fake_model, layer_kinds, reduced, run_step, walk

# A hybrid layer runs some thousand operations per mini-batch, all mini-batches alike: long chunks are
# extrapolated from chunks of this many.
_MINI_BATCHES = (4, 5, 6)


class Level(NamedTuple):
    """Bytes relative to the start of a part, after an operation."""

    activations: float
    gradients: float
    operation: str


Curve = list[Level]
Curves = dict[Part, Curve]


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
    num_depformer_layers = len(model.depformer.layers)
    small_kwargs["depformer_num_layers"] = min(2, num_depformer_layers)
    curves = _trace_whole(small_args, small_kwargs, chosen)

    level, gradients, peak = 0.0, 0.0, [0.0, 0.0]
    for part in walk(len(kinds), num_depformer_layers):
        curve = curves.get(_representative(part, kinds, chosen), [])
        for step in curve:
            peak[0] = max(peak[0], level + step.activations)
            peak[1] = max(peak[1], level + step.activations + gradients + step.gradients)
        if curve:
            level, gradients = level + curve[-1].activations, gradients + curve[-1].gradients
    return StepPeak(round(peak[0]), round(peak[1]))


def _representative(part: Part, kinds: Sequence[LayerKind], chosen: Sequence[LayerKind]) -> Part:
    """The part of the small model that stands for this part of the whole one."""
    if part.name == "layer":
        return part._replace(index=chosen.index(kinds[part.index]))
    return part._replace(index=min(part.index, 1))


def _trace_whole(args: TrainArgs, lm_kwargs: dict[str, Any], chosen: Sequence[LayerKind]) -> Curves:
    """Curves of the chunk length that the configuration asks for."""
    num_frames, size = args.chunk_frames, args.ttt.mini_batch_size
    lengths = [num_frames % size + num * size for num in _MINI_BATCHES]
    if not any(kind.hybrid for kind in chosen) or num_frames <= lengths[-1]:
        return trace_step(args, lm_kwargs, num_frames=num_frames)
    # Everything but the inner loop at its true length; a single mini-batch makes that loop short.
    one = replace(args, ttt=replace(args.ttt, mini_batch_size=num_frames))
    curves = trace_step(one, lm_kwargs, num_frames=num_frames)
    without_depformer = lm_kwargs | {
        "dep_q": 2,
        "depformer_num_layers": 1,
        "depformer_weights_per_step_schedule": None,
    }
    short = [trace_step(args, without_depformer, num_frames=length) for length in lengths]
    for index in (index for index, kind in enumerate(chosen) if kind.hybrid):
        layer = Part("layer", index)
        for part in (layer, layer._replace(backward=True), layer._replace(backward=True, rerun=True)):
            if part in short[0]:
                curves[part] = extrapolate([trace[part] for trace in short], lengths, num_frames)
    return curves


def trace_step(args: TrainArgs, lm_kwargs: dict[str, Any], *, num_frames: int) -> Curves:
    """Run one step on fake tensors and take down the memory of each of its parts."""
    with fake_model(args, lm_kwargs) as model:
        tracker = StorageTracker()
        starts: list[tuple[Part, int]] = []
        created: list[tuple[int, int]] = []  # after so many operations, so many bytes of new gradient

        def mark(part: Part) -> None:
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
    history: list[tuple[str, int]], starts: list[tuple[Part, int]], created: list[tuple[int, int]]
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


def extrapolate(curves: Sequence[Curve], lengths: Sequence[int], num_frames: int) -> Curve:
    """The curve of a longer chunk from those of three short ones.

    Operation by operation bytes are a polynomial of degree 2 in the number of frames (attention masks are
    square). Operations up to the middle of the loop are matched from the start of a part, the others from
    its end; in between, a long loop repeats itself and memory lies between its values at both ends.

    Args:
        curves: of the same part, three.
        lengths: frames of each; whole mini-batches apart, like num_frames.
        num_frames: T of the longer chunk.
    """
    first = curves[0]
    if not first:
        return []
    middle = _middle_of_loop(first, curves[1])
    factors = _lagrange(lengths, num_frames)
    matched = [
        *zip(*(curve[:middle] for curve in curves), strict=True),
        *zip(*(curve[len(curve) - len(first) + middle :] for curve in curves), strict=True),
    ]
    return [
        Level(
            sum(factor * level.activations for factor, level in zip(factors, levels, strict=True)),
            sum(factor * level.gradients for factor, level in zip(factors, levels, strict=True)),
            levels[0].operation,
        )
        for levels in matched
    ]


def _middle_of_loop(short: Curve, longer: Curve) -> int:
    """An operation of `short` in the middle of what `longer` does more often."""
    prefix, suffix = _num_alike(short, longer), _num_alike(short[::-1], longer[::-1])
    return (prefix + len(short) - suffix) // 2


def _num_alike(first: Curve, second: Curve) -> int:
    """How many operations two curves begin with that are the same."""
    pairs = zip(first, second, strict=False)
    return next(
        (i for i, (a, b) in enumerate(pairs) if a.operation != b.operation), min(len(first), len(second))
    )


def _lagrange(points: Sequence[int], at: int) -> list[float]:
    """Weights of the values at these points in the value of their polynomial."""
    factors = []
    for i, point in enumerate(points):
        factor = 1.0
        for j, other in enumerate(points):
            if i != j:
                factor *= (at - other) / (point - other)
        factors.append(factor)
    return factors
