"""The base model: a tiny Moshi with a short window, trained to copy what its window reaches.

Shapes: B sequences, T tokens.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from moshi.models.loaders import get_moshi_lm
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from experiments.recall.tasks import transformer_settings
from finetune.args import OptimArgs, TrainArgs
from finetune.training.optim import build_optimizer, build_scheduler
from moshi_ttt.files.atomic_file import replacing

_NUM_STEPS = 1500
_LR = 4e-3
_BATCH_SIZE = 16
_NUM_TOKENS = 96
_SHORTEST, _LONGEST = 4, 14  # patterns that three layers with a window of 8 reach back over


@dataclass(frozen=True)
class BaseSettings:
    """Shape of the base model: Moshi's transformer on the text stream alone.

    Attributes:
        num_symbols: tokens it knows.
        window: attention window, tokens.
        dim, num_heads, num_layers, hidden_scale: of the transformer.
    """

    num_symbols: int
    window: int = 8
    dim: int = 64
    num_heads: int = 4
    num_layers: int = 3
    hidden_scale: float = 4.125

    def build(self, *, seed: int) -> LMModel:
        """With fresh weights, float32, on the CPU."""
        settings = transformer_settings(self.dim, self.num_heads, self.num_layers)
        settings |= {
            "hidden_scale": self.hidden_scale,
            "n_q": 0,
            "dep_q": 0,
            "delays": [0],
            "text_card": self.num_symbols,
            "context": self.window,
            "causal": True,
            "layer_scale": None,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lm = get_moshi_lm(None, lm_kwargs=settings, device="cpu", dtype=torch.float32)
        return lm.requires_grad_(True).train()


def token_losses(lm: LMModel, codes: Tensor) -> Tensor:
    """Loss of every token in nats, `[B, T]`.

    Args:
        lm: a model of one stream.
        codes: `[B, 1, T]`.
    """
    initial = torch.full_like(codes[:, :, :1], lm.text_initial_token_id)
    _, logits = lm.forward_text(torch.cat([initial, codes[:, :, :-1]], 2))
    return F.cross_entropy(logits[:, 0].mT.float(), codes[:, 0], reduction="none")


def trained_base(folder: Path, settings: BaseSettings, *, seed: int) -> LMModel:
    """The base model of a seed, trained now or read from the folder."""
    lm = settings.build(seed=seed)
    path = folder / f"{_name(asdict(settings))}.seed{seed}.safetensors"
    if path.is_file():
        lm.load_state_dict(load_file(path))
        return lm
    _learn_to_copy(lm, settings.num_symbols, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(lm.state_dict(), temporary)
    return lm


def _learn_to_copy(lm: LMModel, num_symbols: int, *, seed: int) -> None:
    args = TrainArgs(full_finetuning=True, max_steps=_NUM_STEPS, optim=OptimArgs(lr=_LR, pct_start=0.1))
    optimizer = build_optimizer(lm, args)
    scheduler = build_scheduler(optimizer, args)
    generator = torch.Generator().manual_seed(seed)
    for step in range(_NUM_STEPS):
        period = int(torch.randint(_SHORTEST, _LONGEST + 1, (), generator=generator))
        pattern = torch.randint(num_symbols, (_BATCH_SIZE, 1, period), generator=generator)
        codes = pattern.repeat(1, 1, -(-_NUM_TOKENS // period))[:, :, :_NUM_TOKENS]
        optimizer.zero_grad()
        token_losses(lm, codes).mean().backward()
        clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        if step + 1 < _NUM_STEPS:
            scheduler.step()


def _name(settings: Mapping[str, float]) -> str:
    return "base-" + "-".join(f"{value:g}" for value in settings.values())
