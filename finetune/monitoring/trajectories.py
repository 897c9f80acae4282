"""Inner-loop trajectories ("Figure 5" of the TTT paper): recorded while streaming, kept in files, summarised.

A trajectory is the inner reconstruction loss of every frame three times: with the fast weights `W0` that
the recording starts from, just before the frame's own step and just after it.

Shapes: B batch rows, H heads, T frames of a recording, t frames of a block.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from torch import Tensor

from finetune.errors import StateError
from finetune.files import finite_or_null
from moshi_ttt.files.state_file import StateFile, write_state_file
from moshi_ttt.hybrid_model import ttt_layers
from moshi_ttt.ttt_layer import TTTBlock

KIND = "moshi-ttt trajectories 1"
TREND_FRAMES = 1000  # trends are per so many frames
_PREFIX = "layer."


class StreamTrajectories:
    """The trajectories of a model that streams recordings, one per batch row.

    The frames may come in chunks of any length and one by one; the numbers are the same. Only results are
    kept, 12 bytes per frame, row and layer. A frame that teaches nothing has NaN: padding, and the first
    `key_shift` frames of a recording.

    Args:
        lm: a patched model.
    """

    def __init__(self, lm: LMModel) -> None:
        self._layers = ttt_layers(lm)
        self._rows: dict[int, dict[int, _Series]] = {index: {} for index in self._layers}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what streams inside, after what was recorded before. Not from a CUDA graph.

        The TTT layers take up to twice their time inside; outside they take what they always did.
        """
        with ExitStack() as stack:
            for index, layer in self._layers.items():
                stack.enter_context(layer.passing(stream_recorder=partial(self._record, index)))
            yield

    def losses(self, row: int = 0) -> dict[int, Tensor]:
        """Everything that a row has streamed while it was recorded, means over the heads.

        A row that does not execute streams nothing; one that is reset starts a new recording, whose frames
        follow.

        Returns:
            By layer, at `W0`, before and after the frame's own step: `[3, T]` on the CPU, float32 (float64
            of a float64 model).
        """
        return {
            index: rows[row].values() if row in rows else torch.zeros(3, 0)
            for index, rows in self._rows.items()
        }

    @torch.no_grad()
    def _record(self, index: int, block: TTTBlock) -> None:
        state = block.state
        for row, executes in enumerate(state.exec_mask.tolist()):
            if not executes:
                continue
            k, v, eta = (part[row : row + 1] for part in (block.k, block.v, block.eta))
            losses = state.inner.losses(k, v, eta, state.row(row))
            means = torch.stack([loss[0].mean(0) for loss in losses])  # [3, t]
            if block.token_mask is not None:
                means = torch.where(block.token_mask[row], means, torch.nan)
            self._rows[index].setdefault(row, _Series()).append(means.cpu())


class _Series:
    """Columns of three, one block after the other, in one tensor that grows by doubling."""

    def __init__(self) -> None:
        self._buffer = torch.zeros(3, 0)
        self._length = 0

    def append(self, block: Tensor) -> None:
        stop = self._length + block.shape[1]
        if stop > self._buffer.shape[1]:
            self._buffer = torch.cat([self.values(), block.new_zeros(3, stop)], 1)
        self._buffer[:, self._length : stop] = block
        self._length = stop

    def values(self) -> Tensor:
        return self._buffer[:, : self._length].clone()


class Trajectories(NamedTuple):
    """What a file holds."""

    losses: dict[int, Tensor]  # by layer, [3, T] float32
    facts: dict[str, Any]  # where they come from


def save_trajectories(path: str | Path, losses: Mapping[int, Tensor], *, facts: Mapping[str, Any]) -> None:
    """Write trajectories as safetensors; an older file of the kind is replaced.

    Args:
        path: of the file.
        losses: by layer, `[3, T]`.
        facts: where they come from (checkpoint, recording, …), a JSON object.

    Raises:
        StateError: it cannot be written, or another file is in its place.
    """
    tensors = {f"{_PREFIX}{index}": part.float() for index, part in losses.items()}
    write_state_file(path, tensors, kind=KIND, identity=facts)


def load_trajectories(path: str | Path) -> Trajectories:
    """Read what `save_trajectories` wrote, layers in order.

    Raises:
        StateError: the file is missing, damaged or something else.
    """
    file = StateFile(path, kind=KIND)
    losses = {}
    for name, tensor in file.read().items():
        number = name.removeprefix(_PREFIX)
        if not number.isdecimal() or tensor.dim() != 2 or len(tensor) != 3:
            raise StateError(f"{path}: {name} {list(tensor.shape)} is no trajectory of a layer.")
        losses[int(number)] = tensor.float()
    return Trajectories(dict(sorted(losses.items())), file.identity)


@dataclass(frozen=True)
class TrajectorySummary:
    """What a trajectory comes to; shares are of the frames counted, NaN where there is none.

    Attributes:
        num_frames: counted.
        num_excluded: left out, because one of their losses is not finite or they teach nothing.
        share_ordered: of frames with W0 > before > after, strictly.
        share_below_w0: of frames with W0 > before: the memory helps.
        share_step_helps: of frames with before > after: the frame's own step helps.
        loss_w0, loss_before, loss_after: means.
        gain_over_w0: mean of W0 - before.
        gain_per_step: mean of before - after.
        trend_before: slope of the loss before the step, per 1,000 frames; NaN with less than two frames.
        trend_gain: slope of W0 - before, per 1,000 frames.
    """

    num_frames: int
    num_excluded: int
    share_ordered: float
    share_below_w0: float
    share_step_helps: float
    loss_w0: float
    loss_before: float
    loss_after: float
    gain_over_w0: float
    gain_per_step: float
    trend_before: float
    trend_gain: float

    def to_json(self) -> dict[str, float | None]:
        """For a JSON file: null where there is no such number."""
        return {name: finite_or_null(value) for name, value in asdict(self).items()}


def summarise(losses: Tensor) -> TrajectorySummary:
    """Summarise a trajectory `[3, T]`: at `W0`, before and after the frame's own step."""
    finite = losses.isfinite().all(0)
    counted = losses.double()[:, finite]
    at_w0, before, after = counted
    helps, step_helps = at_w0 > before, before > after
    positions = torch.arange(losses.shape[1], dtype=torch.float64)[finite.cpu()]
    means = counted.mean(1).tolist()
    return TrajectorySummary(
        num_frames=counted.shape[1],
        num_excluded=losses.shape[1] - counted.shape[1],
        share_ordered=(helps & step_helps).double().mean().item(),
        share_below_w0=helps.double().mean().item(),
        share_step_helps=step_helps.double().mean().item(),
        loss_w0=means[0],
        loss_before=means[1],
        loss_after=means[2],
        gain_over_w0=(at_w0 - before).mean().item(),
        gain_per_step=(before - after).mean().item(),
        trend_before=_slope(positions, before) * TREND_FRAMES,
        trend_gain=_slope(positions, at_w0 - before) * TREND_FRAMES,
    )


def mean_trajectories(recordings: Sequence[Mapping[int, Tensor]]) -> dict[int, Tensor]:
    """By layer, the mean of each frame over the recordings that have it, `[3, T]` of the longest one."""
    means = {}
    for index in recordings[0]:
        losses = [layers[index] for layers in recordings]
        length = max(part.shape[1] for part in losses)
        rows = [F.pad(part, (0, length - part.shape[1]), value=math.nan) for part in losses]
        means[index] = torch.stack(rows).nanmean(0)
    return means


def summary_lines(summaries: Mapping[int, TrajectorySummary]) -> list[str]:
    """A table for the terminal, one line per layer."""
    head = (
        f"{'layer':>5} {'frames':>8} {'left out':>8} {'W0>before>after':>15} {'W0>before':>9} "
        f"{'before>after':>12} {'loss W0':>8} {'before':>8} {'W0-before':>9} {'before-after':>12} "
        f"{'before/1000':>11} {'gain/1000':>9}"
    )
    lines = [
        f"{index:>5} {s.num_frames:>8,} {s.num_excluded:>8,} {s.share_ordered:>15.2%} "
        f"{s.share_below_w0:>9.2%} {s.share_step_helps:>12.2%} {s.loss_w0:>8.3f} {s.loss_before:>8.3f} "
        f"{s.gain_over_w0:>9.3f} {s.gain_per_step:>12.3g} {s.trend_before:>+11.3f} {s.trend_gain:>+9.3f}"
        for index, s in summaries.items()
    ]
    return [head, *lines]


def _slope(x: Tensor, y: Tensor) -> float:
    """Of the least-squares line; NaN where there is none."""
    if len(x) < 2:
        return math.nan
    x = x - x.mean()
    return ((x @ (y - y.mean())) / (x @ x)).item()
