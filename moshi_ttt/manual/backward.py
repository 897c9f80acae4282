"""The key scan of a group of mini-batches, backward.

With `phi` GELU, `S = tril` of the mini-batches before one's own, Lambda and lambda the gradients of the
weights and biases after the group, and `ds_l`, `dX_l` at first what the queries bring (`read`):

    ds_l     -= X_l Lambda_l + lambda_l                                 of the tokens that are committed
    dX_l     -= s_l Lambda_l^T                                          the same
    du_l      = ds_l phi'(Z_l)
    ds_l     += du_{l-1} W_l - E_l s_l - E_l^T s_l - S(X_l X_l^T + 1)^T dZ_l        E_l = S(du_{l-1} X_l^T)
    dX_l     += dZ_l W_l^T - F_l X_l - F_l^T X_l - S(s_l s_l^T)^T du_{l-1}          F_l = S(dZ_l s_l^T)
    dZ_{l-1}  = dX_l phi'(Z_{l-1}) + ds_{l-1} u_{l-1} phi''(Z_{l-1})
    Lambda_l += X_l^T dZ_l + du_{l-1}^T s_l                             lambda_l += sum(dZ_l)

A mini-batch needs those after it, so what depends on dZ and du goes from the last one to the first. The
gradient of the keys, dX_0, has nothing behind it and follows for the whole group.

Shapes: as in `scan`.
"""

import torch
from torch import Tensor

from moshi_ttt.manual.scan import Keys, Network, Norm, Scan, Steps, Tape, earlier, gram


class ScanBackward:
    """The way back through one group.

    Args:
        scan: the way there.
        keys: of the group.
        fast: fast weights after it; become those at its start.
        tape: of the group.
        num_committed: tokens whose steps the fast weights after the group have in them.
    """

    def __init__(self, scan: Scan, keys: Keys, fast: Network, tape: Tape, num_committed: int) -> None:
        self.scan, self.keys, self.fast, self.z = scan, keys, fast, tape.z
        self.committed = slice(num_committed)
        self.last = len(fast.weights) - 1
        self.parts = list(scan.mini_batches(keys.k.shape[1]))
        self.earlier = earlier(keys.k.shape[1], scan.size, keys.k)
        self._recall()

    def _recall(self) -> None:
        """Inputs and steps again, from the tape, and with them the fast weights at the start."""
        hidden, functions = range(self.last), self.scan.elementwise
        inputs = [self.keys.k, *(torch.empty_like(z) for z in self.z[:-1])]
        steps = [torch.empty_like(z) for z in self.z]
        for layer in hidden:
            functions.activate(self.z[layer], inputs[layer + 1])
        self.shift = self.scan.shift(self.keys)
        self.output_gradient = self.scan.output_gradient(
            self.z[self.last], self.shift, self.keys.eta, steps[self.last]
        )
        self.slopes = [functions.gelu_slope(z) for z in self.z[:-1]]
        self.u_phi2s = [torch.empty_like(z) for z in self.z[:-1]]
        self.step_grams = [torch.empty(0)] * self.last  # of the layers after the first
        for layer in reversed(hidden):
            after = layer + 1
            self._take_back(after, inputs, steps)
            self.step_grams[layer] = gram(steps[after], 0)
            u = torch.bmm(steps[after], self.fast.weights[after].mT)
            u.baddbmm_(self.step_grams[layer] * self.earlier, inputs[after], alpha=-1)
            torch.mul(u, self.slopes[layer], out=steps[layer])
            self.u_phi2s[layer] = functions.u_phi2(self.z[layer], u)
        self._take_back(0, inputs, steps)
        self.steps = Steps(inputs, steps)
        self.input_grams = [gram(x, 1) for x in inputs]

    def _take_back(self, layer: int, inputs: list[Tensor], steps: list[Tensor]) -> None:
        x, step = inputs[layer][:, self.committed], steps[layer][:, self.committed]
        self.fast.weights[layer].baddbmm_(x.mT, step)
        self.fast.biases[layer].add_(step.sum(1, keepdim=True))

    def begin(self, dfast: Network) -> Steps:
        """Gradients of inputs and steps, as they come through the fast weights after the group.

        Args:
            dfast: gradients of these.
        """
        now, found = self.committed, []
        for x, step, dweight, dbias in zip(*self.steps, *dfast, strict=True):
            dx, ds = torch.zeros_like(x), torch.zeros_like(step)
            ds[:, now].baddbmm_(x[:, now], dweight, alpha=-1).sub_(dbias)
            dx[:, now].baddbmm_(step[:, now], dweight.mT, alpha=-1)
            found.append((dx, ds))
        return Steps(*map(list, zip(*found, strict=True)))

    def run(self, gradients: Steps, dfast: Network, dnorm: Norm) -> Keys:
        """Gradients of the keys; that of k does not hold the part that comes through the target.

        Args:
            gradients: of inputs and steps, all that comes from behind; are written to.
            dfast: of the fast weights after the group and of what reads them; become those at its start.
            dnorm: is added to.
        """
        self.dx, self.ds = gradients
        self.dz = [torch.zeros_like(z) for z in self.z]
        self.du = [torch.zeros_like(z) for z in self.z[:-1]]
        length = self.keys.k.shape[1]
        self.step_crosses, self.input_crosses = (
            [x.new_zeros(x.shape[0], length, length) for x in self.z[1:]] for _ in range(2)
        )
        normed, _, rstd, raw, shrink = self.output_gradient
        self.v_ln = torch.addcmul(self.shift, normed, self.scan.square)
        self.r_mean_v_xhat = (self.v_ln * normed).mean(-1, keepdim=True).mul_(rstd)
        self.dv_ln = torch.empty_like(self.v_ln)
        for now in reversed(self.parts):
            self._through_steps(now)
            self._through_output_gradient(now)
            self._through_inputs(now)
        for layer, (dweight, dbias) in enumerate(zip(*dfast, strict=True)):
            dweight.baddbmm_(self.steps.inputs[layer].mT, self.dz[layer])
            dbias.add_(self.dz[layer].sum(1, keepdim=True))
            if layer:
                dweight.baddbmm_(self.du[layer - 1].mT, self.steps.steps[layer])
        if shrink is not None:
            raw = raw * shrink
        deta = (raw * self.ds[self.last]).sum(-1, keepdim=True)
        weight, bias = self.scan.norm
        # v_ln = weight^2 * normed + weight * (bias - target)
        slope = torch.addcmul(bias - self.keys.target, normed, 2 * weight)
        dnorm.weight.add_((self.dv_ln * slope).sum(1, keepdim=True))
        dtarget = self.dv_ln.mul_(weight).neg_()
        dnorm.bias.sub_(dtarget.sum(1, keepdim=True))
        through_first_layer(
            self.dx[0],
            self.keys.k,
            self.steps.steps[0],
            self.dz[0],
            self.fast.weights[0],
            self.earlier,
        )
        return Keys(self.dx[0], dtarget, deta)

    def _through_steps(self, now: slice) -> None:
        """Gradients of the steps of all layers, of one mini-batch."""
        before, after = slice(now.start), slice(now.stop, None)
        for layer in range(self.last + 1):
            x, step, ds = self.steps.inputs[layer], self.steps.steps[layer], self.ds[layer][:, now]
            later = self.dz[layer][:, after]
            if later.shape[1]:
                ds.baddbmm_(self.input_grams[layer][:, after, now].mT, later, alpha=-1)
            if layer:
                du, cross = self.du[layer - 1][:, now], self.step_crosses[layer - 1]
                torch.mul(self.ds[layer - 1][:, now], self.slopes[layer - 1][:, now], out=du)
                ds.baddbmm_(du, self.fast.weights[layer])
                _mirror(cross, now, before, du, x)
                ds.baddbmm_(cross[:, now], step, alpha=-1)

    def _through_output_gradient(self, now: slice) -> None:
        """From the step of the last layer to dZ of the last layer, through the LayerNorm's own gradient."""
        self.scan.elementwise.through_output_gradient(
            self.ds[self.last][:, now],
            self.keys.eta[:, now],
            self.z[self.last][:, now],
            self.output_gradient.part(now),
            self.v_ln[:, now],
            self.r_mean_v_xhat[:, now],
            self.scan.norm.weight,
            self.dv_ln[:, now],
            self.dz[self.last][:, now],
        )

    def _through_inputs(self, now: slice) -> None:
        """Gradients of the inputs of all layers but the first, and of what is before them."""
        before, after = slice(now.start), slice(now.stop, None)
        for layer in range(self.last, 0, -1):
            dx, dz, cross = self.dx[layer][:, now], self.dz[layer][:, now], self.input_crosses[layer - 1]
            dx.baddbmm_(dz, self.fast.weights[layer].mT)
            _mirror(cross, now, before, dz, self.steps.steps[layer])
            dx.baddbmm_(cross[:, now], self.steps.inputs[layer], alpha=-1)
            later = self.du[layer - 1][:, after]
            if later.shape[1]:
                dx.baddbmm_(self.step_grams[layer - 1][:, after, now].mT, later, alpha=-1)
            parts = (x[layer - 1][:, now] for x in (self.slopes, self.ds, self.u_phi2s, self.dz))
            self.scan.elementwise.through_slope(dx, *parts)


def through_first_layer(
    dk: Tensor, k: Tensor, steps: Tensor, dz: Tensor, weight: Tensor, earlier: Tensor
) -> None:
    """To dk `[R, L, D]` is added what the keys of a group get through the first layer.

    Args:
        dk: gradient of the keys, is added to.
        k: the keys, `[R, L, D]`.
        steps, dz: of the first layer, and the gradient of its Z, `[R, L, out_0]`.
        weight: of the first layer at the start of the group, `[R, D, out_0]`.
        earlier: see `moshi_ttt.manual.scan.earlier`.
    """
    cross = torch.bmm(dz, steps.mT).mul_(earlier)
    dk.baddbmm_(dz, weight.mT).baddbmm_(cross + cross.mT, k, alpha=-1)


def _mirror(cross: Tensor, now: slice, before: slice, rows: Tensor, columns: Tensor) -> None:
    """`rows columns^T` with the tokens before, into rows and, turned, columns of `[R, L, L]`."""
    if now.start:
        product = torch.bmm(rows, columns[:, before].mT)
        cross[:, now, before] = product
        cross[:, before, now] = product.mT
