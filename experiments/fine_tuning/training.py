"""Fine-tuning one arm with the product's optimiser and its three outer rates, and what it then recalls.

Shapes: B sequences, T tokens.
"""

import logging
from collections.abc import Sequence

import torch
from moshi.models.lm import LMModel
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from experiments.fine_tuning.base import token_losses
from experiments.fine_tuning.tasks import Task
from finetune.args import OptimArgs, TrainArgs, TTTArgs
from finetune.training.optim import build_optimizer, build_scheduler

logger = logging.getLogger(__name__)

LR = 4e-4  # peak outer rate of the base
BATCH_SIZE = 16
_EVAL_SEED = 2**31  # the same held-out sequences for all arms and seeds
_NUM_EVAL = 128
_EVAL_BATCH = 16
_EVAL_BLOCK = 256  # tokens streamed at once
_CURVE_EVERY = 50


def fine_tune(
    lm: LMModel, task: Task, ttt_args: TTTArgs, *, num_steps: int, seed: int, batch_size: int = BATCH_SIZE
) -> list[float]:
    """Train in place what requires a gradient.

    Args:
        lm: the arm's model.
        task: what it hears.
        ttt_args: with the multipliers of the outer rates.
        num_steps, batch_size: of the schedule.
        seed: of the sequences.

    Returns:
        Loss of the scored tokens, mean of each 50 steps.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    optim = OptimArgs(lr=LR, pct_start=0.1)
    args = TrainArgs(full_finetuning=True, max_steps=num_steps, optim=optim, ttt=ttt_args)
    optimizer = build_optimizer(lm, args)
    scheduler = build_scheduler(optimizer, args)
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    scored: list[float] = []
    for step in range(1, num_steps + 1):
        episode = task.draw(batch_size, generator)
        losses = token_losses(lm, episode.codes)
        loss = losses.mean()
        if not loss.isfinite():
            raise FloatingPointError(f"loss {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step < num_steps:
            scheduler.step()
        scored.append(losses[:, episode.scored].mean().item())
        if step % (4 * _CURVE_EVERY) == 0:
            logger.info("step %d: %.3f nats", step, sum(scored[-_CURVE_EVERY:]) / _CURVE_EVERY)
    parts = [scored[first : first + _CURVE_EVERY] for first in range(0, num_steps, _CURVE_EVERY)]
    return [sum(part) / len(part) for part in parts]


@torch.no_grad()
def recall_loss(
    lm: LMModel, task: Task, *, difficulty: int | None = None, streams: bool = True
) -> tuple[float, Tensor]:
    """Loss of the scored tokens of held-out sequences, streamed in blocks, and of each token `[T]`.

    Args:
        lm: a trained arm.
        task: what it hears.
        difficulty: tokens in between, of a pattern, or pairs, where the task has these.
        streams: False: in one pass.
    """
    was_training = lm.training
    lm.eval()
    generator = torch.Generator().manual_seed(_EVAL_SEED)
    parts: list[Tensor] = []
    for _ in range(0, _NUM_EVAL, _EVAL_BATCH):
        codes, scored = task.draw(_EVAL_BATCH, generator, difficulty=difficulty)
        parts.append(_streamed_losses(lm, codes) if streams else token_losses(lm, codes))
    lm.train(was_training)
    by_position = torch.cat(parts).mean(0)
    return by_position[scored].mean().item(), by_position


def recall_losses(
    lm: LMModel, task: Task, difficulties: Sequence[int], *, streams: bool = True
) -> dict[int, float]:
    """By difficulty."""
    return {
        difficulty: recall_loss(lm, task, difficulty=difficulty, streams=streams)[0]
        for difficulty in difficulties
    }


def _streamed_losses(lm: LMModel, codes: Tensor) -> Tensor:
    initial = torch.full_like(codes[:, :, :1], lm.text_initial_token_id)
    inputs = torch.cat([initial, codes[:, :, :-1]], 2)
    with lm.streaming(len(codes)):
        logits = [lm.forward_text(part)[1][:, 0] for part in inputs.split(_EVAL_BLOCK, 2)]
    scores = torch.cat(logits, 1).float().log_softmax(-1)  # [B, T, card]
    return -scores.gather(2, codes[:, 0, :, None])[..., 0]
