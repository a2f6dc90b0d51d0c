"""Statistics of TD errors and weights, over decisions only.

A statistic over the global batch is made of *moments* that add up over micro-batches and ranks, so that what is
logged does not depend on how the batch was cut.
"""

import torch
from torch import Tensor

from wmtp_kernels.statistics import entropy_sums, moments

# Count, sum, sum of squares: these add. Minus the minimum, and the maximum: of these the larger is taken.
ADDITIVE = 3
N_MOMENTS = 5


def merge_moments(first: Tensor, second: Tensor) -> Tensor:
    """Moments of the union of two sets."""
    return torch.cat([first[:ADDITIVE] + second[:ADDITIVE], torch.maximum(first[ADDITIVE:], second[ADDITIVE:])])


def describe(moments_: Tensor, prefix: str) -> dict[str, float]:
    """``{prefix}_mean``, ``_std`` (the population's), ``_min``, ``_max`` from moments; all 0 if nothing was counted."""
    count, total, squares, negative_low, high = moments_.tolist()
    if count == 0:
        return {f"{prefix}_{name}": 0.0 for name in ("mean", "std", "min", "max")}
    mean = total / count
    return {
        f"{prefix}_mean": mean,
        f"{prefix}_std": max(squares / count - mean**2, 0.0) ** 0.5,
        f"{prefix}_min": -negative_low,
        f"{prefix}_max": high,
    }


def compute_td_stats(td_errors: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """``td_mean``, ``td_std`` (population), ``td_min``, ``td_max`` over decisions.

    Args:
        td_errors: ``[B, S]``.
        mask: ``[B, S]``, non-zero at decisions; None means all.

    Returns:
        Python floats; all 0 if there is no decision.
    """
    return describe(moments(td_errors, mask), "td")


def compute_weight_stats(weights: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """``weight_mean``, ``weight_std``, ``weight_min``, ``weight_max`` over decisions, and ``weight_entropy``.

    The entropy is the mean over the sequences that have decisions; see :func:`entropy_sums`.

    Args:
        weights: ``[B, S]``.
        mask: ``[B, S]``, non-zero at decisions; None means all.

    Returns:
        Python floats; all 0 if there is no decision.
    """
    total, sequences = entropy_sums(weights, mask).tolist()
    entropy = total / sequences if sequences else 0.0
    return {**describe(moments(weights, mask), "weight"), "weight_entropy": entropy}


__all__ = [
    "ADDITIVE",
    "N_MOMENTS",
    "compute_td_stats",
    "compute_weight_stats",
    "describe",
    "entropy_sums",
    "merge_moments",
    "moments",
]
