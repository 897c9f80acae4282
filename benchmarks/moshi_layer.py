"""One transformer layer of Moshi with random weights, with and without TTT.

Shapes: B batch rows, T frames, H heads, D head_dim, dim = H * D.
"""

from collections.abc import Iterable

import torch
from moshi.models import loaders
from moshi.models.lm import LMModel
from moshi.modules.transformer import StreamingTransformerLayer
from torch import nn

from benchmarks.common.settings import Settings
from finetune.demo.tiny_moshi import tiny_moshi_config
from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid_layer import HybridStreamingTransformerLayer
from moshi_ttt.hybrid_model import transformer_layers

_STD = 0.02


def ttt_config(settings: Settings) -> TTTConfig:
    """The TTT layer that fits the Moshi layer."""
    return TTTConfig(model_dim=128, num_heads=4) if settings.quick else TTTConfig()


def make_stock_layer(settings: Settings) -> StreamingTransformerLayer:
    """A layer with the shapes of Moshi 7B (`settings.quick`: of the demo's Moshi), 205.5 M parameters."""
    layer = _meta_layer(settings).to_empty(device=settings.device)
    generator = torch.Generator(settings.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("alpha"):  # the scale of a norm
                parameter.fill_(1)
            else:
                parameter.normal_(std=_STD, generator=generator)
    return layer


def add_ttt(layer: StreamingTransformerLayer, settings: Settings) -> HybridStreamingTransformerLayer:
    """A second layer that has the parameters of `layer`, the same tensors, and a TTT layer of its own."""
    twin = _meta_layer(settings)
    for name, parameter in layer.named_parameters():
        path, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(path), leaf, parameter)
    return HybridStreamingTransformerLayer.from_layer(twin, ttt_config(settings))


def num_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Numbers in all of them."""
    return sum(parameter.numel() for parameter in parameters)


def _meta_layer(settings: Settings) -> StreamingTransformerLayer:
    """As `LMModel` makes it, without memory."""
    lm_kwargs = tiny_moshi_config(text_card=48, card=20) if settings.quick else dict(loaders._lm_kwargs)
    lm_kwargs |= {"num_layers": 1, "depformer_num_layers": 1}
    with torch.device("meta"):
        model = LMModel(device="meta", dtype=settings.dtype, **lm_kwargs)
    return transformer_layers(model.transformer)[0]
