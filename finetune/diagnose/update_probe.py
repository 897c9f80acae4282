"""How far an optimiser step moves the weights, from AdamW's own moments, so that no copy is needed."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from moshi.models.lm import LMModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from finetune.distributed import all_reduce_sum
from moshi_ttt.hybrid_model import hybrid_layers

_BLOCK = 2**24  # elements looked at together: temporary tensors of 64 MB


class _Part(NamedTuple):
    """A block of one parameter."""

    new: Tensor  # after the step
    change: Tensor  # of the step, before it was rounded to the dtype of the parameter


class UpdateProbe:
    """The last optimiser step: by group relative to the weights, by layer for the gates.

    Args:
        model: a prepared model.

    Sums are taken over what each process holds and then over the processes, so that shards, whole copies
    and copies of shards give the same ratios.
    """

    def __init__(self, model: LMModel) -> None:
        self._gates = {
            layer.forward_ssm_gating.gating_alpha: index for index, layer in hybrid_layers(model).items()
        }
        self._groups: list[str] = []
        self._gate_layers: list[int] = []
        self._sums: Tensor | None = None

    @torch.no_grad()
    def measure(self, optimizer: AdamW) -> None:
        """Look at the step just made, before the rates change; every process must call it."""
        device = next(iter(optimizer.state)).device
        groups: dict[str, Tensor] = {}
        gates: dict[int, Tensor] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                layer = self._gates.get(parameter)
                for part in _parts(parameter, group, optimizer.state[parameter]):
                    old = part.new - part.change
                    sums = torch.stack([part.change.square().sum(), old.square().sum()])
                    groups[group["name"]] = groups.get(group["name"], 0) + sums
                    if layer is not None:
                        gates[layer] = gates.get(layer, 0) + _gate_sums(part, parameter.dtype)
        self._groups, self._gate_layers = list(groups), list(gates)
        flat = [*groups.values(), *gates.values()]
        self._sums = all_reduce_sum(torch.cat(flat) if flat else torch.zeros(0, device=device))

    def values(self) -> dict[str, float]:
        """`update_ratio_<group>`, and by layer `gate_speed`, `gate_opening` and `gate_movable`.

        The ratio is |change| / |weights| of the group, weight decay included. `gate_speed`: mean |change
        of alpha|; `gate_opening`: mean |tanh alpha|; `gate_movable`: share of the gates whose change is at
        least half the spacing of their dtype, so that rounding does not undo it. Empty before `measure`.
        """
        if self._sums is None:
            return {}
        numbers = iter(self._sums.tolist())
        values = {}
        for name in self._groups:
            change, size = next(numbers), next(numbers)
            values[f"update_ratio_{name}"] = (change / size) ** 0.5 if size > 0 else float("inf")
        for index in self._gate_layers:
            speed, opening, movable, count = (next(numbers) for _ in range(4))
            values[f"gate_speed/layer_{index}"] = speed / count
            values[f"gate_opening/layer_{index}"] = opening / count
            values[f"gate_movable/layer_{index}"] = movable / count
        return values


def _parts(parameter: Tensor, group: Mapping, state: Mapping) -> Iterator[_Part]:
    """What AdamW did to a parameter, block by block.

    `p <- p (1 - lr decay) - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)`, solved for the change.
    """
    lr, decay = group["lr"], group["lr"] * group["weight_decay"]
    beta1, beta2 = group["betas"]
    step = state["step"].float()
    first, second = 1 - beta1**step, 1 - beta2**step
    blocks = (_local(x).flatten().split(_BLOCK) for x in (parameter, state["exp_avg"], state["exp_avg_sq"]))
    for new, mean, square in zip(*blocks, strict=True):
        new = new.float()
        move = lr * (mean.float() / first) / ((square.float() / second).sqrt() + group["eps"])
        yield _Part(new, (-move - decay * new) / (1 - decay))


def _gate_sums(part: _Part, dtype: torch.dtype) -> Tensor:
    size = part.change.abs()
    old = part.new.abs().clamp(min=torch.finfo(dtype).tiny)
    spacing = torch.ldexp(torch.full_like(old, torch.finfo(dtype).eps), torch.frexp(old).exponent - 1)
    count = torch.full_like(size.sum(), size.numel())
    return torch.stack([size.sum(), part.new.tanh().abs().sum(), (size >= spacing / 2).sum().to(size), count])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
