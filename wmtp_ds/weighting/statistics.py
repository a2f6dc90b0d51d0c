"""Statistics of TD errors and weights, over decisions only.

A statistic over the global batch is made of *moments* that add up over micro-batches and ranks, so that what is
logged does not depend on how the batch was cut.
"""

import torch
from torch import Tensor

# Count, sum, sum of squares: these add. Minus the minimum, and the maximum: of these the larger is taken.
ADDITIVE = 3
N_MOMENTS = 5


def moments(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[count, Σx, Σx², −min, max]`` in float64 over the elements where ``mask`` is non-zero (None: all).

    An empty selection gives ``[0, 0, 0, −inf, −inf]``. Stays on the device.
    """
    x = x.detach().double()
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    kept = torch.where(keep, x, 0.0)
    extreme_low = torch.where(keep, -x, -torch.inf)
    extreme_high = torch.where(keep, x, -torch.inf)
    if x.numel() == 0:
        return torch.tensor([0.0, 0.0, 0.0, -torch.inf, -torch.inf], dtype=torch.float64, device=x.device)
    return torch.stack([keep.sum().double(), kept.sum(), (kept**2).sum(), extreme_low.max(), extreme_high.max()])


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


def entropy_sums(weights_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """``[Σ entropies, number of sequences with decisions]``, float64.

    The entropy of a sequence is that of ``w/Σw`` over its decisions, natural logarithm, in [0, log(#decisions)].
    A sequence whose weights are all 0 counts with entropy 0.
    """
    weights_BS = weights_BS.detach().double()
    keep_BS = torch.ones_like(weights_BS, dtype=torch.bool) if mask_BS is None else mask_BS.bool()
    kept_BS = torch.where(keep_BS, weights_BS, 0.0)
    totals_B1 = kept_BS.sum(-1, keepdim=True)
    shares_BS = torch.where(totals_B1 > 0, kept_BS / totals_B1, 0.0)
    entropies_B = torch.special.entr(shares_BS).sum(-1)
    has_decisions_B = keep_BS.any(-1)
    return torch.stack([(entropies_B * has_decisions_B).sum(), has_decisions_B.sum().double()])


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
