"""A Mimi of the real class, small and untrained, made to hear.

With default initial values a deep untrained encoder shrinks its input to almost nothing, and nearly linear
filters that follow the phase of the waveform say little about speech. So the encoder is set up as a random
filter bank: its first convolution stays random, the strided ones average over time, and every convolution
is scaled so that its outputs on speech have mean 0 and deviation 1 per channel, where ELU is a rectifier.

B batch rows, D latent dimensions, T frames, N vectors.
"""

import math
from typing import Any

import torch
from moshi.models.compression import MimiModel
from moshi.models.loaders import get_mimi
from torch import Tensor, nn

NUM_CODEBOOKS = 8
NUM_BINS = 64

_LATENT_DIM = 32
_CODE_DIM = 16


def tiny_mimi_config() -> dict[str, Any]:
    """A configuration for `moshi.models.loaders.get_mimi`: 24 kHz, 12.5 Hz, 8 codebooks of 64."""
    return {
        "sample_rate": 24000,
        "channels": 1,
        "frame_rate": 12.5,
        "seanet": {
            "channels": 1,
            "dimension": _LATENT_DIM,
            "causal": True,
            "n_filters": 2,
            "n_residual_layers": 0,
            "activation": "ELU",
            "compress": 2,
            "dilation_base": 2,
            "disable_norm_outer_blocks": 0,
            "kernel_size": 7,
            "residual_kernel_size": 3,
            "last_kernel_size": 3,
            "norm": "none",
            "pad_mode": "constant",
            "ratios": [8, 6, 5, 4],
            "true_skip": True,
        },
        "quantizer": {
            "dimension": _CODE_DIM,
            "n_q": NUM_CODEBOOKS,
            "bins": NUM_BINS,
            "input_dimension": _LATENT_DIM,
            "output_dimension": _LATENT_DIM,
        },
        "transformer": {
            "d_model": _LATENT_DIM,
            "num_heads": 2,
            "num_layers": 1,  # each layer costs as much as the convolutions on a file of 3 minutes
            "causal": True,
            "layer_scale": 0.01,
            "context": 250,
            "conv_layout": True,
            "max_period": 10000,
            "gating": "none",
            "norm": "layer_norm",
            "positional_embedding": "rope",
            "dim_feedforward": 4 * _LATENT_DIM,
            "input_dimension": _LATENT_DIM,
            "output_dimensions": [_LATENT_DIM],
        },
    }


@torch.no_grad()
def make_tiny_mimi(speech: Tensor, *, seed: int) -> MimiModel:
    """Make a Mimi whose encoder is set up for `speech`; its codebooks are still empty.

    Args:
        speech: [num_samples] at 24 kHz, some ten seconds of both speakers with little silence.
        seed: the same seed and speech give the same weights.

    Returns:
        The model on the CPU, float32, in evaluation mode. `fit_codebooks` completes it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mimi = get_mimi(None, tiny_mimi_config(), device="cpu", num_codebooks=NUM_CODEBOOKS)
        encoder_convs = [
            module
            for part in (mimi.encoder, mimi.downsample)
            for module in part.modules()
            if isinstance(module, nn.Conv1d)
        ]
        for conv in encoder_convs[2:]:
            if conv.stride[0] > 1:
                _average_over_time(conv)
    hooks = [conv.register_forward_hook(_normalise_outputs) for conv in encoder_convs]
    encode_latents(mimi, speech[None])
    for hook in hooks:
        hook.remove()
    return mimi


def encode_latents(mimi: MimiModel, audio: Tensor) -> Tensor:
    """What the quantizer gets.

    Args:
        mimi: the codec.
        audio: [B, num_samples] at 24 kHz.

    Returns:
        [B, T, D], a frame for every 1920 samples, the last one padded.
    """
    with torch.no_grad():
        return mimi.encode_to_latent(audio[:, None], quantize=False).transpose(1, 2)


def _average_over_time(conv: nn.Conv1d) -> None:
    """Make weights random across channels and smooth in time; their scale is normalised later."""
    channels = torch.randn(conv.weight.shape[:2]) / math.sqrt(conv.weight.shape[1])
    window = torch.hann_window(conv.kernel_size[0] + 2)[1:-1]
    conv.weight.copy_(channels[:, :, None] * window)


def _normalise_outputs(conv: nn.Conv1d, _inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
    """Forward hook that writes the normalisation of this batch into the weights."""
    mean, deviation = outputs.mean(dim=(0, 2)), outputs.std(dim=(0, 2)).clamp(min=1e-6)
    if conv.bias is None:
        mean = torch.zeros_like(mean)
    else:
        conv.bias.copy_((conv.bias - mean) / deviation)
    conv.weight.div_(deviation[:, None, None])
    return (outputs - mean[:, None]) / deviation[:, None]
