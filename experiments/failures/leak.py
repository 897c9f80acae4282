"""What `causal: false` does to a loss: random tokens, of which nobody can know the next one."""

import dataclasses
import math
import warnings

import torch
from torch.nn.utils import clip_grad_norm_

from experiments.recall.arms import Settings, build_arm
from experiments.recall.tasks import PatternTask
from finetune.args import OptimArgs, TrainArgs, TTTArgs
from finetune.training.optim import build_optimizer, build_scheduler
from moshi_ttt.hybrid_model import ttt_layers

# One period, so nothing repeats: the best possible loss is ln 8.
_TASK = PatternTask(num_symbols=8, period=48, num_tokens=48, window=4, dim=32, num_heads=2, num_layers=2)


def measure_leak(*, causal: bool, num_steps: int = 400) -> dict[str, float]:
    """Train on tokens that cannot be foreseen, in seconds.

    Returns:
        Nats on new sequences: `as_trained`, `streamed` (each token sees only what came before, as in a
        conversation) and `chance`.
    """
    ttt = {"layers": "1", "initial_gating_alpha": 1.0, "mini_batch_size": 16, "base_lr": 10.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the one about the leak
        lm = build_arm("window_ttt", _TASK, Settings(ttt=ttt | {"causal": causal}), seed=0)
    args = TrainArgs(
        full_finetuning=True,
        max_steps=num_steps,
        optim=OptimArgs(lr=8e-3, pct_start=0.1),
        ttt=TTTArgs(weight_lr_multiplier=1.0, alpha_lr_multiplier=1.0),
    )
    optimizer = build_optimizer(lm, args)
    scheduler = build_scheduler(optimizer, args)
    generator = torch.Generator().manual_seed(0)
    for step in range(num_steps):
        loss = _TASK.losses(lm, _TASK.batch(16, generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        if step + 1 < num_steps:
            scheduler.step()
    codes = _TASK.batch(128, torch.Generator().manual_seed(2**31))
    with torch.no_grad():
        as_trained = _TASK.losses(lm, codes).mean().item()
        for layer in ttt_layers(lm).values():
            layer.config = dataclasses.replace(layer.config, causal=True)
        streamed = _TASK.losses(lm, codes).mean().item()
    return {"as_trained": as_trained, "streamed": streamed, "chance": math.log(_TASK.num_symbols)}
