"""One AdamW with three outer learning rates, each on the same schedule with a peak of its own.

The rates at their peak and the parameters of each come from `finetune.ttt_utils`.
"""

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from finetune.args import TrainArgs
from finetune.training.schedules import share_of_peak
from finetune.ttt_utils import (
    GROUP_NAMES,
    classify_ttt_parameter,
    is_depformer_parameter,
    outer_learning_rates,
)

_NORM_MODULES = ("norm", "norm1", "norm2", "norm_cross", "out_norm", "pre_norm", "post_norm")
_NORM_LEAVES = ("ttt_norm_weight", "ttt_norm_bias", "scale")  # scale: of Moshi's LayerScale


def decays(name: str, *, decay_norms_and_biases: bool) -> bool:
    """Whether weight decay applies to a parameter, by the role its dotted name tells.

    The number of dimensions does not tell the role: norm weights are `[1, 1, dim]`, inner biases
    `[H, 1, out]`.
    """
    *path, leaf = name.split(".")
    if leaf == "gating_alpha":
        return False
    if decay_norms_and_biases:
        return True
    is_bias = leaf.endswith("bias") or "biases" in path
    is_norm = leaf in _NORM_LEAVES or any(part in _NORM_MODULES or part.endswith("_norms") for part in path)
    return not (is_bias or is_norm)


def build_optimizer(model: nn.Module, args: TrainArgs) -> AdamW:
    """AdamW over the trainable parameters; groups carry `name` (base, ttt_weights or ttt_alpha).

    A named group is split, with and without weight decay, when it has parameters of both kinds; `base` also
    where the depth transformer has a rate of its own (`multiplier` of a group is not 1 then).
    """
    rates = outer_learning_rates(args)
    split: dict[tuple[str, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = classify_ttt_parameter(name)
            decayed = decays(name, decay_norms_and_biases=args.optim.decay_norms_and_biases)
            has_own_rate = group == "base" and is_depformer_parameter(name)
            multiplier = args.optim.depformer_lr_multiplier if has_own_rate else 1.0
            split.setdefault((group, decayed, multiplier), []).append(parameter)
    groups = [
        {
            "params": split[group, decayed, multiplier],
            "name": group,
            "multiplier": multiplier,
            "lr": rates[group] * multiplier,
            "weight_decay": args.optim.weight_decay if decayed else 0.0,
        }
        for group, decayed, multiplier in sorted(split, key=_place)
    ]
    # Fused: one pass over the memory, no workspace. With 100M parameters on a CPU core 4 times as fast as
    # one by one and 6 times as fast as foreach.
    return AdamW(groups, lr=args.optim.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def _place(key: tuple[str, bool, float]) -> tuple[int, bool, bool]:
    """Where a group stands: by its name, what decays first, the depth transformer's last."""
    group, decayed, multiplier = key
    return GROUP_NAMES.index(group), not decayed, multiplier != 1


def build_scheduler(optimizer: Optimizer, args: TrainArgs, *, step: int = 0) -> LRScheduler:
    """The schedule over `max_steps`, each group with its own peak; AdamW's momenta stay as they are.

    The rates depend on nothing but the step, so a run that resumes has those that it would have had.

    Args:
        optimizer: of `build_optimizer`.
        args: the configuration.
        step: optimiser steps done, for a run that resumes.
    """
    for group in optimizer.param_groups:
        group.setdefault("max_lr", group["lr"])  # an earlier schedule has changed the rate
    if args.optim.schedule == "onecycle":
        scheduler = _onecycle(optimizer, args)
        # The first one has put what the second one needs into the groups.
        return scheduler if step == 0 else _onecycle(optimizer, args, last_epoch=step - 1)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["max_lr"]
    return LambdaLR(optimizer, share_of_peak(args), last_epoch=step - 1)


def current_rates(optimizer: Optimizer, args: TrainArgs | None = None) -> dict[str, float]:
    """The learning rate of each named group now, as `lr_base`, `lr_ttt_weights`, `lr_ttt_alpha`.

    Of `base` it is the rate without `optim.depformer_lr_multiplier`.

    Args:
        optimizer: of `build_optimizer`, with its schedule.
        args: where given, groups without a parameter have their rates too, all three in a run with TTT.
    """
    groups = optimizer.param_groups
    rates = {f"lr_{group['name']}": float(group["lr"]) for group in groups if group["multiplier"] == 1}
    if args is None:
        return rates
    names = GROUP_NAMES if args.ttt.enable and args.ttt.layers != "none" else GROUP_NAMES[:1]
    peaks = outer_learning_rates(args)
    share = groups[0]["lr"] / groups[0]["max_lr"]  # of the peak, the same in every group
    return {f"lr_{name}": rates.get(f"lr_{name}", float(peaks[name] * share)) for name in names}


def _onecycle(optimizer: Optimizer, args: TrainArgs, *, last_epoch: int = -1) -> OneCycleLR:
    pct_start = args.optim.pct_start
    if args.optim.warmup_steps is not None:
        pct_start = max(1, args.optim.warmup_steps) / args.max_steps  # it begins at its peak at the earliest
    if abs(pct_start * args.max_steps - 1) < 1e-6:
        # A warm-up of exactly one step divides by zero inside OneCycleLR.
        pct_start *= 1 - 1e-4
    return OneCycleLR(
        optimizer,
        max_lr=[group["max_lr"] for group in optimizer.param_groups],
        total_steps=args.max_steps,
        pct_start=pct_start,
        cycle_momentum=False,
        last_epoch=last_epoch,
    )
