"""The TTT layer: projections, inner learning rate, normalisation and initialisation around the inner loop.

Shapes: B batch rows, T frames, H heads, D head_dim, dim = H * D, C mini_batch_size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from moshi.modules.streaming import StreamingModule
from torch import Tensor, nn

from moshi_ttt.backends import compiled
from moshi_ttt.carry import NewFrames, TTTCarry, frames_after, run_carried
from moshi_ttt.config import TTTConfig
from moshi_ttt.format_utils import merge_heads, split_heads
from moshi_ttt.inner_loop import InnerLoop, InnerNetwork, TTTState, compute_dtype
from moshi_ttt.inputs.key_shift import HeardKeys, no_keys, shift_keys
from moshi_ttt.inputs.rope import apply_rope
from moshi_ttt.streaming import TTTStreamingState, stream_blocks

_PRE_NORM_EPS = 1e-8  # as Moshi's rms_norm_f32
_POST_NORM_EPS = 1e-6  # as published
_INIT_STD = 0.02  # as published


class _Factory(TypedDict):
    device: torch.device | str | None
    dtype: torch.dtype | None


class InnerInputs(NamedTuple):
    """What the inner loop receives, in at least float32."""

    q: Tensor  # [B, H, T, D], unit norm
    k: Tensor  # [B, H, T, D], unit norm
    v: Tensor  # [B, H, T, D], the normalised reconstruction target plus k
    eta: Tensor  # [B, H, T], 0 where a frame teaches nothing


class PreparedFrames(NamedTuple):
    """Frames on their way into the inner loop."""

    tokens: InnerInputs
    token_mask: Tensor | None  # [B, T], False where a frame teaches nothing; None means all True
    heard: HeardKeys | None  # the keys that frames still to come need; None without key shift


class TTTRecord(NamedTuple):
    """What a recorder sees of one forward pass, detached. G frames: those of the pass, or of its grid."""

    k: Tensor  # [B, H, G, D], mini-batches aligned to the first
    v: Tensor  # [B, H, G, D]
    eta: Tensor  # [B, H, G]
    start: TTTState | None  # where the first of them was met; None: at W0
    frames: Tensor | None  # [B, T], where the frames of the pass are among the G; None: they are the same
    state: TTTState  # after the last frame
    update: Tensor  # [B, T, dim], before the gate
    token_mask: Tensor | None  # [B, T]


class TTTBlock(NamedTuple):
    """What a recorder sees of t streamed frames, at most C, just before they are learnt from."""

    k: Tensor  # [B, H, t, D]
    v: Tensor  # [B, H, t, D]
    eta: Tensor  # [B, H, t]
    state: TTTStreamingState  # as the block finds it: the live one, only to be read
    token_mask: Tensor | None  # [B, t]


@dataclass(frozen=True)
class TTTPass:
    """What forward passes are given beside their input, see `TTTLayer.passing`.

    Attributes:
        token_mask: `[B, T]`, False where a frame is padding and teaches nothing; None means all True.
        carry: memory that a pass outside streaming goes on from; None: it starts at `W0`. It stays as it is,
            so that gradient checkpointing can run the pass again.
        new_frames: which frames of that pass are learned from and part of the next carry; the others only
            read what the carry holds. None: all.
        keep_carry: called with the memory after that pass, for the next chunk of the same recordings; twice
            with equal values where gradient checkpointing runs the pass again.
        recorder: called with a `TTTRecord` at the end of a pass outside streaming.
        stream_recorder: called with a `TTTBlock` before each block of streamed frames. Not from a CUDA graph:
            a graph replays what it captured, and that does not include the call.
    """

    token_mask: Tensor | None = None
    carry: TTTCarry | None = None
    new_frames: NewFrames | None = None
    keep_carry: Callable[[TTTCarry], None] | None = None
    recorder: Callable[[TTTRecord], None] | None = None
    stream_recorder: Callable[[TTTBlock], None] | None = None


class TTTLayer(StreamingModule[TTTStreamingState]):
    """An MLP per head that learns while it listens (TTT-MLP, Sun et al. 2024; Dalal et al. 2025).

    Args:
        config: every architectural choice.
        device, dtype: of the parameters. The inner loop computes in at least float32 regardless.

    Attributes:
        frozen: the inner rate is 0, so that the fast weights stay at `W0`.
        current: what the forward passes of now are given beside their input.
    """

    def __init__(
        self, config: TTTConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        factory: _Factory = {"device": device, "dtype": dtype}
        dim, num_heads, head_dim = config.model_dim, config.num_heads, config.head_dim
        self.pre_norm = nn.RMSNorm(dim, eps=_PRE_NORM_EPS, **factory) if config.pre_norm else None
        self.wq = nn.Linear(dim, dim, **factory)
        self.wk = nn.Linear(dim, dim, **factory)
        self.wv = nn.Linear(dim, dim, **factory)
        self.wo = nn.Linear(dim, dim, **factory)
        self.learnable_ttt_lr_weight = nn.Parameter(torch.empty(num_heads, dim, **factory))
        self.learnable_ttt_lr_bias = nn.Parameter(torch.empty(num_heads, **factory))
        self.ttt_norm_weight = nn.Parameter(torch.empty(num_heads, head_dim, **factory))
        self.ttt_norm_bias = nn.Parameter(torch.empty(num_heads, head_dim, **factory))
        dims = config.inner_dims(head_dim)
        self.weights = nn.ParameterList(
            torch.empty(num_heads, fan_in, fan_out, **factory) for fan_in, fan_out in pairwise(dims)
        )
        self.biases = nn.ParameterList(torch.empty(num_heads, 1, fan_out, **factory) for fan_out in dims[1:])
        self.post_norm = nn.LayerNorm(dim, eps=_POST_NORM_EPS, **factory)
        self._largest_rate = config.ttt_base_lr * config.inner_rate_unit
        self.frozen = False
        self.current = TTTPass()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh initial values from the global random generator."""
        for linear in (self.wq, self.wk, self.wv, self.wo):
            nn.init.normal_(linear.weight, std=self._projection_std())
            nn.init.zeros_(linear.bias)
        if self.config.tied_start:
            self.wk.weight.copy_(self.wq.weight)
        nn.init.normal_(self.learnable_ttt_lr_weight, std=_INIT_STD)
        nn.init.zeros_(self.learnable_ttt_lr_bias)
        nn.init.ones_(self.ttt_norm_weight)
        nn.init.zeros_(self.ttt_norm_bias)
        for index, weight in enumerate(self.weights):
            nn.init.normal_(weight, std=self._inner_std(index))
        for bias in self.biases:
            nn.init.zeros_(bias)
        self.post_norm.reset_parameters()
        if self.pre_norm is not None:
            self.pre_norm.reset_parameters()

    def _projection_std(self) -> float:
        # 0.02 is about dim ** -0.5 of the model that it was published with (3,072). In a narrow model it is
        # too little: updates are faint, and steps of AdamW are large beside such weights.
        return _INIT_STD if self.config.inner_init == "published" else self.config.model_dim**-0.5

    def _inner_std(self, index: int) -> float:
        if self.config.inner_init == "published":
            return _INIT_STD
        # Keys have unit norm, so N(0, 1) gives the first layer's pre-activations unit variance.
        return 1.0 if index == 0 else self.weights[index].shape[1] ** -0.5

    @contextmanager
    def passing(self, **given: Any) -> Iterator[None]:
        """Give the forward passes inside something beside their input.

        Contexts nest: each changes what it names and leaves the rest as it was around it.

        Args:
            given: attributes of `TTTPass`.
        """
        outer = self.current
        self.current = replace(outer, **given)
        try:
            yield
        finally:
            self.current = outer

    def forward(self, x: Tensor) -> Tensor:
        """The update of the residual stream, before the gate. `[B, T, dim]` in the dtype of x.

        While streaming, the fast weights of the streaming state go on learning; otherwise every call
        starts at `W0`, or at the carry that it is given (`passing`). Where a streaming row is no longer
        finite, it starts again at `W0` and the update of the frame is 0.
        """
        state = self._streaming_state
        if state is not None:
            return self._stream(x, state)
        if self.current.carry is not None:
            return self._go_on(x, self.current.carry)
        positions = torch.arange(x.shape[1], device=x.device)[None] % self.config.mini_batch_size
        frames = self.prepare(x, positions, self.current.token_mask)
        out, last_state = self.inner_loop().run(frames.tokens, None)
        update = self._project_out(out, x.dtype)
        if self.current.recorder is not None:
            self._record(frames.tokens[1:], last_state, update, frames.token_mask)
        return update

    def inner_loop(self, *, detached: bool = False) -> InnerLoop:
        """The inner loop with the weights of now.

        Args:
            detached: without gradients for them.
        """
        norm = self.ttt_norm_weight, self.ttt_norm_bias
        network = InnerNetwork(tuple(self.weights), tuple(self.biases), *norm)
        network = network.detached() if detached else network
        return InnerLoop(network, self.config.inner, dtype=compute_dtype(network.ln_weight))

    def _go_on(self, x: Tensor, carry: TTTCarry) -> Tensor:
        """The same from carried memory, whose successor is handed on."""
        mask, new = self.current.token_mask, self.current.new_frames
        if new is None:
            return self._learn_on(x, carry, mask)
        others = self._read(new.others(x), carry, before=new.first)
        return new.join(self._learn_on(new.of(x), carry, None if mask is None else new.of(mask)), others)

    def _read(self, x: Tensor, carry: TTTCarry, *, before: Sequence[int]) -> Tensor:
        """The updates of frames that the memory does not learn from, `[B, L, dim]`.

        Args:
            before: frames of each row that come right before the new ones; the rest follows after all.
        """
        starts = [pending - frames for pending, frames in zip(carry.num_pending, before, strict=True)]
        positions = frames_after(starts, x.shape[1], x.device) % self.config.mini_batch_size
        q, k, v, eta = self.prepare(x, positions).tokens
        tokens = (q, k, v, torch.zeros_like(eta))
        with torch.autocast(x.device.type, enabled=False):
            run = run_carried(self.inner_loop(), tokens, carry)
        return self._project_out(run.out, x.dtype)

    def _learn_on(self, x: Tensor, carry: TTTCarry, token_mask: Tensor | None) -> Tensor:
        config = self.config
        positions = frames_after(carry.num_pending, x.shape[1], x.device) % config.mini_batch_size
        frames = self.prepare(x, positions, token_mask, heard=carry.heard)
        with torch.autocast(x.device.type, enabled=False):
            run = run_carried(self.inner_loop(), frames.tokens, carry, heard=frames.heard)
        if self.current.keep_carry is not None:
            self.current.keep_carry(run.carry)
        update = self._project_out(run.out, x.dtype)
        if self.current.recorder is not None:
            self._record(run.grid, run.state, update, frames.token_mask, start=run.start, frames=run.frames)
        return update

    def prepare(
        self,
        x: Tensor,
        positions: Tensor,
        token_mask: Tensor | None = None,
        *,
        heard: HeardKeys | None = None,
    ) -> PreparedFrames:
        """Queries, keys, targets and inner rates of frames x.

        Args:
            x: `[B, T, dim]`.
            positions: of the frames in their mini-batch, `[B, T]` or `[1, T]`.
            token_mask: `[B, T]`, False where a frame is not heard; None means all True.
            heard: the keys of the frames before; None where a recording starts.
        """
        joined = self._joined(x)
        x = joined(TTTLayer._normalise_input)(self, x)
        projected = self.wq(x), self.wk(x), self.wv(x)
        with torch.autocast(x.device.type, enabled=False):
            return joined(TTTLayer._inner_inputs)(self, x, projected, positions, token_mask, heard)

    def _joined(self, x: Tensor) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """What makes few kernels of many in a training pass, where the operator has kernels made too."""
        trains = torch.is_grad_enabled() and self._streaming_state is None
        return compiled if trains and self.inner_loop().compiles(x) else _as_it_stands

    def _inner_inputs(
        self,
        x: Tensor,
        projected: tuple[Tensor, Tensor, Tensor],
        positions: Tensor,
        token_mask: Tensor | None,
        heard: HeardKeys | None,
    ) -> PreparedFrames:
        """From the normalised input x and its projections, all `[B, T, dim]`, to the inner loop."""
        config = self.config
        dtype = compute_dtype(x)
        q, k, v = (split_heads(part.to(dtype), config.num_heads) for part in projected)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if config.key_shift:
            heard = no_keys(k, config.key_shift) if heard is None else heard
            k, exists, heard = shift_keys(k, heard, token_mask)
            token_mask = exists if token_mask is None else token_mask & exists
        eta = self.inner_rate(x.to(dtype))
        if token_mask is not None:
            eta = eta * token_mask[:, None]
        if config.use_rope:
            q, k = (apply_rope(part, positions, theta=config.rope_theta) for part in (q, k))
        tokens = InnerInputs(q, k, self.reconstruction_target(k, v), eta)
        return PreparedFrames(tokens, token_mask, heard)

    def reconstruction_target(self, k: Tensor, v: Tensor) -> Tensor:
        """`LN(v - k) * w + b + k` with the inner LayerNorm's w and b, biased variance. `[B, H, T, D]`."""
        normed = F.layer_norm(v - k, (self.config.head_dim,), eps=self.config.eps)
        weight, bias = self.ttt_norm_weight[:, None], self.ttt_norm_bias[:, None]  # [H, 1, D]
        return normed * weight.to(normed) + bias.to(normed) + k

    def inner_rate(self, x: Tensor) -> Tensor:
        """`base_lr * sigmoid(x . w_h + c_h)` in the unit of `base_lr_scale`, 0 when frozen.

        `[B, T, dim]` to `[B, H, T]`.
        """
        weight, bias = self.learnable_ttt_lr_weight.to(x), self.learnable_ttt_lr_bias.to(x)
        rate = torch.sigmoid(F.linear(x, weight, bias)).transpose(1, 2)
        rate = rate * self._largest_rate
        return torch.zeros_like(rate) if self.frozen else rate

    def _normalise_input(self, x: Tensor) -> Tensor:
        if self.pre_norm is not None:
            dtype = compute_dtype(x)
            weight = self.pre_norm.weight.to(dtype)
            x = F.rms_norm(x.to(dtype), (x.shape[-1],), weight, _PRE_NORM_EPS)
        return x.to(self.wq.weight.dtype)

    def _project_out(self, out: Tensor, dtype: torch.dtype) -> Tensor:
        return self.wo(self._joined(out)(TTTLayer._normalise_output)(self, out)).to(dtype)

    def _normalise_output(self, out: Tensor) -> Tensor:
        out, norm = merge_heads(out), self.post_norm
        weight, bias = norm.weight.to(out.dtype), norm.bias.to(out.dtype)
        out = F.layer_norm(out, (out.shape[-1],), weight, bias, _POST_NORM_EPS)
        return out.to(self.wo.weight.dtype)

    def _record(
        self,
        tokens: tuple[Tensor, Tensor, Tensor],
        state: TTTState,
        update: Tensor,
        token_mask: Tensor | None,
        *,
        start: TTTState | None = None,
        frames: Tensor | None = None,
    ) -> None:
        assert self.current.recorder is not None
        k, v, eta = (part.detach() for part in tokens)
        self.current.recorder(
            TTTRecord(
                k,
                v,
                eta,
                None if start is None else _detached(start),
                frames,
                _detached(state),
                update.detach(),
                token_mask,
            )
        )

    def _stream(self, x: Tensor, state: TTTStreamingState) -> Tensor:
        frames = torch.arange(x.shape[1], device=x.device)
        positions = (state.offsets[:, None] + frames) % self.config.mini_batch_size
        mask = state.heard_frames(self.current.token_mask, x.shape[1])
        prepared = self.prepare(x, positions, mask, heard=state.heard)
        before_block = None
        if self.current.stream_recorder is not None:
            before_block = partial(self._record_block, prepared, state)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if prepared.heard is not None:
                state.hear(prepared.heard)
            out, finite = stream_blocks(state, prepared.tokens, before_block=before_block)
        return torch.where(finite[:, :, None], self._project_out(out, x.dtype), 0)

    def _record_block(self, prepared: PreparedFrames, state: TTTStreamingState, frames: slice) -> None:
        assert self.current.stream_recorder is not None
        k, v, eta = (part[:, :, frames] for part in prepared.tokens[1:])
        mask = prepared.token_mask
        mask = None if mask is None else mask[:, frames]
        self.current.stream_recorder(TTTBlock(k, v, eta, state, mask))

    def _init_streaming_state(self, batch_size: int) -> TTTStreamingState:
        if not self.config.causal:
            raise ValueError(
                "A TTT layer with causal=False reads the future of its mini-batch and cannot stream."
            )
        inner = self.inner_loop(detached=True)
        return TTTStreamingState(batch_size, self.wq.weight.device, inner, self.config.key_shift)


def _as_it_stands(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _detached(state: TTTState) -> TTTState:
    return TTTState(*(tuple(part.detach() for part in parts) for parts in state))
