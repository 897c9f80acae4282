"""Which audio streams a model of the Moshi family reads and writes, as its configuration says.

A model has `n_q` audio codebooks, of which it predicts the first `dep_q`. One that predicts none (speech to
text) hears one voice. All others know two voices, theirs before the user's, and predict their own or both.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import FRAME_RATE
from moshi.modules.transformer import StreamingTransformerLayer
from torch import Tensor

from moshi_ttt.hybrid_model import transformer_layers


class Streams(NamedTuple):
    """The audio streams of a model.

    Attributes:
        num_codebooks: K, of one voice.
        num_voices: 1, or 2 with its own before the user's.
        num_predicted: voices that it predicts, 0 to 2, the first ones.
    """

    num_codebooks: int
    num_voices: int
    num_predicted: int

    @property
    def speaks(self) -> bool:
        """Whether it has a voice; otherwise it writes text only."""
        return self.num_predicted > 0


def streams_of(*, n_q: int, dep_q: int) -> Streams:
    """The streams of a model with `n_q` audio codebooks that predicts `dep_q` of them.

    Raises:
        ValueError: they are not those of a kind that is known here.
    """
    if dep_q == 0 and n_q > 0:
        return Streams(n_q, 1, 0)
    if n_q == dep_q and n_q % 2 == 0 and n_q > 0:
        return Streams(n_q // 2, 2, 2)
    if n_q == 2 * dep_q and n_q > 0:
        return Streams(dep_q, 2, 1)
    raise ValueError(f"n_q {n_q} and dep_q {dep_q} are not the streams of one or two voices.")


def model_streams(lm: LMModel) -> Streams:
    """The streams of a model."""
    return streams_of(n_q=lm.n_q, dep_q=lm.dep_q)


def text_delay_frames(config: Mapping[str, Any]) -> int:
    """How many frames after a word is heard a speech-to-text model writes it; 0 of other models.

    Args:
        config: of the repository, with its section `stt_config`.
    """
    return _stt_frames(config, "audio_delay_seconds")


def silent_prefix_frames(config: Mapping[str, Any]) -> int:
    """How many frames of silence a speech-to-text model expects before a recording; 0 of other models."""
    return _stt_frames(config, "audio_silence_prefix_seconds")


def _stt_frames(config: Mapping[str, Any], key: str) -> int:
    return round((config.get("stt_config") or {}).get(key, 0.0) * FRAME_RATE)


def make_trainable(lm: LMModel) -> LMModel:
    """Let `LMModel.forward` do without a depth transformer, which it needs: it has no audio logits then."""
    if lm.depformer is None:
        lm.forward_depformer_training = partial(_no_audio_logits, card=lm.card)
    return lm


def depth_layers(lm: LMModel) -> list[StreamingTransformerLayer]:
    """The layers of its depth transformer; none of a model that writes text only."""
    return [] if lm.depformer is None else transformer_layers(lm.depformer)


def speak_only(lm: LMModel) -> LMModel:
    """Let a model that predicts the user too speak with its own voice, and hear the user, as Moshi does.

    Codebooks are predicted one after the other, so that its own do not depend on the user's.
    """
    lm.dep_q = min(lm.dep_q, model_streams(lm).num_codebooks)
    return lm


def _no_audio_logits(sequence: Tensor, transformer_out: Tensor, *, card: int) -> Tensor:
    """Of no codebook, `[B, 0, T, card]`."""
    batch_size, num_steps = transformer_out.shape[:2]
    return torch.empty((batch_size, 0, num_steps, card), dtype=transformer_out.dtype, device=sequence.device)
