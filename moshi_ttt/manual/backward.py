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

Fast weights are not kept: from those after the group, the steps of each mini-batch are taken back. Only what
holds W, Lambda or lambda goes from mini-batch to mini-batch; the rest is computed for the whole group.

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
        group: made for gradients.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.norm = group, group.norm
        self.c = group.settings.mini_batch_size
        self.last = group.num_layers - 1
        self.all_dsteps = [torch.empty_like(step[:, :, : self.c]) for step in group.right]
        self.all_dx = [torch.empty_like(x[:, :, : self.c]) for x in group.left]
        self.all_dxq = [torch.empty_like(dx) for dx in self.all_dx]
        self.all_u_phi2s = [torch.empty_like(slope) for slope in group.slopes]
        self.work = [(torch.empty_like(slope), torch.empty_like(slope)) for slope in group.slopes]
        self.all_v_ln, self.all_dv_ln = torch.empty_like(group.shift), torch.empty_like(group.shift)

    def run(self, dout: Tensor, fast: Network, dfast: Network) -> GroupGradients:
        """Gradients of the tokens and norm of the group that is loaded.

        Args:
            dout: gradient of the outputs, `[G, R, C, D]`.
            fast: fast weights after the group; become those before it.
            dfast: gradients of the fast weights after the group; become those before it.

        Returns:
            Gradients, those of the tokens in buffers of the next call.
        """
        count = self.group.count
        self.dsteps, self.dx, self.dxq, self.u_phi2s = (
            [buffer[:count] for buffer in buffers]
            for buffers in (self.all_dsteps, self.all_dx, self.all_dxq, self.all_u_phi2s)
        )
        self.v_ln, self.dv_ln = self.all_v_ln[:count], self.all_dv_ln[:count]
        self.attentions, self.outputs = self.group.recall()
        norm = self._through_output_norm(dout)
        self._prepare()
        self._cut()
        for n in reversed(range(count)):
            self._take_back(n, fast)
            self._through_queries(n, fast)
            self._through_keys(n, fast, dfast)
        return self._collect(dout, norm)

    def _through_output_norm(self, dout: Tensor) -> Norm:
        """From `q + ln_weight * normed + ln_bias` to dZq of the last layer; the norm's own gradients."""
        eps, dz = self.group.settings.eps, self._dzq(self.last)
        z = self.outputs[self.last]
        return Norm(*self.group.elementwise.through_output_norm(dout, z, self.norm.weight, eps, dz))

    def _prepare(self) -> None:
        """What needs no fast weights."""
        group, count = self.group, self.group.count
        for layer, u_phi2 in enumerate(self.u_phi2s):
            work = tuple(buffer[:count] for buffer in self.work[layer])
            group.elementwise.u_phi2(group.z(layer), group.tape.u[layer], work, u_phi2)
        normed, _, rstd, _, _ = group.output_gradient()
        torch.addcmul(group.shift[:count], normed, group.square, out=self.v_ln)
        self.r_mean_v_xhat = (self.v_ln * normed).mean(-1, keepdim=True).mul_(rstd)
        for attention in self.attentions:
            attention.neg_()
        self.dattention = self._through_attention(
            self.attentions[self.last],
            *(flat(part) for part in self._attention_parts(self.last)),
        )

    def _cut(self) -> None:
        """What the loop reads and writes, by layer and mini-batch (`n_`): taking views there costs time."""
        group, c = self.group, self.c
        layers = range(group.num_layers)
        self.n_x = [group.x(layer).unbind() for layer in layers]
        self.n_steps = [group.steps(layer).unbind() for layer in layers]
        self.n_left = [left.unbind() for left in group.left]
        rows = [(3 if layer else 2) * c for layer in layers]
        self.n_right = [right[:, :, :stop].unbind() for right, stop in zip(group.right, rows, strict=True)]
        self.n_dz_dzq = [right[:, :, : 2 * c].unbind() for right in group.right]
        self.n_du = [left[:, :, 2 * c :].unbind() for left in group.left]
        self.n_slope = [group.slope(layer).unbind() for layer in layers[:-1]]
        self.n_u_phi2 = [u_phi2.unbind() for u_phi2 in self.u_phi2s]
        self.n_dz = [self._dz(layer).unbind() for layer in layers]
        self.n_dzq = [self._dzq(layer).unbind() for layer in layers]
        self.n_dsteps, self.n_dx, self.n_dxq = (
            [stack.unbind() for stack in stacks] for stacks in (self.dsteps, self.dx, self.dxq)
        )
        self.n_attention = [x.unflatten(0, (group.count, -1)).unbind() for x in self.attentions]
        self.n_dattention = self.dattention.unflatten(0, (group.count, -1)).unbind()
        self.n_xq = [group.xq(layer).unbind() for layer in layers]
        self.n_output = [output.unbind() for output in self.outputs]
        self.n_eta, self.n_z = group.eta.unbind(), group.z(self.last).unbind()
        gradients = zip(*(buffer.unbind() for buffer in group.output_gradient()), strict=True)
        self.n_output_gradient = [OutputGradient(*parts) for parts in gradients]
        self.n_v_ln, self.n_r_mean_v_xhat, self.n_dv_ln = (
            self.v_ln.unbind(),
            self.r_mean_v_xhat.unbind(),
            self.dv_ln.unbind(),
        )

    def _attention_parts(self, layer: int) -> tuple[Tensor, ...]:
        group = self.group
        return self._dzq(layer), group.steps(layer), group.xq(layer), self.dsteps[layer], self.dx[layer]

    def _through_attention(
        self, negative: Tensor, dz: Tensor, steps: Tensor, xq: Tensor, dsteps: Tensor, dx: Tensor
    ) -> Tensor:
        """The parts of ds and dX that come from the queries are written; dA `[_, C, C]`.

        Args:
            negative: minus the attention.
        """
        dattention = torch.bmm(dz, steps.mT).neg_()
        if self.group.settings.causal:
            dattention.tril_()
        torch.bmm(negative.mT, dz, out=dsteps)
        torch.bmm(dattention.mT, xq, out=dx)
        return dattention

    def _take_back(self, n: int, fast: Network) -> None:
        for layer, (weight, bias) in enumerate(zip(*fast, strict=True)):
            steps = self.n_steps[layer][n]
            weight.baddbmm_(self.n_x[layer][n].mT, steps)
            bias.add_(steps.sum(1, keepdim=True))

    def _through_queries(self, n: int, fast: Network) -> None:
        """Through what the queries read: dZq of all layers and the gradient of q, of one mini-batch."""
        group = self.group
        dattention = self.n_dattention[n]
        for layer in reversed(range(group.num_layers)):
            if layer < self.last:
                stacks = self.n_attention, self.n_dzq, self.n_steps, self.n_xq, self.n_dsteps, self.n_dx
                dattention = self._through_attention(*(stack[layer][n] for stack in stacks))
            dxq = torch.bmm(self.n_dzq[layer][n], fast.weights[layer].mT, out=self.n_dxq[layer][n])
            dxq.baddbmm_(dattention, self.n_x[layer][n])
            if layer:
                group.elementwise.through_gelu(dxq, self.n_output[layer - 1][n], self.n_dzq[layer - 1][n])

    def _through_keys(self, n: int, fast: Network, dfast: Network) -> None:
        """From the gradients of the fast weights after a mini-batch to those before it."""
        elementwise = self.group.elementwise
        for layer, (weight, dweight, dbias) in enumerate(zip(fast.weights, *dfast, strict=True)):
            dsteps = self.n_dsteps[layer][n]
            dsteps.baddbmm_(self.n_x[layer][n], dweight, alpha=-1).sub_(dbias)
            if layer:
                du = self.n_du[layer][n]
                torch.mul(self.n_dsteps[layer - 1][n], self.n_slope[layer - 1][n], out=du)
                dsteps.baddbmm_(du, weight)
        self._through_output_gradient(n)
        for layer in reversed(range(self.group.num_layers)):
            dx = self.n_dx[layer][n]
            dx.baddbmm_(self.n_steps[layer][n], dfast.weights[layer].mT, alpha=-1)
            dx.baddbmm_(self.n_dz[layer][n], fast.weights[layer].mT)
            if layer:
                stacks = self.n_slope, self.n_dsteps, self.n_u_phi2, self.n_dz
                slope, dsteps, u_phi2, dz = (stack[layer - 1][n] for stack in stacks)
                elementwise.through_slope(dx, slope, dsteps, u_phi2, dz)
        for layer, (dweight, dbias) in enumerate(zip(*dfast, strict=True)):
            dweight.baddbmm_(self.n_left[layer][n].mT, self.n_right[layer][n])
            dbias.add_(self.n_dz_dzq[layer][n].sum(1, keepdim=True))

    def _through_output_gradient(self, n: int) -> None:
        """From the step of the last layer to dZ of the last layer, through the LayerNorm's own gradient."""
        group = self.group
        group.elementwise.through_output_gradient(
            self.n_dsteps[self.last][n],
            self.n_eta[n],
            self.n_z[n],
            self.n_output_gradient[n],
            self.n_v_ln[n],
            self.n_r_mean_v_xhat[n],
            self.norm.weight,
            group.settings.inner_grad_clip,
            self.n_dv_ln[n],
            self.n_dz[self.last][n],
        )

    def _collect(self, dout: Tensor, norm: Norm) -> GroupGradients:
        group = self.group
        dtarget = self.dv_ln * self.norm.weight  # negative
        dk, dv = self.dx[0].add_(dtarget), dtarget.neg()
        normed, _, _, gradient, shrink = group.output_gradient()
        if group.settings.inner_grad_clip is not None:
            gradient = gradient * shrink
        deta = (gradient * self.dsteps[self.last]).sum(-1, keepdim=True)
        # v_ln = weight^2 * normed + weight * (bias - target)
        slope = group.offset[: group.count].addcmul_(normed, 2 * self.norm.weight)
        dnorm = Norm(
            norm.weight + _sum_tokens(self.dv_ln * slope),
            norm.bias + _sum_tokens(self.dv_ln) * self.norm.weight,
        )
        return GroupGradients(Tokens(self.dxq[0].add_(dout), dk, dv, deta), dnorm)

    def _dz(self, layer: int) -> Tensor:
        return self.group.right[layer][: self.group.count, :, : self.c]

    def _dzq(self, layer: int) -> Tensor:
        return self.group.right[layer][: self.group.count, :, self.c : 2 * self.c]


def _sum_tokens(x: Tensor) -> Tensor:
    """`[G, R, C, D]` to `[R, 1, D]`."""
    return x.sum((0, 2))[:, None]
