"""What the TTT layers do: gates, inner losses, fast weights.

How large things are inside them, `finetune.diagnose.layer_probe` measures.

Shapes: B batch rows, H heads, T frames.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from finetune.sharding import full_tensor
from moshi_ttt.hybrid_model import hybrid_layers, ttt_layers
from moshi_ttt.ttt_layer import TTTLayer, TTTRecord


class GateMonitor:
    """Gates of a model and how far they have moved since it was built.

    Args:
        model: a patched model at its start. Where it is sharded, every process has a monitor and asks it.

    Attributes:
        start: the gates then, by layer.
    """

    def __init__(self, model: LMModel) -> None:
        self._gates = {
            index: layer.forward_ssm_gating.gating_alpha for index, layer in hybrid_layers(model).items()
        }
        self.start = {index: full_tensor(gate.detach()).clone() for index, gate in self._gates.items()}

    def metrics(self) -> dict[str, float]:
        """`gate_opening` (mean |tanh alpha|), and beside it what says less, since channels differ in sign.

        That is `ttt_alpha` (mean tanh alpha), `ttt_raw` (mean alpha) and `ttt_delta` (mean |alpha - start|).
        Over all layers, and for each layer as `gate_opening/layer_<i>`, there with `ttt_alpha_min` and
        `ttt_alpha_max` of tanh alpha too. Read from the float32 masters.
        """
        per_layer: dict[str, float] = {}
        names = ("gate_opening", "ttt_alpha", "ttt_raw", "ttt_delta")
        overall: dict[str, list[float]] = {name: [] for name in names}
        for index, gate in self._gates.items():
            alpha = full_tensor(gate.detach()).float()
            opened = torch.tanh(alpha)
            delta = (alpha - self.start[index].float()).abs().mean()
            means = (opened.abs().mean(), opened.mean(), alpha.mean(), delta)
            *values, low, high = torch.stack([*means, opened.min(), opened.max()]).tolist()
            for name, value in zip(names, values, strict=True):
                overall[name].append(value)
                per_layer[f"{name}/layer_{index}"] = value
            per_layer[f"ttt_alpha_min/layer_{index}"] = low
            per_layer[f"ttt_alpha_max/layer_{index}"] = high
        over_layers = {name: sum(values) / len(values) for name, values in overall.items() if values}
        return over_layers | per_layer


class InnerLoopRecorder:
    """Inner losses and fast-weight norms of the forward passes made while it records."""

    def __init__(self, model: LMModel) -> None:
        self._layers = ttt_layers(model)
        self._losses: dict[int, Tensor] = {}  # layer: [3, T], at W0, before and after the own step
        self._norms: dict[int, tuple[float, float]] = {}
        self._finite: dict[int, bool] = {}

    @contextmanager
    def recording(self, enabled: bool = True) -> Iterator[None]:
        """Record the forward passes inside, the last one counts."""
        with ExitStack() as stack:
            if enabled:
                for index, layer in self._layers.items():
                    stack.enter_context(layer.passing(recorder=partial(self._record, index, layer)))
            yield

    def clear(self) -> None:
        """Forget what was recorded."""
        for records in (self._losses, self._norms, self._finite):
            records.clear()

    def metrics(self) -> dict[str, float]:
        """`inner_loss_before`, `inner_loss_after`, `fast_weight_norm`, `fast_weight_change` per layer.

        Losses are means over rows, heads and frames, just before and just after each frame's own step;
        the norm is that of the fast weights after the last frame, the change is relative to `W0`.
        """
        values = {}
        for index, losses in self._losses.items():
            _, before, after = losses.nanmean(1).tolist()
            norm, change = self._norms[index]
            values[f"inner_loss_before/layer_{index}"] = before
            values[f"inner_loss_after/layer_{index}"] = after
            values[f"fast_weight_norm/layer_{index}"] = norm
            values[f"fast_weight_change/layer_{index}"] = change
        return values

    def trajectories(self) -> dict[int, Tensor]:
        """Inner losses per layer and frame, `[3, T]`: at `W0`, before and after the frame's own step."""
        return dict(self._losses)

    def layers_not_finite(self) -> list[int]:
        """Layers whose fast weights or update were not finite in the last recorded pass."""
        return [index for index, finite in self._finite.items() if not finite]

    @torch.no_grad()
    def _record(self, index: int, layer: TTTLayer, record: TTTRecord) -> None:
        state = record.state
        losses: tuple[Tensor, ...] = layer.inner_loop().losses(record.k, record.v, record.eta, record.start)
        if record.frames is not None:
            losses = tuple(torch.take_along_dim(loss, record.frames[:, None], 2) for loss in losses)
        self._losses[index] = torch.stack([_mean_over_rows(loss, record.token_mask) for loss in losses]).cpu()
        now = torch.stack([w.square().sum((1, 2, 3)) for w in state.weights]).sum(0).sqrt()
        change = torch.stack(
            [(w - w0).square().sum((1, 2, 3)) for w, w0 in zip(state.weights, layer.weights, strict=True)]
        )
        start = torch.stack([w0.float().square().sum() for w0 in layer.weights]).sum().sqrt()
        norms = torch.stack([now.mean(), change.sum(0).sqrt().mean() / start])
        finite = norms.isfinite().all() & record.update.isfinite().all()
        self._norms[index] = tuple(norms.tolist())
        self._finite[index] = bool(finite)


def _mean_over_rows(losses: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over rows and heads of `[B, H, T]`, padded frames left out; `[T]`, NaN where all are padded."""
    per_row = losses.mean(1)
    if mask is None:
        return per_row.mean(0)
    return torch.where(mask, per_row, torch.nan).nanmean(0)
