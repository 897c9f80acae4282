"""The backward pass of a group of mini-batches.

One mini-batch, where `phi` is GELU, `A_l = tril(Xq_l X_l^T + 1)`, `s_l = eta g_l` the steps, `u_l = s_{l+1}
W_{l+1}^T`, Lambda and lambda the gradients of the weights and biases after the mini-batch, dZq_l that of what
the queries read:

    dA_l      = -tril(dZq_l s_l^T)
    dXq_l     = dZq_l W_l^T + dA_l X_l                                  dZq_{l-1} = dXq_l phi'(Zq_{l-1})
    ds_l      = -A_l^T dZq_l - X_l Lambda_l - lambda_l + du_{l-1} W_l   du_l = ds_l phi'(Z_l)
    dX_l      = dA_l^T Xq_l - s_l Lambda_l^T + dZ_l W_l^T
    dZ_{l-1}  = dX_l phi'(Z_{l-1}) + ds_{l-1} u_{l-1} phi''(Z_{l-1})
    Lambda_l += X_l^T dZ_l + Xq_l^T dZq_l + du_{l-1}^T s_l              lambda_l += sum(dZ_l + dZq_l)

Only what holds Lambda or lambda goes from mini-batch to mini-batch; the rest is computed for the whole group.

Shapes: as in `group`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moshi_ttt.manual.elementwise import OutputGradient
from moshi_ttt.manual.group import Group, Network, Norm, Tokens, flat


class GroupGradients(NamedTuple):
    """Gradients of one group."""

    tokens: Tokens
    norm: Norm  # [R, 1, D]


class GroupBackward:
    """The way back through groups, with buffers that all of them use.

    Args:
        group: its forward pass, made for gradients.
        norm: the inner LayerNorm.
    """

    def __init__(self, group: Group, norm: Norm) -> None:
        self.group, self.norm = group, norm
        self.c = group.settings.mini_batch_size
        self.last = group.num_layers - 1
        self.square = norm.weight * norm.weight
        self.all_dsteps = [torch.empty_like(step[:, :, : self.c]) for step in group.right]
        self.all_dx = [torch.empty_like(x[:, :, : self.c]) for x in group.left]
        self.all_dxq = [torch.empty_like(dx) for dx in self.all_dx]
        self.all_bends = [torch.empty_like(slope) for slope in group.slope]
        self.work = [(torch.empty_like(slope), torch.empty_like(slope)) for slope in group.slope]
        self.all_dy, self.all_ddy = torch.empty_like(group.shift), torch.empty_like(group.shift)

    def run(self, dout: Tensor, z_out: Tensor, after: Network, initial: Network | None) -> GroupGradients:
        """Gradients of the tokens and norm of a group that has learned; fast weights' are moved in place.

        Args:
            dout: gradient of the outputs, `[G, R, C, D]`.
            z_out: what the queries read at the last layer, `[G, R, C, D]`.
            after: gradients of the fast weights after the group; become those before it.
            initial: gradients of `W0`, added to, when the state decays.

        Returns:
            Gradients, those of the tokens in buffers of the next call.
        """
        count = self.group.count
        self.shape = dout.shape[:2]  # G, R
        self.dsteps, self.dx, self.dxq, self.bends = (
            [buffer[:count] for buffer in buffers]
            for buffers in (self.all_dsteps, self.all_dx, self.all_dxq, self.all_bends)
        )
        self.dy, self.ddy = self.all_dy[:count], self.all_ddy[:count]
        norm = self._through_output_norm(dout, z_out)
        dq = self._through_queries(dout)
        for layer, bend in enumerate(self.bends):
            work = tuple(buffer[:count] for buffer in self.work[layer])
            self.group.elementwise.bend(self.group.z(layer), self.group.u[layer][:count], work, bend)
        normed, _, rstd, _, _ = (buffer[:count] for buffer in self.group.output_gradient)
        torch.addcmul(self.group.shift[:count], normed, self.square, out=self.dy)
        self.tilt = (self.dy * normed).mean(-1, keepdim=True).mul_(rstd)
        for n in reversed(range(count)):
            self._through_mini_batch(n, after, initial)
        return self._collect(dq, norm)

    def _through_output_norm(self, dout: Tensor, z_out: Tensor) -> Norm:
        """From `q + ln_weight * normed + ln_bias` to dZq of the last layer; the norm's own gradients."""
        eps, dz = self.group.settings.eps, self._dzq(self.last)
        return Norm(*self.group.elementwise.through_output_norm(dout, z_out, self.norm.weight, eps, dz))

    def _through_queries(self, dout: Tensor) -> Tensor:
        """All dZq, and the parts of ds and dX that come from the queries. Gradient of q `[G, R, C, D]`."""
        group = self.group
        attentions, outputs = group.read(num_layers=self.last)
        for layer in reversed(range(group.num_layers)):
            dz, steps, x, xq, dsteps, dx, dxq = (
                flat(part)
                for part in (
                    self._dzq(layer),
                    group.steps(layer),
                    group.x(layer),
                    group.xq(layer),
                    self.dsteps[layer],
                    self.dx[layer],
                    self.dxq[layer],
                )
            )
            dattention = torch.bmm(dz, steps.mT).neg_()
            if group.settings.causal:
                dattention.tril_()
            torch.bmm(attentions[layer].neg_().mT, dz, out=dsteps)
            torch.bmm(dattention.mT, xq, out=dx)
            torch.bmm(dz, flat(group.weights[layer][: group.count]).mT, out=dxq).baddbmm_(dattention, x)
            if layer:
                z = outputs[layer - 1].unflatten(0, self.shape)
                group.elementwise.through_gelu(self.dxq[layer], z, self._dzq(layer - 1))
        return self.dxq[0].add_(dout)

    def _through_mini_batch(self, n: int, after: Network, initial: Network | None) -> None:
        group, c = self.group, self.c
        decay = group.settings.state_decay
        if decay is not None:
            assert initial is not None
            for gradients, of_initial in zip(after, initial, strict=True):
                for gradient, total in zip(gradients, of_initial, strict=True):
                    total.add_(gradient, alpha=decay)
                    gradient.mul_(1 - decay)
        for layer in range(group.num_layers):
            dsteps = self.dsteps[layer][n]
            dsteps.baddbmm_(group.x(layer)[n], after.weights[layer], alpha=-1).sub_(after.biases[layer])
            if layer:
                du = group.left[layer][n, :, 2 * c :]
                torch.mul(self.dsteps[layer - 1][n], group.slope[layer - 1][n], out=du)
                dsteps.baddbmm_(du, group.weights[layer][n])
        self._through_output_gradient(n)
        for layer in reversed(range(group.num_layers)):
            dx = self.dx[layer][n].baddbmm_(group.steps(layer)[n], after.weights[layer].mT, alpha=-1)
            if layer:
                dx.baddbmm_(self._dz(layer)[n], group.weights[layer][n].mT)
                dsteps, bend = self.dsteps[layer - 1][n], self.bends[layer - 1][n]
                group.elementwise.through_slope(
                    dx, group.slope[layer - 1][n], dsteps, bend, self._dz(layer - 1)[n]
                )
        for layer in range(group.num_layers):
            rows = (3 if layer else 2) * c
            after.weights[layer].baddbmm_(group.left[layer][n].mT, group.right[layer][n, :, :rows])
            after.biases[layer].add_(group.right[layer][n, :, : 2 * c].sum(1, keepdim=True))

    def _through_output_gradient(self, n: int) -> None:
        """From the step of the last layer to dZ of the last layer, through the LayerNorm's own gradient."""
        group = self.group
        group.elementwise.through_output_gradient(
            self.dsteps[self.last][n],
            group.eta[n],
            group.z(self.last)[n],
            OutputGradient(*(buffer[n] for buffer in group.output_gradient)),
            self.dy[n],
            self.tilt[n],
            self.norm.weight,
            group.settings.inner_grad_clip,
            self.ddy[n],
            self._dz(self.last)[n],
        )

    def _collect(self, dq: Tensor, norm: Norm) -> GroupGradients:
        group, count = self.group, self.group.count
        weights = flat(group.weights[0][:count])
        flat(self.dx[0]).baddbmm_(flat(self._dz(0)), weights.mT)
        dtarget = self.ddy * self.norm.weight  # negative
        dk, dv = self.dx[0].add_(dtarget), dtarget.neg()
        normed, _, _, gradient, shrink = (buffer[:count] for buffer in group.output_gradient)
        if group.settings.inner_grad_clip is not None:
            gradient = gradient * shrink
        deta = (gradient * self.dsteps[self.last]).sum(-1, keepdim=True)
        # dy = weight^2 * normed + weight * (bias - target)
        slope = group.offset[:count].addcmul_(normed, 2 * self.norm.weight)
        dnorm = Norm(
            norm.weight + _sum_tokens(self.ddy * slope), norm.bias + _sum_tokens(self.ddy) * self.norm.weight
        )
        return GroupGradients(Tokens(dq, dk, dv, deta), dnorm)

    def _dz(self, layer: int) -> Tensor:
        return self.group.right[layer][: self.group.count, :, : self.c]

    def _dzq(self, layer: int) -> Tensor:
        return self.group.right[layer][: self.group.count, :, self.c : 2 * self.c]


def _sum_tokens(x: Tensor) -> Tensor:
    """`[G, R, C, D]` to `[R, 1, D]`."""
    return x.sum((0, 2))[:, None]
