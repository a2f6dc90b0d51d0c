"""The value head: the probability, token by token, that a solution will turn out correct."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Float32RMSNorm(nn.RMSNorm):
    """Computes in float32 even where the engine holds its weight in 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


class _Float32Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class ValueHead(nn.Module):
    """``V_i`` of the trunk's output at position ``i``: an RMSNorm of its own, then a linear layer or an MLP, float32.

    The last layer starts at zero, so that an untrained head says 0.5 everywhere (0 without the sigmoid) and every
    TD error but the last is 0.

    Args:
        hidden_size: D.
        type: "linear" (D → 1) or "mlp" (D → D, SiLU, D → 1).
        activation: "sigmoid" (keeps TD errors within [−1, 1]) or "none".

    Raises:
        ValueError: for another type or activation.
    """

    def __init__(
        self,
        hidden_size: int,
        type: Literal["linear", "mlp"] = "linear",
        activation: Literal["sigmoid", "none"] = "sigmoid",
    ):
        super().__init__()
        if type not in ("linear", "mlp"):
            raise ValueError(f"value_head.type must be 'linear' or 'mlp', not {type!r}")
        if activation not in ("sigmoid", "none"):
            raise ValueError(f"value_head.activation must be 'sigmoid' or 'none', not {activation!r}")
        self.activation = activation
        self.norm = _Float32RMSNorm(hidden_size, eps=1e-6)
        self.hidden = _Float32Linear(hidden_size, hidden_size) if type == "mlp" else None
        self.output = _Float32Linear(hidden_size, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, trunk_BSD: Tensor) -> Tensor:
        """``[B, S, D]`` of any dtype -> ``[B, S, 1]`` float32, after the activation."""
        with torch.autocast(trunk_BSD.device.type, enabled=False):
            x_BSD = self.norm(trunk_BSD)
            if self.hidden is not None:
                x_BSD = F.silu(self.hidden(x_BSD))
            value_BS1: Tensor = self.output(x_BSD)
        return value_BS1.sigmoid() if self.activation == "sigmoid" else value_BS1
