"""What numbers belong to: the weights they were measured with, the codes, and the settings that matter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.base_model.conditions import condition_names
from finetune.base_model.fingerprint import base_fingerprint
from finetune.base_model.locate import lm_config
from finetune.checkpoint.description import CheckpointDescription
from finetune.checkpoint.integrity import describe_file
from finetune.checkpoint.layout import CONFIG_FILE, FULL_FILE, LORA_FILE, TRAINING_FILE, TTT_FILE, step_of
from finetune.files import hash_json
from finetune.inference.speech_model import SpeechModel
from finetune.ttt_integration import attention_windows
from moshi_ttt.hybrid_model import ttt_layers


def model_identity(speech: SpeechModel, *, fuse_lora: bool) -> dict[str, Any]:
    """What a model is: its checkpoint, everything its losses depend on, and a fingerprint of its weights.

    The fingerprint is of all bytes of the checkpoint's files, and of the base model what `base_fingerprint`
    takes; where they lie does not matter. A model with text conditions is another one with other texts.

    Raises:
        CheckpointError: a file is corrupt.
    """
    checkpoint, lm = speech.checkpoint, speech.lm
    base = base_fingerprint(speech.info)
    files = (CONFIG_FILE, TRAINING_FILE, LORA_FILE, TTT_FILE, FULL_FILE)
    content = {
        name: describe_file(checkpoint.folder / name)
        for name in files
        if (checkpoint.folder / name).is_file()
    }
    weights = {"files": content, "base": base, "base_config": lm_config(speech.info)}
    return {
        "checkpoint": str(checkpoint.folder.resolve()),
        "step": checkpoint.step,
        "fingerprint": hash_json(weights)[:16],
        "base_model": str(speech.info.moshi_weights),
        "base_fingerprint": base,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "fuse_lora": fuse_lora,
        "ttt_layers": sorted(ttt_layers(lm)),
        "attention_windows": attention_windows(lm),
        **({"conditions": dict(speech.conditions)} if condition_names(lm) else {}),
    }


def weights_key(model: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a model's identity that its losses depend on."""
    names = ("fingerprint", "dtype", "fuse_lora", "attention_windows", "conditions")
    return {name: model[name] for name in names if name in model}


def home_of(checkpoint: CheckpointDescription, *, given: str) -> Path:
    """Where results of a checkpoint belong: its run directory, or its own folder when it has none.

    Args:
        given: what the user called it; a repository of the Hub has its folder in the current directory.
    """
    if checkpoint.is_bare and Path(given).exists():
        return Path("evaluations") / checkpoint.folder.resolve().name  # a base model's folder stays as it is
    if not Path(given).exists():
        return Path("evaluations") / given.replace("/", "--")
    folder = checkpoint.folder.resolve()
    checkpoint_dir = folder.parent if step_of(folder) is None else folder
    if step_of(checkpoint_dir) is not None:
        return checkpoint_dir.parent.parent
    return folder
