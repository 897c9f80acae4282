"""Tiny models with text conditions, and the demo's recordings with texts beside them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from moshi.models.lm import LMModel
from safetensors.torch import save_file
from torch import Tensor

from finetune.base_model.conditions import TextConditions, prepare_conditions
from finetune.demo.assets import DemoAssets
from finetune.demo.tiny_moshi import make_tiny_moshi, tiny_moshi_config

SMALL = {"text_card": 48, "card": 20, "dim": 32, "context": 40, "depformer_dim": 16}
MOODS = ("calm", "angry")


def with_conditions(**methods: str) -> dict[str, Any]:
    """Arguments of a model with text conditions, `mood="sum"` or `mood="cross"`; a mood is one of `MOODS`."""
    conditioners = {}
    for name in methods:
        texts = {"possible_values": list(MOODS)} if name == "mood" else {}
        lut = {"n_bins": 8, "dim": 16, "tokenizer": "noop", "init_scale": 2.0} | texts
        conditioners[name] = {"type": "lut", "lut": lut}
    fuser = {way: [name for name, used in methods.items() if used == way] for way in ("sum", "cross")}
    return {"conditioners": conditioners, "fuser": fuser, "cross_attention": bool(fuser["cross"])}


def small_config(**methods: str) -> dict[str, Any]:
    """Arguments of a tiny model with these conditions."""
    return tiny_moshi_config(**(SMALL | (with_conditions(**methods) if methods else {})))


def make_conditioned_lm(*, seed: int = 0, **methods: str) -> LMModel:
    """A tiny float32 model in evaluation mode with these conditions."""
    return make_tiny_moshi(small_config(**methods), seed=seed).eval()


def forward(lm: LMModel, codes: Tensor, rows: list[TextConditions]) -> Tensor:
    """Logits of the text stream, `[B, T, text_card]`."""
    return lm(codes, prepare_conditions(lm, rows)).text_logits[:, 0]


def make_conditioned_demo(demo: DemoAssets, folder: Path, **methods: str) -> DemoAssets:
    """The demo with a model that has conditions, and a mood beside each recording but the held-out one."""
    shutil.copytree(demo.out_dir, folder)
    config_path = folder / "model" / "config.json"
    config = json.loads(config_path.read_text()) | with_conditions(**methods)
    config_path.write_text(json.dumps(config))
    files = ("model_type", "moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name")
    lm = make_tiny_moshi({key: value for key, value in config.items() if key not in files}, seed=0)
    save_file({name: tensor.contiguous() for name, tensor in lm.state_dict().items()}, _weights(folder))
    for path, mood in zip(sorted((folder / "data" / "train").glob("*.json")), MOODS, strict=True):
        write_conditions(path, {"mood": mood})
    return replace(demo, out_dir=folder)


def write_conditions(path: Path, conditions: object) -> None:
    """Put text conditions into a file of word timings."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_conditions": conditions}))


def _weights(folder: Path) -> Path:
    return folder / "model" / "model.safetensors"
