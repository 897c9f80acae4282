"""How large things are inside the TTT layers, seen by hooks during a forward pass that is made anyway.

Shapes: B batch rows, H heads, D head_dim, S frames of a pass, T frames that are new in it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from moshi.models.lm import LMModel
from torch import Tensor, nn

from moshi_ttt.hybrid_model import hybrid_layers
from moshi_ttt.inner_loop import compute_dtype
from moshi_ttt.ttt_layer import TTTLayer, TTTRecord

_SMALLEST_WEIGHT = 1e-2  # of an inner LayerNorm that can be divided out


class LayerProbe:
    """Sizes of attention, TTT update, keys and targets of the forward passes made while it measures.

    Nothing waits for the device before `values` is called. Gradient checkpointing runs layers again in the
    backward pass, outside `measuring`, and that is not seen.
    """

    def __init__(self, model: LMModel) -> None:
        self._layers = hybrid_layers(model)
        self._values: dict[str, Tensor] = {}

    @contextmanager
    def measuring(self, enabled: bool = True) -> Iterator[None]:
        """Measure the forward passes inside, the last one counts. A recorder set before is called too."""
        if not enabled:
            yield
            return
        self._values.clear()
        with ExitStack() as stack:
            for index, layer in self._layers.items():
                recorder = partial(self._see_tokens, index, layer.ttt, layer.ttt.current.recorder)
                stack.enter_context(layer.ttt.passing(recorder=recorder))
                for handle in (
                    layer.layer_scale_1.register_forward_hook(partial(self._see_attention, index)),
                    layer.ttt.register_forward_hook(partial(self._see_update, index)),
                ):
                    stack.callback(handle.remove)
            yield

    def values(self) -> dict[str, float]:
        """What was measured, each as `<name>/layer_<i>`; empty before the first measurement.

        `attention_rms`: of attention's contribution to the residual stream; `ttt_rms`: of the TTT update
        after the gate; `ttt_over_attention`: their ratio; `ttt_amplification`: rms of the update before the
        gate over rms of the layer's input; `key_norm_min`, `key_norm_max`: means of the keys' norms, of the
        heads with the smallest and the largest; `target_std`: standard deviation of the reconstruction
        target over the channels, of the head with the smallest; `target_norm_error`: without weight and bias
        of the inner LayerNorm, mean distance of a token's rms from 1, of the head with the largest.
        """
        if not self._values:
            return {}
        numbers = torch.stack([value.float() for value in self._values.values()]).tolist()
        return dict(zip(self._values, numbers, strict=True))

    @torch.no_grad()
    def _see_attention(self, index: int, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self._values[f"attention_rms/layer_{index}"] = _rms(
            output, self._layers[index].ttt.current.token_mask
        )

    @torch.no_grad()
    def _see_update(self, index: int, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        layer = self._layers[index]
        mask = layer.ttt.current.token_mask
        # `forward` itself: what watches the gate shall see the pass, not this.
        gated = _rms(layer.forward_ssm_gating.forward(output), mask)
        attention = self._values[f"attention_rms/layer_{index}"]
        self._values[f"ttt_rms/layer_{index}"] = gated
        self._values[f"ttt_over_attention/layer_{index}"] = gated / attention
        self._values[f"ttt_amplification/layer_{index}"] = _rms(output, mask) / _rms(inputs[0], mask)

    @torch.no_grad()
    def _see_tokens(
        self, index: int, layer: TTTLayer, then: Callable[[TTTRecord], None] | None, record: TTTRecord
    ) -> None:
        k, v = record.k, record.v
        if record.frames is not None:  # a grid, with places that no frame of the pass fills
            k, v = (torch.take_along_dim(part, record.frames[:, None, :, None], 2) for part in (k, v))
        norms = _mean_by_head(torch.linalg.vector_norm(k, dim=-1), record.token_mask)
        target = v - k  # [B, H, T, D]
        std = _mean_by_head(target.std(-1, correction=0), record.token_mask)
        weight, bias = (part.to(target)[:, None] for part in (layer.ttt_norm_weight, layer.ttt_norm_bias))
        sizes = ((target - bias) / weight).square().mean(-1).sqrt()  # 1 for each token, where normalised
        errors = _mean_by_head((sizes - 1).abs(), record.token_mask)
        # What went through a weight of almost 0 cannot be divided back.
        errors = torch.where(weight.abs().amin((1, 2)) < _SMALLEST_WEIGHT, 0, errors)
        for name, value in (
            ("key_norm_min", norms.min()),
            ("key_norm_max", norms.max()),
            ("target_std", std.min()),
            ("target_norm_error", errors.max()),
        ):
            self._values[f"{name}/layer_{index}"] = value
        if then is not None:
            then(record)


def _rms(x: Tensor, mask: Tensor | None) -> Tensor:
    """Root mean square of `[B, S, dim]`, padded frames left out; a scalar on the device."""
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=compute_dtype(x))  # [B, S]
    squares = norms.square() / x.shape[-1]
    if mask is None:
        return squares.mean().sqrt()
    return torch.where(mask, squares, torch.nan).nanmean().sqrt()


def _mean_by_head(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over rows and frames of `[B, H, T]`, padded frames left out; `[H]`."""
    if mask is None:
        return x.mean((0, 2))
    return torch.where(mask[:, None], x, torch.nan).nanmean((0, 2))
