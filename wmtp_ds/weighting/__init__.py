"""Which tokens matter: TD errors, GAE, Rho-1 selection and their statistics, as pure functions of tensors."""

from wmtp_ds.weighting.rho1 import select_topk
from wmtp_ds.weighting.statistics import compute_td_stats, compute_weight_stats
from wmtp_ds.weighting.td import build_weights, compute_gae, compute_td_errors

__all__ = [
    "build_weights",
    "compute_gae",
    "compute_td_errors",
    "compute_td_stats",
    "compute_weight_stats",
    "select_topk",
]
