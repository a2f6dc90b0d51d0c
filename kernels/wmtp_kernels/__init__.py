"""Weighted cross-entropies of a linear layer that never hold all logits. Needs torch (and triton on a GPU) only."""

from wmtp_kernels.linear_cross_entropy import (
    IGNORE_INDEX,
    reference_cross_entropy,
    weighted_linear_cross_entropy,
)
from wmtp_kernels.rho1 import rho1_linear_cross_entropy

__all__ = [
    "IGNORE_INDEX",
    "reference_cross_entropy",
    "rho1_linear_cross_entropy",
    "weighted_linear_cross_entropy",
]
