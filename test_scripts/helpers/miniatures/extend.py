"""Base models to extend, of the real class, and what they answer."""

import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from moshi.models.lm import LMModel
from safetensors.torch import save_file
from torch import Tensor

from finetune.base_model.streams import make_trainable
from finetune.demo.model_folder import open_repository
from finetune.demo.speech.dialogues import make_sentences
from finetune.demo.tiny_moshi import make_tiny_moshi, tiny_moshi_config
from finetune.demo.tokenizer import write_tokenizer_of

JAPANESE = [
    "今日はいい天気ですね。",
    "私はPythonを使います。",
    "電車で3時に行きます。",
    "おはようございます。",
]
TRANSCRIBER = {"n_q": 8, "dep_q": 0, "delays": [0] * 9}  # speech to text: one voice, heard


def write_base(folder: Path, base: Path, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """A copy of a base model with another language model in it.

    Args:
        folder: to make.
        base: from which codec and tokenizer are.
        dtype: of the weights.
        overrides: arguments of `LMModel` that differ from the demo's, in small.
    """
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    small = {"dim": 32, "num_layers": 2, "num_heads": 4, "depformer_dim": 16, "depformer_num_heads": 2}
    small |= {"depformer_dim_feedforward": 66}
    new = tiny_moshi_config(text_card=config["text_card"], card=config["card"], **(small | overrides))
    (folder / "config.json").write_text(json.dumps(config | new))
    weights = {name: tensor.to(dtype) for name, tensor in make_tiny_moshi(new, seed=1).state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def write_other_tokenizer(path: Path, *, max_pieces: int = 480) -> Path:
    """A tokenizer that shares some pieces with the demo's, and has others."""
    sentences = [*make_sentences("other", count=40), *JAPANESE * 40]
    write_tokenizer_of(path, iter(sentences), max_pieces=max_pieces)
    return path


def tokenizer_of(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer of a model folder."""
    return sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))


def load_by_moshi(folder: Path) -> LMModel:
    """The language model of a folder through Moshi's own loader, in float32."""
    return make_trainable(open_repository(folder).get_moshi(device="cpu", dtype=torch.float32))


def logits_of(model: LMModel, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Text logits `[B, T, V]` and audio logits `[B, K, T, card]` of codes, 0 where there is no prediction."""
    with torch.no_grad():
        output = model(codes)
    return output.text_logits[:, 0].nan_to_num(), output.logits.nan_to_num()
