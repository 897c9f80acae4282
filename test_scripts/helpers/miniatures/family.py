"""Tiny models of every kind in the family."""

import json
from pathlib import Path

from finetune.demo.model_folder import write_random_repository

SMALL = {"dim": 32, "num_heads": 2, "context": 12, "depformer_dim": 16, "depformer_num_heads": 2}
SMALL |= {"depformer_dim_feedforward": 32, "depformer_num_layers": 1, "hidden_scale": 2}
KINDS = {
    "moshi": {},
    "both voices predicted": {"dep_q": 16, "depformer_context": 16},
    "grouped-query attention": {"kv_repeat": 2, "delays": [0, *[0, *[2] * 7] * 2]},
    "speech to text": {"n_q": 8, "dep_q": 0, "delays": [0] * 9, "extra_heads_num_heads": 2},
}
TEXT_DELAY_FRAMES = 5


def write_kind(folder: Path, kind: str, **overrides) -> Path:
    """A repository with random weights."""
    write_random_repository(folder, seed=1, **(SMALL | KINDS[kind] | overrides))
    if kind == "speech to text":
        path = folder / "config.json"
        extra = {"model_type": "stt", "stt_config": {"audio_delay_seconds": TEXT_DELAY_FRAMES / 12.5}}
        path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    return folder
