"""Blockwise encoding equals one pass, on a small Mimi with random weights."""

import math

import numpy as np
import pytest
import torch
from moshi.models import get_mimi
from moshi.quantization.core_vq import EuclideanCodebook

from finetune.data.codes import encode_audio as codec
from finetune.data.codes.encode_audio import codec_context_frames, encode_recording

FRAME_SIZE = 128
NUM_CODEBOOKS = 3
CONFIG = {
    "sample_rate": 1600,
    "channels": 1,
    "frame_rate": 12.5,
    "seanet": {
        "channels": 1, "dimension": 16, "causal": True, "n_filters": 4, "n_residual_layers": 1,
        "activation": "ELU", "compress": 2, "dilation_base": 2, "kernel_size": 7, "residual_kernel_size": 3,
        "last_kernel_size": 3, "norm": "none", "pad_mode": "constant", "ratios": [4, 4, 4], "true_skip": True,
    },
    "quantizer": {"dimension": 8, "n_q": 4, "bins": 32, "input_dimension": 16, "output_dimension": 16},
    "transformer": {
        "d_model": 16, "num_heads": 2, "num_layers": 2, "causal": True, "layer_scale": 1.0, "context": 10,
        "conv_layout": True, "max_period": 10000, "gating": "none", "norm": "layer_norm",
        "positional_embedding": "rope", "dim_feedforward": 32, "input_dimension": 16,
        "output_dimensions": [16],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def mimi():
    torch.manual_seed(0)
    model = get_mimi(None, CONFIG, num_codebooks=NUM_CODEBOOKS)
    for module in model.modules():
        if isinstance(module, EuclideanCodebook):
            module.embedding_sum.normal_(std=0.3)
    return model


def noise(num_samples):
    return np.random.default_rng(1).normal(0, 0.5, (2, num_samples)).astype(np.float32)


@pytest.mark.parametrize("block_frames", [1, 7, 16, 59, 60, 1000])
@pytest.mark.parametrize("num_samples", [60 * FRAME_SIZE, 59 * FRAME_SIZE + 1, 3 * FRAME_SIZE - 5, 1])
def test_blocks_have_the_codes_of_one_pass(mimi, block_frames, num_samples, monkeypatch):
    audio = noise(num_samples)
    monkeypatch.setattr(codec, "BLOCK_SEC", block_frames / mimi.frame_rate)
    codes = encode_recording(mimi, audio)
    with torch.no_grad():
        one_pass = mimi.encode(torch.from_numpy(audio)[:, None])
    assert codes.shape == (2, NUM_CODEBOOKS, math.ceil(num_samples / FRAME_SIZE))
    assert codes.dtype == torch.int64
    assert torch.equal(codes, one_pass)


@pytest.mark.parametrize("piece", [1, 100, 4 * FRAME_SIZE, 7 * FRAME_SIZE + 3, 10**6])
def test_pieces_have_the_codes_of_the_whole(mimi, piece, monkeypatch):
    audio = noise(40 * FRAME_SIZE + 5)[:, : 41 * FRAME_SIZE if piece > 1 else 500]
    pieces = (audio[:, start : start + piece] for start in range(0, audio.shape[1], piece))
    expected = encode_recording(mimi, audio)
    monkeypatch.setattr(codec, "BLOCK_SEC", 7 / mimi.frame_rate)
    assert torch.equal(encode_recording(mimi, pieces), expected)


def test_one_channel_has_the_codes_that_it_has_in_a_stereo_recording(mimi):
    audio = noise(20 * FRAME_SIZE)
    assert torch.equal(encode_recording(mimi, audio[1:]), encode_recording(mimi, audio)[1:])


def test_no_pieces_are_refused(mimi):
    with pytest.raises(ValueError, match="at least 1 sample"):
        encode_recording(mimi, [])


def test_blocks_without_context_would_have_other_codes(mimi, monkeypatch):
    audio = noise(60 * FRAME_SIZE)
    expected = encode_recording(mimi, audio)
    monkeypatch.setattr(codec, "codec_context_frames", lambda mimi: 0)
    monkeypatch.setattr(codec, "BLOCK_SEC", 1.0)
    assert not torch.equal(encode_recording(mimi, audio), expected)


def test_codes_depend_on_nothing_before_the_context(mimi):
    reach = codec_context_frames(mimi)
    audio = noise((reach + 6) * FRAME_SIZE)
    changed = audio.copy()
    changed[:, : 2 * FRAME_SIZE] = 0
    codes, changed_codes = encode_recording(mimi, audio), encode_recording(mimi, changed)
    assert not torch.equal(codes[..., :10], changed_codes[..., :10])
    assert torch.equal(codes[..., 2 + reach :], changed_codes[..., 2 + reach :])


def test_context_covers_transformer_and_convolutions(mimi):
    # Encoder, in samples: 6 + (2 + 7) + 4 * (2 + 7) + 16 * (2 + 7) + 64 * 2 = 323, 3 frames and 1 to spare.
    # Downsampling reaches 3 steps of half a frame: 2 frames and 1. Transformer: 2 layers * 10 steps: 10.
    assert codec_context_frames(mimi) == 4 + 3 + 10


def test_rows_are_left_and_right(mimi):
    audio = noise(10 * FRAME_SIZE)
    swapped = encode_recording(mimi, audio[::-1].copy())
    assert torch.equal(swapped.flip(0), encode_recording(mimi, audio))


def test_encoding_keeps_no_gradients(mimi):
    audio = torch.from_numpy(noise(2 * FRAME_SIZE)).requires_grad_()
    assert not encode_recording(mimi, audio).requires_grad


@pytest.mark.parametrize("shape", [(2, 0), (3, 100), (100,)])
def test_other_shapes_are_refused(mimi, shape):
    with pytest.raises(ValueError, match=r"audio must be \[1 or 2, num_samples\]"):
        encode_recording(mimi, np.zeros(shape, np.float32))


def test_streaming_codec_is_refused(mimi):
    with mimi.streaming(1), pytest.raises(ValueError, match="streaming mode"):
        encode_recording(mimi, noise(FRAME_SIZE))
