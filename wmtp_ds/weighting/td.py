"""Temporal-difference errors of a value head, and the per-token weights made of them: see :mod:`wmtp_kernels.td`."""

from wmtp_kernels.td import (
    build_weights,
    compute_gae,
    compute_td_errors,
    discounted_returns,
    last_decisions,
    weights_from_log,
)

__all__ = [
    "build_weights",
    "compute_gae",
    "compute_td_errors",
    "discounted_returns",
    "last_decisions",
    "weights_from_log",
]
