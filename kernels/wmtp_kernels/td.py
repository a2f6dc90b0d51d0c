"""Temporal-difference errors of a value head, and the per-token weights made of them.

Everything here is a pure, differentiable function of tensors. Shapes: ``B`` sequences, ``S`` tokens. A *decision*
is a position ``i`` that emits a supervised token (token ``i + 1``); ``i*`` is a sequence's last decision.
The stages detach the values first, so that weights carry no gradient. The kernels in :mod:`wmtp_kernels.td_triton`
compute the same, and are tested against this.
"""

import math

import torch
from torch import Tensor


def _as_values(value_logits: Tensor) -> Tensor:
    """``[B, S, 1]`` -> ``[B, S]``, in float32 or better."""
    if value_logits.dim() != 3 or value_logits.shape[-1] != 1:
        raise ValueError(f"values must have shape [B, S, 1], not {list(value_logits.shape)}")
    values_BS = value_logits.squeeze(-1)
    return values_BS if values_BS.dtype == torch.float64 else values_BS.float()


def _as_decisions(attention_mask: Tensor | None, values_BS: Tensor) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(values_BS, dtype=torch.bool)
    if attention_mask.shape != values_BS.shape:
        raise ValueError(
            f"the mask of decisions must have shape {list(values_BS.shape)}, not {list(attention_mask.shape)}"
        )
    return attention_mask.bool()


def last_decisions(decisions_BS: Tensor) -> Tensor:
    """Mark ``i*``, the last decision of each sequence: bool ``[B, S]``, at most one True a row."""
    remaining_BS = decisions_BS.flip(-1).cumsum(-1).flip(-1)
    return decisions_BS & (remaining_BS == 1)


def _shift_left(x_BS: Tensor, by: int) -> Tensor:
    """``y[:, i] = x[:, i + by]``, zero beyond the end."""
    return torch.nn.functional.pad(x_BS[:, by:], (0, min(by, x_BS.shape[-1])))


def compute_td_errors(
    value_logits: Tensor, rewards: Tensor, gamma: float = 1.0, attention_mask: Tensor | None = None
) -> Tensor:
    r"""TD errors (Sutton & Barto, Reinforcement Learning, eq. 6.5) with a reward at the end alone.

    ``δ_i = γ·V_{i+1} − V_i`` for decisions ``i < i*``; ``δ_{i*} = R − V_{i*}``, since a terminal state is worth 0;
    0 where there is no decision. With V and R in [0, 1] and γ in [0, 1], δ lies in [−1, 1].

    Args:
        value_logits: ``[B, S, 1]``, the values *after* the value head's activation.
        rewards: ``[B]``, R of each sequence.
        gamma: discount γ.
        attention_mask: ``[B, S]``, non-zero at decisions; None means that every position is one.

    Returns:
        ``[B, S]`` float32 (float64 if the values are), differentiable in values and rewards.

    Raises:
        ValueError: if shapes do not fit.
    """
    values_BS = _as_values(value_logits)
    if rewards.shape != values_BS.shape[:1]:
        raise ValueError(f"rewards must have shape {list(values_BS.shape[:1])}, not {list(rewards.shape)}")
    decisions_BS = _as_decisions(attention_mask, values_BS)
    following_BS = torch.where(
        last_decisions(decisions_BS),
        rewards.to(values_BS.dtype)[:, None],
        gamma * _shift_left(values_BS, 1),
    )
    # `where`, not a product: an infinite or NaN value at a masked position must not leak.
    return torch.where(decisions_BS, following_BS - values_BS, 0.0)


def compute_gae(
    value_logits: Tensor,
    rewards: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    attention_mask: Tensor | None = None,
) -> Tensor:
    r"""Generalised advantage estimates (Schulman et al. 2016, eq. 16): ``A_i = Σ_l (γλ)^l δ_{i+l}``.

    The sum runs over the sequence's decisions (δ is 0 elsewhere). ``lam=0`` gives the TD errors themselves.
    Computed by doubling, ``A ← A + c^d·shift(A, d)`` for d = 1, 2, 4, …: log2(S) steps instead of S, and exact,
    since each pass doubles the number of terms summed.

    Args, Returns, Raises: as :func:`compute_td_errors`; ``lam`` is λ.
    """
    advantages_BS = compute_td_errors(value_logits, rewards, gamma, attention_mask)
    decay = gamma * lam
    span, length = 1, advantages_BS.shape[-1]
    while span < length and decay != 0.0:
        advantages_BS = advantages_BS + decay**span * _shift_left(advantages_BS, span)
        span *= 2
    decisions_BS = _as_decisions(attention_mask, advantages_BS)
    return torch.where(decisions_BS, advantages_BS, 0.0)


def discounted_returns(decisions_BS: Tensor, rewards_B: Tensor, gamma: float = 1.0) -> Tensor:
    """``γ^(i*−i)·R`` on decisions, 0 elsewhere: what is still to be earned from position ``i`` on.

    Args:
        decisions_BS: bool ``[B, S]``.
        rewards_B: ``[B]``.
        gamma: discount γ.

    Returns:
        ``[B, S]`` in the dtype of the rewards.
    """
    positions_S = torch.arange(decisions_BS.shape[-1], device=decisions_BS.device)
    last_B1 = torch.where(decisions_BS, positions_S, 0).amax(-1, keepdim=True)
    distance_BS = (last_B1 - positions_S).clamp(min=0).to(rewards_B.dtype)
    return torch.where(decisions_BS, rewards_B[:, None] * gamma**distance_BS, 0.0)


def build_weights(td_errors: Tensor, beta: float = 0.9, min_weight: float = 0.1, max_weight: float = 5.0) -> Tensor:
    r"""``w = clip(exp(δ/β), min_weight, max_weight)`` (Peng et al. 2019, AWR, eq. 9; Kostrikov et al. 2021, IQL).

    Args:
        td_errors: TD errors (or advantages), any shape.
        beta: temperature β > 0; the smaller, the more extreme the weights.
        min_weight: lower clip, ≥ 0.
        max_weight: upper clip, ≥ ``min_weight``.

    Returns:
        Same shape and dtype; differentiable where it is not clipped, with gradient 0 where it is.

    Raises:
        ValueError: if ``beta`` is not positive or the clip is not an interval of non-negative numbers.
    """
    return weights_from_log(td_errors / _positive(beta), min_weight, max_weight)


def weights_from_log(log_weights: Tensor, min_weight: float, max_weight: float) -> Tensor:
    """``clip(exp(x), min_weight, max_weight)`` without overflow, in value or in gradient."""
    if not 0.0 <= min_weight <= max_weight:
        raise ValueError(f"weight clip must satisfy 0 <= min <= max, not [{min_weight}, {max_weight}]")
    low = math.log(min_weight) if min_weight > 0 else -math.inf
    high = math.log(max_weight) if max_weight > 0 else -math.inf
    # Clipped before the exponential: exp(1000) is infinite, and its gradient times 0 is NaN.
    # Clipped after it too: exp(log(5)) may round to just above 5.
    return log_weights.clamp(low, high).exp().clamp(min_weight, max_weight)


def _positive(beta: float) -> float:
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    return beta
