"""The gate through which a TTT layer enters the residual stream."""

import torch
from torch import Tensor, nn

from moshi_ttt.config import TTTConfig


class SSMGating(nn.Module):
    """One learned gate per channel, `tanh(gating_alpha)`.

    Args:
        config: `model_dim`, `gating` (residual or blend), `gating_alpha_init`, `gating_trainable`.
        device, dtype: of `gating_alpha`, `[dim]`.

    Attributes:
        closed: as if every gate were 0, whatever the weights: the layer is left out.
    """

    def __init__(
        self, config: TTTConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.alpha_init = config.gating_alpha_init
        self.blend = config.gating == "blend"
        self.trainable = config.gating_trainable
        self.closed = False
        self.gating_alpha = nn.Parameter(
            torch.empty(config.model_dim, device=device, dtype=dtype), requires_grad=self.trainable
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every gate to `gating_alpha_init`."""
        self.gating_alpha.fill_(self.alpha_init)

    def forward(self, update: Tensor) -> Tensor:
        """`tanh(alpha) * update`, `[..., dim]`, in the dtype of update."""
        return (torch.tanh(self.gating_alpha) * update).to(update.dtype)

    def add_gated(self, x: Tensor, gated: Tensor) -> Tensor:
        """The sum of the residual stream x and a gated update, both `[..., dim]`, in the dtype of x.

        residual: `x + tanh(alpha) * update`, so a gate of 0 leaves x exactly as it is;
        blend: `(1 - tanh(alpha)) * x + tanh(alpha) * update`.
        """
        if self.blend:
            x = x - self(x)
        return x + gated.to(x.dtype)
