"""A directory with the files of a Hugging Face repository of Moshi, readable by moshi's own loaders."""

import json
from pathlib import Path
from typing import Any

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import save_file

from finetune.demo.codebooks import fit_codebooks
from finetune.demo.speech.word_times import SAMPLE_RATE
from finetune.demo.tiny_mimi import NUM_BINS, encode_latents, make_tiny_mimi, tiny_mimi_config
from finetune.demo.tiny_moshi import make_tiny_moshi, tiny_moshi_config
from finetune.demo.tokenizer import VOCAB_SIZE, write_tokenizer

CONFIG_NAME = "config.json"
MOSHI_NAME = "model.safetensors"
MIMI_NAME = "mimi.safetensors"
MIMI_CONFIG_NAME = "mimi_config.json"
TOKENIZER_NAME = "tokenizer.model"


def write_repository(
    model_dir: Path, *, lm: LMModel, lm_config: dict[str, Any], mimi: MimiModel, mimi_config: dict[str, Any]
) -> None:
    """Write everything but the tokenizer, which belongs beside it as `TOKENIZER_NAME`.

    Args:
        model_dir: made if it does not exist.
        lm: the language model, written in the precision that it has.
        lm_config: its arguments.
        mimi: the codec.
        mimi_config: its configuration.
    """
    model_dir.mkdir(parents=True, exist_ok=True)
    names = {
        "model_type": "moshi",
        "moshi_name": MOSHI_NAME,
        "mimi_name": MIMI_NAME,
        "mimi_config_name": MIMI_CONFIG_NAME,
        "tokenizer_name": TOKENIZER_NAME,
    }
    (model_dir / CONFIG_NAME).write_text(json.dumps(names | lm_config, indent=2) + "\n")
    (model_dir / MIMI_CONFIG_NAME).write_text(json.dumps(mimi_config, indent=2) + "\n")
    for name, model in ((MOSHI_NAME, lm), (MIMI_NAME, mimi)):
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, model_dir / name)


def write_random_repository(model_dir: Path, *, seed: int = 0, **lm_overrides: Any) -> Path:
    """Write a complete repository in a second or two, without any recording.

    Args:
        model_dir: made if it does not exist.
        seed: of all weights.
        lm_overrides: arguments of `LMModel` that differ from `tiny_moshi_config`.

    Returns:
        `model_dir`. The codec is fitted on bursts of noise, so its codes vary but mean nothing.
    """
    model_dir.mkdir(parents=True, exist_ok=True)
    write_tokenizer(model_dir / TOKENIZER_NAME, seed=seed)
    lm_config = tiny_moshi_config(**({"text_card": VOCAB_SIZE, "card": NUM_BINS} | lm_overrides))
    noise = _bursts_of_noise(20.0, seed=seed)
    mimi = make_tiny_mimi(noise, seed=seed)
    fit_codebooks(mimi, encode_latents(mimi, noise[None])[0], seed=seed)
    write_repository(
        model_dir,
        lm=make_tiny_moshi(lm_config, seed=seed),
        lm_config=lm_config,
        mimi=mimi,
        mimi_config=tiny_mimi_config(),
    )
    return model_dir


def open_repository(model_dir: Path) -> CheckpointInfo:
    """Moshi's own handle to a local repository; nothing is downloaded."""
    return CheckpointInfo.from_hf_repo(
        hf_repo=str(model_dir),
        moshi_weights=model_dir / MOSHI_NAME,
        mimi_weights=model_dir / MIMI_NAME,
        tokenizer=model_dir / TOKENIZER_NAME,
        config_path=model_dir / CONFIG_NAME,
        mimi_config_path=model_dir / MIMI_CONFIG_NAME,
    )


def _bursts_of_noise(duration_sec: float, *, seed: int) -> torch.Tensor:
    """[num_samples] of noise whose loudness changes every 50 ms."""
    generator = torch.Generator().manual_seed(seed)
    burst_samples = SAMPLE_RATE // 20
    loudness = torch.rand(round(duration_sec * 20), 1, generator=generator)
    return (0.3 * loudness * torch.randn(len(loudness), burst_samples, generator=generator)).flatten()
