"""The state and the inner steps of the TTT-MLP, shared by the operator and by streaming.

What starts with a mini-batch goes through `moshi_ttt.manual` or `moshi_ttt.fused` where the backend says so;
begun mini-batches, what is shorter than one, and all with the backend `autograd`, through the methods here.

Within a mini-batch the token gradients are all taken at the fast weights the mini-batch started from, so
what token i reads, `x W - sum_{j<=i} eta_j (x . X_j + 1) G_j`, needs no weight per token. The inner rate
eta folds into the gradients once.

Shapes: B batch rows, H heads, t tokens of one mini-batch, D head_dim, P pending tokens of a half-finished
mini-batch.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from moshi_ttt.backends import Chosen, choose_backend, compiles
from moshi_ttt.config import InnerSettings
from moshi_ttt.fused.function import run_fused
from moshi_ttt.manual import run_manual

# q, k, v and eta, of a sequence and of t tokens of it
Tokens = tuple[
    Float[Tensor, "B H T D"], Float[Tensor, "B H T D"], Float[Tensor, "B H T D"], Float[Tensor, "B H T"]
]
Block = tuple[
    Float[Tensor, "B H t D"], Float[Tensor, "B H t D"], Float[Tensor, "B H t D"], Float[Tensor, "B H t"]
]


def compute_dtype(x: Tensor) -> torch.dtype:
    """float32, or the dtype of x where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


class InnerNetwork(NamedTuple):
    """The inner MLP before the first token, `W0`, and its LayerNorm: what the outer loop trains."""

    weights: tuple[Float[Tensor, "H in_l out_l"], ...]  # of layer l
    biases: tuple[Float[Tensor, "H 1 out_l"], ...]
    ln_weight: Float[Tensor, "H D"]
    ln_bias: Float[Tensor, "H D"]

    def detached(self) -> "InnerNetwork":
        """The same without gradients."""
        weights, biases = (tuple(x.detach() for x in part) for part in (self.weights, self.biases))
        return InnerNetwork(weights, biases, self.ln_weight.detach(), self.ln_bias.detach())


class TTTState(NamedTuple):
    """Fast weights of one TTT layer, at least float32, one set per batch row.

    A mini-batch may be half finished: its steps so far are kept as the inputs `X_l` and the gradients
    `eta * G_l` of each inner layer, because the tokens still to come take their gradients at the weights
    the mini-batch started from.
    """

    start_weights: tuple[Float[Tensor, "B H in_l out_l"], ...]  # of layer l
    start_biases: tuple[Float[Tensor, "B H 1 out_l"], ...]
    pending_inputs: tuple[Float[Tensor, "B H P in_l"], ...]
    pending_gradients: tuple[Float[Tensor, "B H P out_l"], ...]

    @property
    def num_pending(self) -> int:
        """Tokens of the half-finished mini-batch, less than mini_batch_size."""
        return self.pending_inputs[0].shape[2]

    @property
    def weights(self) -> tuple[Float[Tensor, "B H _ _"], ...]:
        """Fast weights after the last token, layer l: `[B, H, in_l, out_l]`."""
        return tuple(
            w - x.mT @ g
            for w, x, g in zip(self.start_weights, self.pending_inputs, self.pending_gradients, strict=True)
        )

    @property
    def biases(self) -> tuple[Float[Tensor, "B H 1 _"], ...]:
        """Fast biases after the last token, layer l: `[B, H, 1, out_l]`."""
        return tuple(
            b - g.sum(2, keepdim=True) for b, g in zip(self.start_biases, self.pending_gradients, strict=True)
        )


def initial_state(
    weights: Sequence[Float[Tensor, "H _ _"]], biases: Sequence[Float[Tensor, "H 1 _"]], batch_size: int
) -> TTTState:
    """The state before the first token: `W0`, the same for every row, nothing pending."""
    dtype = compute_dtype(weights[0])
    start_weights = tuple(w.to(dtype).expand(batch_size, *w.shape) for w in weights)
    start_biases = tuple(b.to(dtype).expand(batch_size, *b.shape) for b in biases)
    num_heads = weights[0].shape[0]
    return TTTState(
        start_weights,
        start_biases,
        tuple(w.new_zeros(batch_size, num_heads, 0, w.shape[1], dtype=dtype) for w in weights),
        tuple(w.new_zeros(batch_size, num_heads, 0, w.shape[2], dtype=dtype) for w in weights),
    )


def lower_triangle(
    steps: Float[Tensor, "B H P _"], queries: Float[Tensor, "B H t _"], *, diagonal: int
) -> Bool[Tensor, "t P"]:
    """Query i sees step j where j <= i + diagonal."""
    shape = (queries.shape[2], steps.shape[2])
    return torch.ones(shape, dtype=torch.bool, device=steps.device).tril(diagonal)


class InnerLoop:
    """One TTT-MLP with its `W0` and settings; every method is a pure function of its arguments.

    Args:
        network: `W0` and the inner LayerNorm.
        settings: of the inner loop.
        dtype: of the computation, at least float32.
    """

    def __init__(self, network: InnerNetwork, settings: InnerSettings, *, dtype: torch.dtype) -> None:
        self.settings = settings
        self.dtype = dtype
        self.weights = [w.to(dtype) for w in network.weights]
        self.biases = [b.to(dtype) for b in network.biases]
        self.ln_weight = network.ln_weight.to(dtype)[:, None]  # [H, 1, D]
        self.ln_bias = network.ln_bias.to(dtype)[:, None]  # [H, 1, D]

    def run(self, tokens: Tokens, state: TTTState | None) -> tuple[Float[Tensor, "B H T D"], TTTState]:
        """Learn from and answer a sequence of any length, see `moshi_ttt.ops.ttt_mlp_with_states`.

        Args:
            tokens: xq, xk, xv `[B, H, T, D]` and eta `[B, H, T]`, of any dtype.
            state: None starts at `W0`.

        Returns:
            Outputs `[B, H, T, D]` in the dtype of the computation, and the state after the last token.
        """
        batch_size, _, num_tokens, _ = tokens[0].shape
        if state is None:
            state = initial_state(self.weights, self.biases, batch_size)
        if state.num_pending and not self.settings.causal:
            raise ValueError(
                f"A non-causal sequence cannot continue inside a mini-batch ({state.num_pending} tokens are "
                "pending): end chunks at multiples of mini_batch_size, or use causal=True."
            )
        settings = replace(self.settings, backend=self._backend(tokens[0]))
        mini_batch_size = settings.mini_batch_size
        outputs = []
        start = 0
        with torch.autocast(tokens[0].device.type, enabled=False):
            q, k, v, eta = (x.to(self.dtype) for x in tokens)
            tokens = (q, k, v, eta)
            while start < num_tokens:
                stop = min(start + mini_batch_size - state.num_pending, num_tokens)
                has_full = num_tokens - start >= mini_batch_size
                if settings.backend != "autograd" and not state.num_pending and has_full:
                    stop = num_tokens
                    out, state = self._advance_by_hand(_between(tokens, start, stop), state, settings)
                else:
                    out, state = self.advance(*_between(tokens, start, stop), state)
                    if state.num_pending == mini_batch_size:
                        state = self.commit(state)
                outputs.append(out)
                start = stop
        return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0], state

    def compiles(self, tokens: Tensor) -> bool:
        """Whether its backend for tokens on this device is one around which compiling pays."""
        return compiles(self._backend(tokens), tokens)

    def _backend(self, tokens: Tensor) -> Chosen:
        settings = self.settings
        return choose_backend(
            settings.backend,
            tokens.new_empty(0, dtype=self.dtype),
            dims=[self.weights[0].shape[-2], *(w.shape[-1] for w in self.weights)],
            mini_batch_size=settings.mini_batch_size,
            inner_grad_clip=settings.inner_grad_clip,
            state_decay=settings.state_decay,
        )

    def _advance_by_hand(
        self, tokens: Tokens, state: TTTState, settings: InnerSettings
    ) -> tuple[Float[Tensor, "B H T D"], TTTState]:
        """From the start of a mini-batch to anywhere; the settings say by which backend."""
        run = run_fused if settings.backend == "fused" else run_manual
        out, learned = run(
            tokens,
            state.start_weights,
            state.start_biases,
            self.ln_weight,
            self.ln_bias,
            settings,
        )
        k = tokens[1]
        tail = k.shape[2] - k.shape[2] % settings.mini_batch_size
        inputs = (k[:, :, tail:], *learned.inputs)
        return out, TTTState(learned.weights, learned.biases, inputs, learned.steps)

    def advance(
        self,
        q: Float[Tensor, "B H t D"],
        k: Float[Tensor, "B H t D"],
        v: Float[Tensor, "B H t D"],
        eta: Float[Tensor, "B H t"],
        state: TTTState,
    ) -> tuple[Float[Tensor, "B H t D"], TTTState]:
        """Learn from and answer the next tokens of one mini-batch."""
        num_pending = state.num_pending
        state = self.learn(k, v, eta, state)
        visible = (
            lower_triangle(state.pending_inputs[0], q, diagonal=num_pending) if self.settings.causal else None
        )
        z = self.read(q, state, visible=visible)
        return q + self.layer_norm(z), state

    def learn(
        self,
        k: Float[Tensor, "B H t D"],
        v: Float[Tensor, "B H t D"],
        eta: Float[Tensor, "B H t"],
        state: TTTState,
    ) -> TTTState:
        """The steps of the next tokens of one mini-batch, pending in the state."""
        inputs, gradients = self.token_gradients(k, v, eta, state.start_weights, state.start_biases)
        if state.num_pending:
            inputs = tuple(torch.cat(pair, 2) for pair in zip(state.pending_inputs, inputs, strict=True))
            gradients = tuple(
                torch.cat(pair, 2) for pair in zip(state.pending_gradients, gradients, strict=True)
            )
        return state._replace(pending_inputs=inputs, pending_gradients=gradients)

    @torch.no_grad()
    def losses(
        self,
        k: Float[Tensor, "B H T D"],
        v: Float[Tensor, "B H T D"],
        eta: Float[Tensor, "B H T"],
        state: TTTState | None,
    ) -> tuple[Float[Tensor, "B H T"], Float[Tensor, "B H T"], Float[Tensor, "B H T"]]:
        """Inner loss of every token at `W0`, just before its own step and just after it.

        Args:
            k, v, eta: of any number of tokens; the steps are causal.
            state: at the first token, anywhere in a mini-batch; None starts at `W0`.
        """
        losses: list[list[Tensor]] = [[], [], []]
        with torch.autocast(k.device.type, enabled=False):
            k, v, eta = (x.to(self.dtype) for x in (k, v, eta))
            first = initial_state(self.weights, self.biases, k.shape[0])
            if state is None:
                state = first
            else:  # in the same memory layout the same weights give the same losses, to the last bit
                layouts = zip(first.start_weights, state.start_weights, strict=True)
                first = first._replace(
                    start_weights=tuple(torch.empty_like(w).copy_(w0) for w0, w in layouts)
                )
            start, num_tokens = 0, k.shape[2]
            while start < num_tokens:
                num_pending = state.num_pending
                stop = min(start + self.settings.mini_batch_size - num_pending, num_tokens)
                keys, values, rates = (x[:, :, start:stop] for x in (k, v, eta))
                state = self.learn(keys, values, rates, state)
                steps = state.pending_inputs[0]
                readings = (
                    self.read(keys, first, visible=None),
                    self.read(keys, state, visible=lower_triangle(steps, keys, diagonal=num_pending - 1)),
                    self.read(keys, state, visible=lower_triangle(steps, keys, diagonal=num_pending)),
                )
                for out, z in zip(losses, readings, strict=True):
                    out.append(0.5 * (self.layer_norm(z) - (values - keys)).square().sum(-1))
                if stop < num_tokens:
                    state = self.commit(state)
                start = stop
        at_w0, before, after = (torch.cat(parts, 2) for parts in losses)
        return at_w0, before, after

    def token_gradients(
        self,
        k: Float[Tensor, "B H t D"],
        v: Float[Tensor, "B H t D"],
        eta: Float[Tensor, "B H t"],
        weights: Sequence[Float[Tensor, "B H _ _"]],
        biases: Sequence[Float[Tensor, "B H 1 _"]],
    ) -> tuple[tuple[Float[Tensor, "B H t _"], ...], tuple[Float[Tensor, "B H t _"], ...]]:
        """Inputs `X_l` and `eta * d loss / d Z_l` of every token, by layer."""
        inputs, zs = [k], []
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            zs.append(inputs[layer] @ weight + bias)
            if layer + 1 < len(weights):
                inputs.append(F.gelu(zs[layer], approximate="tanh"))
        gradient = self.output_gradient(zs[-1], v - k) * eta[..., None]
        gradients = [gradient]
        for layer in reversed(range(len(weights) - 1)):
            gradient = torch.ops.aten.gelu_backward(
                gradient @ weights[layer + 1].mT, zs[layer], approximate="tanh"
            )
            gradients.insert(0, gradient)
        return tuple(inputs), tuple(gradients)

    def output_gradient(
        self, z: Float[Tensor, "B H t D"], target: Float[Tensor, "B H t D"]
    ) -> Float[Tensor, "B H t D"]:
        """`d/dz 0.5 * ||LN(z) - target||^2`, clipped per token when asked."""
        centred = z - z.mean(-1, keepdim=True)
        rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + self.settings.eps)
        normed = centred * rstd
        dy = self.ln_weight * (self.ln_weight * normed + self.ln_bias - target)
        gradient = rstd * (dy - dy.mean(-1, keepdim=True) - normed * (dy * normed).mean(-1, keepdim=True))
        if self.settings.inner_grad_clip is not None:
            # The floor keeps the derivative of the norm finite for a gradient that is exactly zero.
            norm = (gradient * gradient).sum(-1, keepdim=True).clamp(min=1e-30).sqrt()
            gradient = gradient * (self.settings.inner_grad_clip / norm).clamp(max=1.0)
        return gradient

    def layer_norm(self, z: Float[Tensor, "B H t D"]) -> Float[Tensor, "B H t D"]:
        """The inner LayerNorm, per head, biased variance."""
        return self.ln_weight * F.layer_norm(z, z.shape[-1:], eps=self.settings.eps) + self.ln_bias

    def read(
        self, x: Float[Tensor, "B H t D"], state: TTTState, *, visible: Bool[Tensor, "*B t P"] | None
    ) -> Float[Tensor, "B H t D"]:
        """Output of the inner MLP for queries.

        Args:
            x: the queries.
            state: fast weights and pending steps.
            visible: which pending steps a query reads, boolean, broadcast to `[B, H, t, P]`; None: all.
        """
        for layer, (weight, bias, inputs, gradients) in enumerate(zip(*state, strict=True)):
            if layer > 0:
                x = F.gelu(x, approximate="tanh")
            attention = x @ inputs.mT + 1  # [B, H, t, P]
            if visible is not None:
                attention = torch.where(visible, attention, 0)
            x = x @ weight + bias - attention @ gradients
        return x

    def commit(self, state: TTTState) -> TTTState:
        """Apply the steps of a full mini-batch and start the next one."""
        weights, biases = state.weights, state.biases
        if self.settings.state_decay is not None:
            keep = 1 - self.settings.state_decay
            weights = tuple(w0 + keep * (w - w0) for w0, w in zip(self.weights, weights, strict=True))
            biases = tuple(b0 + keep * (b - b0) for b0, b in zip(self.biases, biases, strict=True))
        return TTTState(
            weights,
            biases,
            tuple(x[:, :, :0] for x in state.pending_inputs),
            tuple(g[:, :, :0] for g in state.pending_gradients),
        )


def _between(tokens: Tokens, start: int, stop: int) -> Block:
    q, k, v, eta = (x[:, :, start:stop] for x in tokens)
    return q, k, v, eta
