"""Mimi codes of whole recordings, in blocks of bounded memory.

Shapes: K codebooks of one channel, T frames.
"""

import math
from collections.abc import Iterable, Iterator
from typing import cast

import numpy as np
import torch
from moshi.models import MimiModel
from moshi.modules.conv import StreamingConv1d
from moshi.modules.transformer import StreamingTransformer
from torch import Tensor, nn

from moshi_ttt.hybrid_model import transformer_layers

# New audio per pass. A block of the published Mimi needs about 80 s of context before it: larger blocks waste
# less work, smaller ones need less memory.
BLOCK_SEC = 60.0


@torch.no_grad()
def encode_recording(mimi: MimiModel, audio: np.ndarray | Tensor | Iterable[np.ndarray]) -> Tensor:
    """Encode a recording of any length.

    Mimi is causal with a finite reach, so a block that is preceded by that much audio has the codes of one
    pass over the whole recording, up to floating point.

    Args:
        mimi: the codec, not in streaming mode; it decides device, dtype and K.
        audio: float samples `[channels, num_samples]` at `mimi.sample_rate`, one or two channels, or an
            iterable of consecutive pieces of it; the end is padded with zeros to a whole frame.

    Returns:
        int64 codes on the CPU, `[channels, K, T]`: left channel, right channel;
        `T = ceil(num_samples / mimi.frame_size)`.

    Raises:
        ValueError: `audio` has another shape or no samples, or `mimi` is streaming.
    """
    if mimi.is_streaming:
        raise ValueError("mimi is in streaming mode; encode recordings outside of it.")
    parameter = next(mimi.parameters())
    frame_size = mimi.frame_size
    block_samples = max(1, round(BLOCK_SEC * mimi.frame_rate)) * frame_size
    reach = codec_context_frames(mimi)
    if isinstance(audio, np.ndarray | Tensor):
        audio = _checked(audio).split(block_samples, dim=1)

    codes = []
    for samples, known in _blocks(
        audio, block_samples=block_samples, context=None if reach is None else reach * frame_size
    ):
        block = mimi.encode(samples.to(parameter)[:, None])  # [channels, K, frames]
        codes.append(block[:, :, known // frame_size :].cpu())
    if not codes:
        raise ValueError("audio must be [1 or 2, num_samples] with at least 1 sample, not empty.")
    return torch.cat(codes, dim=-1).long()


def encode_silence(mimi: MimiModel, num_frames: int) -> Tensor:
    """The codes of digital silence, int64 `[K, num_frames]` on the CPU, of at least one frame.

    They change at first, while the codec's reach fills with silence, and then no more.
    """
    reach = codec_context_frames(mimi)
    encoded = num_frames if reach is None else min(num_frames, reach + 1)
    codes = encode_recording(mimi, np.zeros((1, encoded * mimi.frame_size), np.float32))[0]
    return torch.cat([codes, codes[:, -1:].expand(-1, num_frames - encoded)], dim=1)


def _blocks(
    pieces: Iterable[np.ndarray | Tensor], *, block_samples: int, context: int | None
) -> Iterator[tuple[Tensor, int]]:
    """Yield blocks of samples, each after what precedes it, and how many samples that is."""
    buffer, known = None, 0
    for piece in map(_checked, pieces):
        buffer = piece if buffer is None else torch.cat([buffer, piece], 1)
        while buffer.shape[1] >= known + block_samples:
            end = known + block_samples
            yield buffer[:, :end], known
            known = end if context is None else min(end, context)
            buffer = buffer[:, end - known :]
    if buffer is not None and buffer.shape[1] > known:
        yield buffer, known


def _checked(audio: np.ndarray | Tensor) -> Tensor:
    audio = torch.as_tensor(audio)
    if audio.dim() != 2 or audio.shape[0] not in (1, 2) or audio.shape[1] == 0:
        raise ValueError(
            f"audio must be [1 or 2, num_samples] with at least 1 sample, not {list(audio.shape)}."
        )
    return audio


def codec_context_frames(mimi: MimiModel) -> int | None:
    """How many frames before a frame its codes depend on, generously; None when all of them."""
    encoder_steps_per_frame = mimi.encoder_frame_rate / mimi.frame_rate
    frames = math.ceil(_conv_reach(mimi.encoder) / mimi.frame_size) + 1
    if encoder_steps_per_frame != 1:
        frames += math.ceil(_conv_reach(mimi.downsample) / encoder_steps_per_frame) + 1
    if mimi.encoder_transformer is not None:
        # torch knows the members of a module only as Module.
        transformer = cast(StreamingTransformer, mimi.encoder_transformer.transformer)
        contexts = [layer.self_attn.context for layer in transformer_layers(transformer)]
        limited = [context for context in contexts if context is not None]
        if len(limited) < len(contexts):
            return None
        frames += math.ceil(sum(limited) / encoder_steps_per_frame)
    return frames


def _conv_reach(module: nn.Module) -> int:
    """The receptive field of a chain of causal convolutions, in steps of its input.

    Skip branches count as if they were part of the chain, which can only make it larger.
    """
    reach, stride = 0, 1
    for layer in module.modules():
        if isinstance(layer, StreamingConv1d):
            conv = layer.conv.conv
            reach += (conv.kernel_size[0] - 1) * conv.dilation[0] * stride
            stride *= conv.stride[0]
    return reach
