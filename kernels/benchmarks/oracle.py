"""What every arm has to compute, in plain torch and float64: slow, in chunks of rows, and independent of the kernels.

Shapes: n heads, B sequences, S positions, D hidden, V vocabulary, N = n·B·S rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

import torch
from torch import Tensor

IGNORE_INDEX = -100
_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Truth:
    """A loss and its gradients: scalar, ``[N, D]`` and ``[V, D]``, float64."""

    loss: Tensor
    grad_hidden_ND: Tensor
    grad_weight_VD: Tensor


def chunks(rows: int) -> Iterator[slice]:
    """Parts of ``rows`` rows that are small enough to hold their logits."""
    return (slice(start, start + _CHUNK_ROWS) for start in range(0, rows, _CHUNK_ROWS))


@torch.no_grad()
def cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``logsumexp(W h_r) − W[y_r]·h_r`` of each row in ``dtype``, ``[N]``; 0 where the target is -100."""
    weight_VD = weight_VD.to(dtype)
    losses_N = torch.zeros(targets_N.shape, dtype=dtype, device=hidden_ND.device)
    for rows in chunks(targets_N.numel()):
        logits_RV = hidden_ND[rows].to(dtype) @ weight_VD.T
        at_target_R = logits_RV.gather(-1, targets_N[rows, None].clamp(min=0)).squeeze(-1)
        losses_N[rows] = logits_RV.logsumexp(-1) - at_target_R
    return losses_N.masked_fill_(targets_N == IGNORE_INDEX, 0.0)


@torch.no_grad()
def logit_gradient(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, coefficients_N: Tensor, dtype: torch.dtype
) -> Tensor:
    """``c_r·(softmax(W h_r) − onehot(y_r))``, ``[N, V]`` in ``dtype``; 0 where the target is -100."""
    live_N = (targets_N != IGNORE_INDEX).to(dtype) * coefficients_N.to(dtype)
    gradient_NV = (hidden_ND.to(dtype) @ weight_VD.to(dtype).T).softmax(-1)
    gradient_NV.scatter_add_(-1, targets_N[:, None].clamp(min=0), gradient_NV.new_full((len(targets_N), 1), -1.0))
    return gradient_NV.mul_(live_N[:, None])


@torch.no_grad()
def weighted_loss(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, coefficients_N: Tensor) -> Truth:
    """``Σ_r c_r·CE_r`` and its gradients, in float64.

    Args:
        hidden_ND: ``[N, D]``, any dtype: taken for exact.
        weight_VD: ``[V, D]``.
        targets_N: ``[N]`` int64, -100 ignored.
        coefficients_N: ``[N]``: weight times scale.
    """
    hidden_ND, weight_VD = hidden_ND.double(), weight_VD.double()
    losses_N = cross_entropy(hidden_ND, weight_VD, targets_N)
    grad_hidden_ND, grad_weight_VD = torch.zeros_like(hidden_ND), torch.zeros_like(weight_VD)
    for rows in chunks(targets_N.numel()):
        gradient_RV = logit_gradient(hidden_ND[rows], weight_VD, targets_N[rows], coefficients_N[rows], hidden_ND.dtype)
        grad_hidden_ND[rows] = gradient_RV @ weight_VD
        grad_weight_VD.addmm_(gradient_RV.T, hidden_ND[rows])
    return Truth((coefficients_N.double() * losses_N).sum(), grad_hidden_ND, grad_weight_VD)


def td_weights(
    values_BS: Tensor, rewards_B: Tensor, beta: float, low: float, high: float, td_lambda: float = 0.0
) -> Tensor:
    """``clip(exp(A/β))`` where every position is a decision, ``[B, S]``.

    ``δ_i = V_{i+1} − V_i``, ``R − V_i`` at the last one; ``A_i = δ_i + λ·A_{i+1}`` (undiscounted).
    """
    following_BS = torch.cat([values_BS[:, 1:], rewards_B[:, None]], dim=1)
    advantages_BS = following_BS - values_BS
    if td_lambda > 0:
        for i in reversed(range(values_BS.shape[1] - 1)):
            advantages_BS[:, i] += td_lambda * advantages_BS[:, i + 1]
    return (advantages_BS / beta).exp().clamp(low, high)


def kept(supervised: int, k_percent: float) -> int:
    """``⌈k·M⌉`` in exact decimal arithmetic."""
    return int((Decimal(repr(k_percent)) * supervised).to_integral_value(ROUND_CEILING))
