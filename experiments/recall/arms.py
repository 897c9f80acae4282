"""The models that are compared: the same tiny Moshi with a short window, with TTT, with more weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import get_moshi_lm
from torch import nn

from experiments.models import num_parameters
from experiments.recall.tasks import Task
from finetune.args import TTTArgs
from finetune.ttt_integration import apply_ttt_to_model
from moshi_ttt.config import BEFORE_THERE_WERE_KEYS
from moshi_ttt.hybrid_model import set_ttt_mode, ttt_layers

ArmName = Literal["window", "window_ttt", "window_ttt_frozen", "window_wider", "full"]
ARMS: dict[ArmName, str] = {
    "window": "short window",
    "window_ttt": "short window + TTT",
    "window_ttt_frozen": "short window + TTT, fast weights frozen at W0",
    "window_wider": "short window + wider feed-forward, as many parameters as TTT",
    "full": "attention to everything",
}


@dataclass(frozen=True)
class Settings:
    """What an arm has beside its name.

    Attributes:
        ttt: the `ttt:` section of the TTT arms; keys of the form that was published where it names no others.
        first_layer_std: of the inner MLP's first layer at start; None: as `ttt.inner_init` says.
        projection_std: of the TTT layers' projections at start; None: the same.
    """

    ttt: Mapping[str, Any] = field(
        default_factory=lambda: {
            "layers": "1,2",
            "initial_gating_alpha": 1.0,
            "mini_batch_size": 16,
            "base_lr": 10.0,
        }
    )
    first_layer_std: float | None = None
    projection_std: float | None = None


def build_arm(name: ArmName, task: Task, settings: Settings, *, seed: int) -> LMModel:
    """The model of one arm, in training mode, float32; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "window_wider":
            return _wider(task, settings, seed=seed)
        lm = _base(task, context=None if name == "full" else task.window)
        if name.startswith("window_ttt"):
            apply_ttt_to_model(lm, ttt_args(settings))
            for layer in ttt_layers(lm).values():
                if settings.first_layer_std is not None:
                    nn.init.normal_(layer.weights[0], std=settings.first_layer_std)
                if settings.projection_std is not None:
                    for projection in (layer.wq, layer.wk, layer.wv, layer.wo):
                        nn.init.normal_(projection.weight, std=settings.projection_std)
            if name == "window_ttt_frozen":
                set_ttt_mode(lm, "frozen")
        return lm.train()


def ttt_args(settings: Settings) -> TTTArgs:
    """The section as it is meant: the stored runs are of the published form where it does not say more."""
    return TTTArgs(enable=True, **{**BEFORE_THERE_WERE_KEYS, **settings.ttt})


def _base(task: Task, *, context: int | None, **overrides: Any) -> LMModel:
    settings = {**task.model_settings, "context": context, "causal": True, "layer_scale": None}
    lm = get_moshi_lm(None, lm_kwargs=settings | overrides, device="cpu", dtype=torch.float32)
    return lm.requires_grad_(True).train()


def _wider(task: Task, settings: Settings, *, seed: int) -> LMModel:
    """The smallest feed-forward that brings the model to the size of the TTT arm or above."""
    goal = num_parameters(build_arm("window_ttt", task, settings, seed=seed))
    scale = task.model_settings["hidden_scale"]
    while num_parameters(lm := _base(task, context=task.window, hidden_scale=scale)) < goal:
        scale += 3 / task.model_settings["dim"]
    return lm
