"""TD weights whose scale is set by the whole global batch: z-scores and mean 1.

Both need the advantages of every micro-batch and rank before the first weight is known, hence a value pass without
gradient over the accumulation window.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wmtp_kernels import Standardisation

Reduce = Callable[[Tensor], Tensor]


def standardisation(
    advantages: Sequence[Tensor],
    decisions: Sequence[Tensor],
    *,
    beta: float,
    zscore: bool,
    mean1: bool,
    reduce_sum: Reduce,
    reduce_max: Reduce,
) -> Standardisation:
    """The constants that z-scores and mean-1 weights need, over the decisions of the global batch.

    Args:
        advantages: δ (or GAE) of each micro-batch of this rank, ``[B, S]``.
        decisions: bool masks of the same shapes.
        beta: temperature of the exponential.
        zscore: subtract the mean and divide by the (population) standard deviation before the exponential. Where all
            δ are equal they become 0.
        mean1: rescale the exponentials to mean 1, before they are clipped.
        reduce_sum: sums a float64 tensor over ranks.
        reduce_max: its maximum over ranks.

    Returns:
        Scalars in float64.
    """
    # Masked, not picked out: how many there are would have to be waited for on a GPU.
    all_N = torch.cat([a.detach().flatten() for a in advantages]).double()
    chosen_N = torch.cat([d.bool().flatten() for d in decisions])

    def total(values_N: Tensor) -> Tensor:
        return reduce_sum(torch.where(chosen_N, values_N, 0.0).sum())

    count = reduce_sum(chosen_N.sum().double()).clamp(min=1.0)
    shift, scale = all_N.new_zeros(()), all_N.new_ones(())
    if zscore:
        shift = total(all_N) / count
        # Two passes: the squares of small differences would drown in the square of a large mean.
        spread = (total((all_N - shift) ** 2) / count).sqrt()
        # Where all are equal, what is left is the rounding of their mean, which must not be blown up to ±1.
        scale = torch.where(spread > 1e-12 * shift.abs(), spread, 1.0)
    log_mean = all_N.new_zeros(())
    if mean1:
        logs_N = (all_N - shift) / (scale * beta)
        largest = reduce_max(torch.where(chosen_N, logs_N, -torch.inf).amax())
        largest = torch.where(largest.isfinite(), largest, 0.0)
        # An all-masked batch has no mean; log_mean stays finite and multiplies nothing.
        weight = total((logs_N - largest).exp())
        log_mean = torch.where(weight > 0, largest + (weight / count).log(), 0.0)
    return Standardisation(shift, scale, log_mean)


__all__ = ["Standardisation", "standardisation"]
