"""Everything that a conversation needs: language model, codec and tokenizer of a checkpoint."""

from dataclasses import dataclass, field

import sentencepiece
import torch
from moshi.models import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo

from finetune.base_model.codec import check_codec, load_codec
from finetune.base_model.conditions import TextConditions, check_conditions, condition_names
from finetune.base_model.locate import find_model_files, lm_config
from finetune.base_model.streams import model_streams, speak_only
from finetune.base_model.text import TextDecoder, load_tokenizer
from finetune.checkpoint.description import CheckpointDescription
from finetune.checkpoint.reading import load_model, open_checkpoint
from finetune.errors import CheckpointError, ConfigError
from finetune.ttt_integration import attention_windows
from moshi_ttt.hybrid_model import TTTMode, set_ttt_mode, ttt_layers


@dataclass(frozen=True)
class SpeechModel:
    """A model that can listen and speak.

    Attributes:
        lm: in evaluation mode.
        mimi: the codec, on the same device.
        tokenizer: of the text stream.
        source: what it is, in a line, for logs.
        checkpoint: where it came from.
        info: files of its base model.
        conditions: texts that it is conditioned on.
    """

    lm: LMModel
    mimi: MimiModel
    tokenizer: sentencepiece.SentencePieceProcessor
    source: str
    checkpoint: CheckpointDescription
    info: CheckpointInfo
    conditions: TextConditions = field(default_factory=dict)

    def text_decoder(self) -> TextDecoder:
        """What makes text of the tokens of a conversation, as they come."""
        padding = (self.lm.text_padding_token_id, self.lm.end_of_text_padding_id)
        return TextDecoder(self.tokenizer, padding=padding)


def load_speech_model(
    path: str,
    *,
    base: str | None = None,
    device: torch.device,
    dtype: torch.dtype,
    fuse_lora: bool = True,
    mode: TTTMode = "on",
    conditions: TextConditions | None = None,
    must_speak: bool = True,
) -> SpeechModel:
    """Load a checkpoint with the codec and tokenizer of its base model.

    Args:
        path: run directory, checkpoint or repository of the Hugging Face Hub, or a base model.
        base: base model to use instead of the one the checkpoint names.
        device, dtype: of the language model; the codec is float32.
        fuse_lora: merge the adapters into the base weights, which is faster.
        mode: what the memory does, see `moshi_ttt.hybrid_model.set_ttt_mode`.
        conditions: texts by the name of the condition.
        must_speak: refuse a model that writes text only.

    Raises:
        CheckpointError: files are missing, corrupt or do not fit each other, or the model cannot speak.
        ConfigError: a mode other than `on` for a model without TTT, or a condition that it does not have.
    """
    checkpoint = open_checkpoint(path, base=base)
    info = find_model_files(checkpoint.model_paths)
    if checkpoint.ttt.enable and not checkpoint.ttt.causal:
        raise CheckpointError(
            f"{checkpoint.folder}: was trained with ttt.causal: false, which sees the future and cannot talk."
        )
    mimi = load_codec(info, device)
    lm = load_model(checkpoint, info, device=device, dtype=dtype, fuse_lora=fuse_lora)
    if must_speak and not model_streams(lm).speaks:
        raise CheckpointError(
            f"{info.moshi_weights}: this model writes text only (dep_q: 0), it cannot speak; generate.py, "
            "serve.py and evaluate.py transcription take it."
        )
    check_codec(mimi, lm, info)
    speak_only(lm)
    if None in attention_windows(lm):
        raise CheckpointError(f"{info.moshi_weights}: its configuration has no context, so it cannot stream.")
    conditions = conditions or {}
    check_conditions(lm, conditions, source="--condition")
    if ttt_layers(lm):
        set_ttt_mode(lm, mode)
    elif mode != "on":
        raise ConfigError(f"--ttt {mode}: {checkpoint.folder} has no TTT layers to compare with.")
    tokenizer = load_tokenizer(info, lm_config(info))
    source = _describe(checkpoint, lm, mode, conditions)
    return SpeechModel(lm, mimi, tokenizer, source, checkpoint, info, conditions)


def _describe(
    checkpoint: CheckpointDescription, lm: LMModel, mode: TTTMode, conditions: TextConditions
) -> str:
    layers = ", ".join(map(str, ttt_layers(lm)))
    memory = f"TTT {mode} in layers {layers}" if layers else "no TTT layers"
    windows = sorted({window for window in attention_windows(lm) if window is not None})
    frames = " and ".join(map(str, windows))
    name = f"base model {checkpoint.base.hf_repo_id}"
    if not checkpoint.is_bare:
        name = f"{checkpoint.folder} (step {checkpoint.step})"
    line = f"{name}, {memory}, attention window {frames} frames"
    texts = [f"{name} {conditions.get(name, 'unknown')!r}" for name in condition_names(lm)]
    return ", ".join([line, *texts])
