"""Which parameters belong to TTT, and the three optimiser groups."""

from torch import nn

from finetune.args import TrainArgs

GROUP_NAMES = ("base", "ttt_weights", "ttt_alpha")


def classify_ttt_parameter(name: str) -> str:
    """The optimiser group of a parameter by its dotted name: base, ttt_weights or ttt_alpha.

    Whole words of the name decide, since `alpha` alone is part of Moshi's own norms.
    """
    *path, leaf = name.split(".")
    if path[:1] == ["condition_provider"]:
        return "base"  # what a condition is called is not ours to choose
    if leaf == "gating_alpha":
        return "ttt_alpha"
    if any("ttt" in part.split("_") for part in (*path, leaf)):
        return "ttt_weights"
    return "base"


def is_ttt_parameter(name: str) -> bool:
    """Whether a parameter belongs to a TTT layer or its gate, by its dotted name."""
    return classify_ttt_parameter(name) != "base"


def is_depformer_parameter(name: str) -> bool:
    """Whether a parameter belongs to Moshi's depth transformer, its inputs and output layers included."""
    first = name.partition(".")[0]
    return first == "linears" or first.split("_")[0] == "depformer"


def get_parameter_groups(model: nn.Module, args: TrainArgs | None = None) -> dict[str, list[nn.Parameter]]:
    """The parameters that require a gradient, by group.

    Args:
        model: a (patched) Moshi model.
        args: when given, it is checked that TTT trains where this configuration asks for it.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUP_NAMES}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[classify_ttt_parameter(name)].append(parameter)
    expected = args is not None and args.ttt.enable and args.ttt.layers != "none"
    assert groups["ttt_weights"] or not expected, "TTT layers without a trainable parameter"
    return groups


def outer_learning_rates(args: TrainArgs) -> dict[str, float]:
    """Peak outer learning rate of each group."""
    return {
        "base": args.optim.lr,
        "ttt_weights": args.optim.lr * args.ttt.weight_lr_multiplier,
        "ttt_alpha": args.optim.lr * args.ttt.alpha_lr_multiplier,
    }
