"""Statistics of TD errors and weights that add up over micro-batches and ranks; over decisions only."""

from typing import NamedTuple

import torch
from torch import Tensor

from wmtp_kernels.backend import backend


class Statistics(NamedTuple):
    """Of one micro-batch, in float64, on its device.

    Attributes:
        weights: ``[5]``, the :func:`moments` of the weights.
        td: ``[5]``, those of the TD errors or advantages; None where weights were given ready.
        entropy: ``[2]``, :func:`entropy_sums` of the weights.
    """

    weights: Tensor
    td: Tensor | None
    entropy: Tensor


def moments(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[count, Σx, Σx², −min, max]`` in float64 over the elements where ``mask`` is non-zero (None: all).

    The first three add up over parts of a batch; of the other two the larger is taken.
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


def decision_statistics(weights_BS: Tensor, decisions_BS: Tensor, td_BS: Tensor | None = None) -> Statistics:
    """All statistics of a micro-batch's decisions; one kernel where Triton runs.

    Args:
        weights_BS: float, the weight of each decision.
        decisions_BS: bool.
        td_BS: TD errors or advantages, if there are any.
    """
    if backend(weights_BS.device, weights_BS.dtype) == "triton":
        from wmtp_kernels import td_triton

        return Statistics(*td_triton.decision_statistics(weights_BS, decisions_BS, td_BS))
    td = None if td_BS is None else moments(td_BS, decisions_BS)
    return Statistics(moments(weights_BS, decisions_BS), td, entropy_sums(weights_BS, decisions_BS))
