"""Which parameters belong to TTT, and the three optimiser groups."""

from torch import nn

from finetune.args import TrainArgs

GROUP_NAMES = ("base", "ttt_weights", "ttt_alpha")


def classify_ttt_parameter(name: str) -> str:
    """The optimiser group of a parameter by its dotted name: base, ttt_weights or ttt_alpha.

    Whole words of the name decide, since `alpha` alone is part of Moshi's own norms.
    """
    *path, leaf = name.split(".")
    if leaf == "gating_alpha":
        return "ttt_alpha"
    if any("ttt" in part.split("_") for part in (*path, leaf)):
        return "ttt_weights"
    return "base"


def is_ttt_parameter(name: str) -> bool:
    """Whether a parameter belongs to a TTT layer or its gate, by its dotted name."""
    return classify_ttt_parameter(name) != "base"


def get_parameter_groups(model: nn.Module, args: TrainArgs | None = None) -> dict[str, list[nn.Parameter]]:
    """The parameters that require a gradient, by group.

    Args:
        model: a (patched) Moshi model.
        args: when given, a group that this configuration trains must not be empty.

    Raises:
        ValueError: TTT is enabled on layers but nothing of it is trainable.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUP_NAMES}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[classify_ttt_parameter(name)].append(parameter)
    if args is not None and args.ttt.enable and args.ttt.layers != "none" and not groups["ttt_weights"]:
        raise ValueError("ttt.enable is true, but the model has no trainable TTT parameter.")
    return groups
