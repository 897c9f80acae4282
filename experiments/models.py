"""What the experiments ask of a model, whichever it is."""

import torch
from moshi.models.lm import LMModel

from moshi_ttt.hybrid_model import hybrid_layers


def num_parameters(lm: LMModel) -> int:
    """Of the whole model, whether they train or not."""
    return sum(parameter.numel() for parameter in lm.parameters())


def mean_gates(lm: LMModel) -> dict[str, float]:
    """Mean |tanh alpha| of each TTT layer, by its index."""
    gates = {
        index: torch.tanh(layer.forward_ssm_gating.gating_alpha.detach())
        for index, layer in hybrid_layers(lm).items()
    }
    return {str(index): round(gate.abs().mean().item(), 4) for index, gate in gates.items()}
