"""A Moshi of the real class, small enough for a laptop, with random weights."""

import copy
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import get_moshi_lm

# Text, 8 codebooks of Moshi, 8 of the user; the first codebook of each voice is not delayed.
_DELAYS = [0, *(0, 1, 1, 1, 1, 1, 1, 1), *(0, 1, 1, 1, 1, 1, 1, 1)]


def tiny_moshi_config(*, text_card: int, card: int, **overrides: Any) -> dict[str, Any]:
    """The arguments of `LMModel` for a model of about two million weights.

    Args:
        text_card: size of the text vocabulary.
        card: entries per audio codebook.
        overrides: any other argument, for example `num_layers=2`.

    Returns:
        A new dictionary with the keys of Moshi's own configuration, ready for `config.json`.
    """
    config = {
        "dim": 128,
        "text_card": text_card,
        "existing_text_padding_id": 3,
        "n_q": 16,
        "dep_q": 8,
        "card": card,
        "num_heads": 4,
        "num_layers": 4,
        "hidden_scale": 4.125,
        "causal": True,
        "layer_scale": None,
        "context": 500,
        "max_period": 10000,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "depformer_dim": 64,
        "depformer_dim_feedforward": int(4.125 * 64),
        "depformer_num_heads": 4,
        "depformer_num_layers": 2,
        "depformer_layer_scale": None,
        "depformer_multi_linear": True,
        "depformer_context": 8,
        "depformer_max_period": 10000,
        "depformer_gating": "silu",
        "depformer_pos_emb": "none",
        "depformer_weights_per_step": True,
        "delays": list(_DELAYS),
    }
    return config | overrides


def make_tiny_moshi(config: dict[str, Any], *, seed: int) -> LMModel:
    """Make a model with fresh weights, float32 on the CPU; the same seed gives the same weights.

    The initialisation is moshi's own, without touching the global random state of the caller.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # A copy, since Moshi writes into the sections of conditioners.
        return get_moshi_lm(None, lm_kwargs=copy.deepcopy(config), device="cpu", dtype=torch.float32)
