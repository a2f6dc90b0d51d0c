"""Weighted cross-entropies of a linear layer that never hold all logits. Needs torch (and triton on a GPU) only."""

from wmtp_kernels.backend import backend
from wmtp_kernels.constants import IGNORE_INDEX
from wmtp_kernels.linear_cross_entropy import reference_cross_entropy, weighted_linear_cross_entropy
from wmtp_kernels.rho1 import rho1_linear_cross_entropy
from wmtp_kernels.td_linear_cross_entropy import (
    Standardisation,
    TDWeights,
    WeightedLoss,
    decision_weights,
    td_weighted_linear_cross_entropy,
)

__all__ = [
    "IGNORE_INDEX",
    "Standardisation",
    "TDWeights",
    "WeightedLoss",
    "backend",
    "decision_weights",
    "reference_cross_entropy",
    "rho1_linear_cross_entropy",
    "td_weighted_linear_cross_entropy",
    "weighted_linear_cross_entropy",
]
