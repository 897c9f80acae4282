"""Moshi's language model with some of its transformer layers made hybrid.

Shapes: B batch rows, K codebooks (text first), S input frames.
"""

import warnings
from collections.abc import Sequence
from typing import Literal, cast, get_args

from moshi.models.lm import LMModel
from moshi.modules.streaming import StreamingModule
from moshi.modules.transformer import StreamingTransformer, StreamingTransformerLayer
from torch import Tensor

from moshi_ttt.attention import ChunkedAttention
from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid_layer import HybridStreamingTransformerLayer
from moshi_ttt.streaming import TTTStreamingState
from moshi_ttt.ttt_layer import TTTLayer

TTTMode = Literal["on", "frozen", "off"]
TTT_MODES: tuple[TTTMode, ...] = get_args(TTTMode)


class TTTLMModel(LMModel):
    """`LMModel` that tells its TTT layers which input frames are padding. Made by `patch_lm_model`."""

    def forward_text(
        self,
        sequence: Tensor,
        sum_condition: Tensor | None = None,
        cross_attention_src: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `LMModel.forward_text`; a frame whose codes are all zero tokens teaches nothing.

        Args:
            sequence: delayed codes, `[B, K, S]`.
        """
        layers = hybrid_layers(self).values()
        token_mask = (sequence != self.zero_token_id).any(dim=1)  # [B, S]
        for layer in layers:
            layer.token_mask = token_mask
        try:
            return super().forward_text(sequence, sum_condition, cross_attention_src)
        finally:
            for layer in layers:
                layer.token_mask = None


def patch_lm_model(lm_model: LMModel, layer_indices: Sequence[int], config: TTTConfig) -> None:
    """Add TTT layers to transformer layers of a Moshi model, in place.

    Raises:
        ValueError: the model has streamed before, is patched already, or an index does not exist.
    """
    num_layers = len(lm_model.transformer.layers)
    missing = [index for index in layer_indices if not 0 <= index < num_layers]
    if missing:
        raise ValueError(
            f"Layers {missing} do not exist, the model has {num_layers} (0 to {num_layers - 1})."
        )
    if isinstance(lm_model, TTTLMModel):
        raise ValueError("The model has TTT layers already.")
    for name, module in lm_model.named_modules():
        if isinstance(module, StreamingModule) and module._cached_children is not None:
            raise ValueError(
                f"{name or 'The model'} has streamed before, and Moshi keeps a list of its streaming modules "
                "from then on: add TTT layers before the first streaming()."
            )
    if not config.causal and layer_indices:
        warnings.warn(
            "TTT with causal=False: tokens see the future of their mini-batch. Losses look better than the "
            "model can be, and the model cannot stream.",
            stacklevel=2,
        )
    layers = transformer_layers(lm_model.transformer)
    for index in layer_indices:
        HybridStreamingTransformerLayer.from_layer(layers[index], config)
    for layer in layers:
        ChunkedAttention.from_attention(layer.self_attn)
    lm_model.__class__ = TTTLMModel


def set_ttt_mode(lm_model: LMModel, mode: TTTMode) -> None:
    """Choose what the memory of a model does, for comparisons.

    Args:
        lm_model: a patched model.
        mode: `on`; `frozen`: the fast weights stay at `W0`, without inner steps; `off`: as if the gate
            were 0, the layers are left out.

    Raises:
        ValueError: the model has no TTT layers, or there is no such mode.
    """
    if mode not in TTT_MODES:
        raise ValueError(f"There is no TTT mode {mode!r}, choose from {', '.join(TTT_MODES)}.")
    layers = hybrid_layers(lm_model)
    if not layers:
        raise ValueError("The model has no TTT layers.")
    for layer in layers.values():
        layer.ttt.frozen = mode == "frozen"
        layer.forward_ssm_gating.closed = mode == "off"


def ttt_mode(lm_model: LMModel) -> TTTMode:
    """The mode that `set_ttt_mode` chose; `off` without TTT layers."""
    layers = hybrid_layers(lm_model).values()
    if all(layer.forward_ssm_gating.closed for layer in layers):
        return "off"
    return "frozen" if any(layer.ttt.frozen for layer in layers) else "on"


def transformer_layers(transformer: StreamingTransformer) -> list[StreamingTransformerLayer]:
    """The layers of one of Moshi's transformers, stock or hybrid, in their order."""
    # torch knows the members of a ModuleList only as Module.
    return [cast(StreamingTransformerLayer, layer) for layer in transformer.layers]


def ttt_layers(lm_model: LMModel) -> dict[int, TTTLayer]:
    """The TTT layers of a model by the index of their transformer layer."""
    return {index: layer.ttt for index, layer in hybrid_layers(lm_model).items()}


def hybrid_layers(lm_model: LMModel) -> dict[int, HybridStreamingTransformerLayer]:
    """The transformer layers of a model that have a TTT layer, by their index."""
    return {
        index: layer
        for index, layer in enumerate(lm_model.transformer.layers)
        if isinstance(layer, HybridStreamingTransformerLayer)
    }


def streaming_states(lm_model: LMModel) -> dict[int, TTTStreamingState]:
    """The TTT states of a streaming model by the index of their transformer layer.

    Raises:
        ValueError: the model is not streaming, or has no TTT layers.
    """
    layers = ttt_layers(lm_model)
    if not layers:
        raise ValueError("The model has no TTT layers.")
    states = {}
    for index, layer in layers.items():
        if layer._streaming_state is None:
            raise ValueError(
                "The model is not streaming; call this inside `with model.streaming(batch_size):`."
            )
        states[index] = layer._streaming_state
    return states


def non_finite_resets(lm_model: LMModel) -> dict[int, list[int]]:
    """How often each row's memory was reset because it was no longer finite, by layer.

    Counted since the row's last own reset. Waits for the device.
    """
    return {index: state.num_broken.tolist() for index, state in streaming_states(lm_model).items()}
