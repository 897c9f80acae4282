"""Moshi's transformer layer with a TTT layer between attention and feed-forward.

Shapes: B batch rows, T frames.
"""

import torch
from moshi.modules.transformer import StreamingTransformerLayer
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from moshi_ttt.config import TTTConfig
from moshi_ttt.ssm_gating import SSMGating
from moshi_ttt.ttt_layer import TTTLayer


class HybridStreamingTransformerLayer(StreamingTransformerLayer):
    """Attention, cross-attention where the layer has it, TTT, feed-forward.

    Made from an existing layer by `from_layer`, never by its constructor: the layer keeps its identity,
    its parameters and their names, so stock checkpoints, adapters and references to it stay valid.

    Attributes:
        ttt: the TTT layer, streaming with the rest of the model.
        forward_ssm_gating: the gate of its update.
        token_mask: `[B, T]`, False where a frame of the coming forward pass is padding; None means that
            there is no padding. Set by the model and taken back after its forward pass.
    """

    ttt: TTTLayer
    forward_ssm_gating: SSMGating
    token_mask: Tensor | None
    _masks_of_inputs: WeakTensorKeyDictionary

    @classmethod
    def from_layer(
        cls, layer: StreamingTransformerLayer, config: TTTConfig
    ) -> "HybridStreamingTransformerLayer":
        """Turn `layer` into a hybrid layer, in place, on its own device and in its own dtype.

        Raises:
            ValueError: the layer is hybrid already, has other dimensions than the config, integer weights,
                or has streamed before (Moshi caches its streaming children, the new one would be left out).
        """
        if type(layer) is not StreamingTransformerLayer:
            raise ValueError(f"Expected a stock StreamingTransformerLayer, got {type(layer).__name__}.")
        if layer._cached_children is not None:
            raise ValueError("The layer has streamed before; add TTT layers before the first streaming().")
        scale = layer.norm2.alpha if hasattr(layer.norm2, "alpha") else layer.norm2.weight
        assert isinstance(scale, Tensor)
        dim = scale.shape[-1]
        if dim != config.model_dim:
            raise ValueError(f"The layer has width {dim}, the configuration model_dim {config.model_dim}.")
        reference = next(layer.parameters())
        if not reference.dtype.is_floating_point:
            raise ValueError(f"TTT layers cannot be added to a quantised layer ({reference.dtype}).")
        # Built first, so that a failure leaves the layer as it was.
        ttt = TTTLayer(config, device=reference.device, dtype=reference.dtype)
        gating = SSMGating(config, device=reference.device, dtype=reference.dtype)
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer.ttt = ttt.train(layer.training)
        layer.forward_ssm_gating = gating.train(layer.training)
        layer.token_mask = None
        layer._masks_of_inputs = WeakTensorKeyDictionary()
        return layer

    def __call__(self, x: Tensor, cross_attention_src: Tensor | None = None) -> Tensor:
        """As Moshi's layer, `[B, T, dim]` to `[B, T, dim]`."""
        # Gradient checkpointing calls the layer again during backward, when the model's mask is gone or is
        # that of a later pass. It does so with the same input tensor, so the mask is kept with that; not in
        # `forward`, because FSDP's hooks hand that another tensor each time.
        if self.token_mask is not None:
            self._masks_of_inputs[x] = self.token_mask
        with self.ttt.passing(token_mask=self._masks_of_inputs.get(x)):
            return super().__call__(x, cross_attention_src)

    def _ff_block(self, x: Tensor) -> Tensor:
        # The last block of Moshi's forward, so this runs after attention and cross-attention.
        gating = self.forward_ssm_gating
        if gating.closed:
            return super()._ff_block(x)
        gated = gating(self.ttt(x))
        state = self.ttt._streaming_state
        if state is not None:
            size = torch.linalg.vector_norm(gated, dim=(1, 2), dtype=state.activity.dtype)
            residual = torch.linalg.vector_norm(x, dim=(1, 2), dtype=state.activity.dtype)
            state.activity.copy_(torch.where(state.exec_mask, size / (residual + 1e-6), state.activity))
        return super()._ff_block(gating.add_gated(x, gated))
