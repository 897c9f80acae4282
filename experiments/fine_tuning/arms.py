"""The models that are compared: one trained base, fine-tuned with one thing or another added."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from moshi.models.lm import LMModel

from experiments.fine_tuning.base import BaseSettings, trained_base
from experiments.fine_tuning.variants import change_layers
from experiments.models import num_parameters
from finetune.args import LoraArgs, TTTArgs
from finetune.ttt_integration import apply_ttt_to_model
from finetune.ttt_utils import is_ttt_parameter
from finetune.wrapped_model import add_lora
from moshi_ttt.hybrid_model import set_ttt_mode

Trained = Literal["all", "ttt", "lora"]

LAYERS = "1,2"
LORA_RANK = 16


@dataclass(frozen=True)
class Arm:
    """One way of fine-tuning.

    Attributes:
        label: names it within its study.
        meaning: for the report.
        ttt: keys of the `ttt:` section that are not the defaults; None: no TTT.
        frozen: the fast weights stay at `W0`, in training too.
        window: attention window, tokens.
        as_many_parameters: a wider feed-forward that makes the base as large as with TTT.
        trained: the whole model, TTT alone, or TTT and LoRA adapters.
        num_steps: optimiser steps.
        variant: another memory in the place of the layer, see `experiments.fine_tuning.variants`.
        heads: of the base model and so of TTT.
        dim: width of the base model.
    """

    label: str
    meaning: str
    ttt: Mapping[str, Any] | None = field(default_factory=dict)
    frozen: bool = False
    window: int = 8
    as_many_parameters: bool = False
    trained: Trained = "all"
    num_steps: int = 1000
    variant: str | None = None
    heads: int = 4
    dim: int = 64

    @property
    def ttt_args(self) -> TTTArgs:
        """The `ttt:` section."""
        # Without TTT layers too: attention in chunks longer than the window is the patched model's.
        return TTTArgs(enable=True, layers="none" if self.ttt is None else LAYERS, **(self.ttt or {}))

    def build(self, num_symbols: int, *, bases: Path, seed: int) -> LMModel:
        """The model before fine-tuning; its base is trained first where it is not in the folder."""
        settings = BaseSettings(num_symbols, self.window, self.dim, self.heads)
        if self.as_many_parameters:
            settings = _wider(settings)
        lm = trained_base(bases, settings, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 + seed)
            if self.trained == "lora":
                add_lora(lm, LoraArgs(enable=True, rank=LORA_RANK), dtype=torch.float32)
            apply_ttt_to_model(lm, self.ttt_args)
            if self.variant is not None:
                change_layers(lm, self.variant)
        if self.frozen:
            set_ttt_mode(lm, "frozen")
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_(
                self.trained == "all"
                or is_ttt_parameter(name)
                or (self.trained == "lora" and "lora_" in name)
            )
        return lm.train()


def _wider(settings: BaseSettings) -> BaseSettings:
    """The narrowest feed-forward with which the base has at least as many parameters as with TTT."""
    with_ttt = settings.build(seed=0)
    apply_ttt_to_model(with_ttt, TTTArgs(enable=True, layers=LAYERS))
    goal, scale = num_parameters(with_ttt), settings.hidden_scale
    while True:
        scale += 3 / settings.dim
        wider = BaseSettings(
            settings.num_symbols, settings.window, settings.dim, settings.num_heads, hidden_scale=scale
        )
        if num_parameters(wider.build(seed=0)) >= goal:
            return wider
