"""Simpler and other memories in the place of the TTT layer: is it learning that helps?

"Test-time training with key-value binding is secretly linear attention" (arXiv 2602.21204) reports that inner
gradient ascent, learning in the last inner layer alone and queries in the place of keys do as well. These are
those arms, two inner steps, and the gated delta rule (Yang et al. 2024, "Gated Delta Networks"), a memory of
the same size without an inner network. All but the gated delta rule are the layer with one thing changed.

They train and answer in one pass: what streams is the product's own layer alone.

Shapes: B batch rows, H heads, T tokens, D head_dim, E width of a head of the gated delta rule.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from torch import Tensor, nn

from moshi_ttt.config import TTTConfig
from moshi_ttt.format_utils import merge_heads, split_heads
from moshi_ttt.hybrid_model import hybrid_layers
from moshi_ttt.inner_loop import InnerLoop, InnerNetwork, TTTState, compute_dtype
from moshi_ttt.inputs.key_shift import no_keys, shift_keys
from moshi_ttt.ttt_layer import TTTLayer

_KEEP_AT_START = 4.0  # logit of what the gated delta rule keeps from token to token


class _LoopLayer(TTTLayer):
    """With another inner loop."""

    loop: Callable[..., InnerLoop]

    def inner_loop(self, *, detached: bool = False) -> InnerLoop:
        """See `TTTLayer`."""
        norm = self.ttt_norm_weight, self.ttt_norm_bias
        network = InnerNetwork(tuple(self.weights), tuple(self.biases), *norm)
        network = network.detached() if detached else network
        return type(self).loop(network, self.config.inner, dtype=compute_dtype(network.ln_weight))


class _LastLayerLoop(InnerLoop):
    def token_gradients(
        self, k: Tensor, v: Tensor, eta: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        inputs, gradients = super().token_gradients(k, v, eta, weights, biases)
        return inputs, (*(torch.zeros_like(g) for g in gradients[:-1]), gradients[-1])


class _TwoStepLoop(InnerLoop):
    """Every mini-batch is learned from once more before the next one starts."""

    def learn(self, k: Tensor, v: Tensor, eta: Tensor, state: TTTState) -> TTTState:
        if not state.num_pending:
            self._begun: list[tuple[Tensor, Tensor]] = []
        self._begun.append((v, eta))
        return super().learn(k, v, eta, state)

    def commit(self, state: TTTState) -> TTTState:
        keys = state.pending_inputs[0]
        v, eta = (torch.cat(parts, 2) for parts in zip(*self._begun, strict=True))
        again = super().learn(keys, v, eta, super().commit(state))
        return super().commit(again)


class Ascent(TTTLayer):
    """Inner steps up the gradient instead of down."""

    def inner_rate(self, x: Tensor) -> Tensor:
        """See `TTTLayer`; negative."""
        return -super().inner_rate(x)


class LastLayer(_LoopLayer):
    """Only the last inner layer learns."""

    loop = _LastLayerLoop


class TwoSteps(_LoopLayer):
    """Two inner steps per token."""

    loop = _TwoStepLoop


class QueriesForKeys(TTTLayer):
    """The memory stores under queries: one projection for both, from the first step to the last."""


class GatedDelta(TTTLayer):
    """`S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T`, read by `S_t q_t`; one matrix per head.

    Its heads are so wide that a matrix has as many numbers as the inner MLP. Keys, their shift and their
    tied start, norms and the gate are those of TTT; rates a and b are learned per head from the token.
    """

    def __init__(self, config: TTTConfig) -> None:
        super().__init__(config)
        dims = config.inner_dims(config.head_dim)
        numbers = sum(fan_in * fan_out + fan_out for fan_in, fan_out in pairwise(dims))
        self.width = math.ceil(math.sqrt(numbers))
        dim, inner = config.model_dim, config.num_heads * self.width
        for name in ("wq", "wk", "wv"):
            projection = nn.Linear(dim, inner)
            nn.init.normal_(projection.weight, std=dim**-0.5)
            nn.init.zeros_(projection.bias)
            setattr(self, name, projection)
        if config.tied_start:
            with torch.no_grad():
                self.wk.weight.copy_(self.wq.weight)
        self.wo = nn.Linear(inner, dim)
        nn.init.normal_(self.wo.weight, std=inner**-0.5)
        nn.init.zeros_(self.wo.bias)
        self.post_norm = nn.LayerNorm(inner)
        self.ttt_keep_weight = nn.Parameter(torch.zeros(config.num_heads, dim))
        self.ttt_keep_bias = nn.Parameter(torch.full((config.num_heads,), _KEEP_AT_START))
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        del self.ttt_norm_weight, self.ttt_norm_bias

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, dim]`, from an empty memory."""
        x = self._normalise_input(x)
        heads = self.config.num_heads
        q, k, v = (split_heads(project(x), heads) for project in (self.wq, self.wk, self.wv))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        v = F.layer_norm(v, v.shape[-1:])
        write = torch.sigmoid(F.linear(x, self.learnable_ttt_lr_weight, self.learnable_ttt_lr_bias)).mT
        keep = torch.sigmoid(F.linear(x, self.ttt_keep_weight, self.ttt_keep_bias)).mT  # [B, H, T]
        if self.config.key_shift:
            k, exists, _ = shift_keys(k, no_keys(k, self.config.key_shift), None)
            write = write * exists[:, None]
        memory = k.new_zeros(*k.shape[:2], self.width, self.width)  # [B, H, E of values, E of keys]
        outputs = []
        for t in range(x.shape[1]):
            key, query = k[:, :, t, :, None], q[:, :, t, :, None]
            memory = memory * keep[:, :, t, None, None]
            error = v[:, :, t, :, None] - memory @ key
            memory = memory + write[:, :, t, None, None] * error * key.mT
            outputs.append((memory @ query)[..., 0])
        return self.wo(self.post_norm(merge_heads(torch.stack(outputs, 2))))


VARIANTS: dict[str, type[TTTLayer]] = {
    "ascent": Ascent,
    "last-layer": LastLayer,
    "queries-for-keys": QueriesForKeys,
    "two-steps": TwoSteps,
    "gated-delta": GatedDelta,
}


def change_layers(lm: LMModel, variant: str) -> None:
    """Make the TTT layers of a model that does not stream another memory, in place."""
    kind = VARIANTS[variant]
    for layer in hybrid_layers(lm).values():
        if kind is GatedDelta:
            layer.ttt = GatedDelta(layer.ttt.config)
            continue
        if kind is QueriesForKeys:
            layer.ttt.wk = layer.ttt.wq
        layer.ttt.__class__ = kind
