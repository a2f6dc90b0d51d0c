r"""The policy loss of all heads, with TD weights that are computed where they are used.

``L = Σ_k s_k · Σ_i w_{i+k−1}·CE_{i,k}``: the target of head ``k`` at position ``i`` is token ``i + k``, and weighs
what the decision that emits it weighs, ``w_j = clip(exp(δ_j/β))`` (Peng et al. 2019, AWR, eq. 9; Gloeckle et al. 2024,
eq. 2). In Triton δ, exponential and clip happen in the kernel that turns logits into gradients: a program that has a
row of V logits to read computes a weight of three numbers on the way. Advantages over several steps (GAE) need a scan
over the sequence first, a kernel of its own (:mod:`wmtp_kernels.td_triton`).
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp_kernels.backend import backend, row_operations
from wmtp_kernels.chunked_linear import ChunkedLinear, check_layer, exact_dtype, formed_in_forward, learned
from wmtp_kernels.constants import IGNORE_INDEX
from wmtp_kernels.linear_cross_entropy import weighted_chunks
from wmtp_kernels.statistics import Statistics, decision_statistics
from wmtp_kernels.td import compute_gae, compute_td_errors, weights_from_log


class Standardisation(NamedTuple):
    """``log w = (δ − shift)/(scale·β) − log_mean``: scalars (0-dim tensors or floats), the same on every rank."""

    shift: Tensor | float = 0.0
    scale: Tensor | float = 1.0
    log_mean: Tensor | float = 0.0

    def weights(self, advantages: Tensor, beta: float, min_weight: float, max_weight: float) -> Tensor:
        """Standardise, exponentiate, rescale, and clip once; any shape."""
        if not beta > 0:
            raise ValueError(f"beta must be positive, not {beta}")
        log_weights = (advantages - self.shift) / (self.scale * beta) - self.log_mean
        return weights_from_log(log_weights, min_weight, max_weight)

    def constants(self, beta: float, device: torch.device) -> Tensor:
        """``[shift, scale·β, log_mean]`` in float32, without waiting for the device."""
        numbers = (self.shift, self.scale * beta, self.log_mean)
        return torch.stack([_scalar(number, device) for number in numbers])


def _scalar(number: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.detach().to(device, torch.float32)
    return torch.full((), number, dtype=torch.float32, device=device)


@dataclass(frozen=True, eq=False)
class TDWeights:
    """What the weights of decisions are made of; no gradient flows to any of it.

    Attributes:
        values_BS: ``[B, S]`` float, values after their activation.
        rewards_B: ``[B]`` float.
        decisions_BS: ``[B, S]`` bool.
        beta: temperature, > 0.
        min_weight, max_weight: the clip, 0 ≤ min ≤ max.
        gamma: discount γ.
        td_lambda: λ; 0 weighs by TD errors, more by GAE.
        standardisation: constants of z-scores and mean-1 weights, over the global batch.

    Raises:
        ValueError: if shapes do not fit or a number is out of range.
    """

    values_BS: Tensor
    rewards_B: Tensor
    decisions_BS: Tensor
    beta: float = 0.9
    min_weight: float = 0.1
    max_weight: float = 5.0
    gamma: float = 1.0
    td_lambda: float = 0.0
    standardisation: Standardisation = field(default_factory=Standardisation)

    def __post_init__(self) -> None:
        shape = self.values_BS.shape
        if len(shape) != 2 or self.decisions_BS.shape != shape or self.rewards_B.shape != shape[:1]:
            raise ValueError(
                f"values {list(shape)}, decisions {list(self.decisions_BS.shape)} and rewards "
                f"{list(self.rewards_B.shape)} must be [B, S], [B, S] and [B]"
            )
        if not self.values_BS.device == self.rewards_B.device == self.decisions_BS.device:
            raise ValueError(
                f"values, rewards and decisions must be on one device, not {self.values_BS.device}, "
                f"{self.rewards_B.device} and {self.decisions_BS.device}"
            )
        if self.decisions_BS.dtype != torch.bool:
            raise ValueError(f"decisions must be bool, not {self.decisions_BS.dtype}")
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, not {self.beta}")
        if not 0.0 <= self.min_weight <= self.max_weight:
            raise ValueError(f"weight clip must satisfy 0 <= min <= max, not [{self.min_weight}, {self.max_weight}]")

    @torch.no_grad()
    def advantages(self) -> Tensor:
        """TD errors, or GAE if ``td_lambda > 0``: ``[B, S]``, 0 where there is no decision."""
        if backend(self.values_BS.device, self.values_BS.dtype) == "triton":
            from wmtp_kernels import td_triton

            return td_triton.advantages(self.values_BS, self.rewards_B, self.decisions_BS, self.gamma, self.td_lambda)
        values, rewards = self.values_BS.detach()[..., None], self.rewards_B.detach()
        if self.td_lambda > 0:
            return compute_gae(values, rewards, self.gamma, self.td_lambda, self.decisions_BS)
        return compute_td_errors(values, rewards, self.gamma, self.decisions_BS)


@torch.no_grad()
def decision_weights(td: TDWeights) -> tuple[Tensor, Tensor]:
    """δ (or the advantage) and the weight of each decision, ``[B, S]`` each, 0 elsewhere; one kernel in Triton."""
    device = td.values_BS.device
    if backend(device, td.values_BS.dtype) == "triton":
        from wmtp_kernels import td_triton

        return td_triton.decision_weights(
            td.values_BS, td.rewards_B, td.decisions_BS, td.gamma, td.td_lambda,
            td.standardisation.constants(td.beta, device), td.min_weight, td.max_weight,
        )  # fmt: skip
    td_BS = td.advantages()
    weights_BS = td.standardisation.weights(td_BS, td.beta, td.min_weight, td.max_weight)
    return td_BS, torch.where(td.decisions_BS, weights_BS, 0.0)


def per_head(x_BS: Tensor, n: int, first: int = 0) -> Tensor:
    """``y[k − 1, :, i] = x[:, i + k − 1 + first]``, 0 beyond the end: ``[B, S]`` -> ``[n, B, S]``.

    With ``first=0``: the weight of head ``k``'s target at ``i`` is that of the decision which emits it, ``w_{i+k−1}``.
    With ``first=1``: a quantity of the target token itself, such as its reference loss ``r_{i+k}``.
    """
    length = x_BS.shape[1]
    y_nBS = x_BS.new_zeros((n, *x_BS.shape))
    for head in range(n):
        shift = head + first
        if shift < length:
            y_nBS[head, :, : length - shift] = x_BS[:, shift:]
    return y_nBS


class WeightedLoss(NamedTuple):
    """What :func:`td_weighted_linear_cross_entropy` returns.

    Attributes:
        loss: scalar, ``Σ_k s_k·losses_k``, differentiable once in hidden states and unembedding.
        losses_n: ``[n]``, ``Σ w·CE`` of each head.
        statistics: moments of weights and TD errors over decisions.
        weights_BS: ``[B, S]``, the weight of each decision (head 1 has a target there), 0 elsewhere; or as given.
        td_BS: ``[B, S]``, its TD error or advantage; None where weights were given ready.
    """

    loss: Tensor
    losses_n: Tensor
    statistics: Statistics
    weights_BS: Tensor
    td_BS: Tensor | None


def td_weighted_linear_cross_entropy(
    hidden_nBSD: Tensor,
    weight_VD: Tensor,
    targets_nBS: Tensor,
    weights: TDWeights | Tensor,
    *,
    scales_n: Tensor | None = None,
    counts_nB: Tensor | None = None,
) -> WeightedLoss:
    """Weighted cross-entropy of all heads through a linear layer whose logits are never all in memory.

    Args:
        hidden_nBSD: ``[n, B, S, D]`` hidden states of the heads, after the final norm.
        weight_VD: ``[V, D]`` unembedding, same dtype.
        targets_nBS: ``[n, B, S]`` int64; head ``k`` at ``i`` has token ``i + k``, or ``-100`` if nothing is to learn.
        weights: what the weights are made of, or the ready weight of each decision, ``[B, S]``.
        scales_n: ``[n]`` factor of each head (``1/(n·M_k)``), applied in float32; 1 if None.
        counts_nB: int64 ``[n, B]`` *on the host*: the supervised targets of each head and sequence, if known. A GPU
            then leaves out the others' rows without being waited for. Not needed on a CPU.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
        RuntimeError: if the unembedding is not gathered (ZeRO-3), or on a second backward.
    """
    n, batch, length, dim = hidden_nBSD.shape
    given = weights if isinstance(weights, Tensor) else weights.values_BS
    if targets_nBS.shape != (n, batch, length) or given.shape != (batch, length):
        raise ValueError(
            f"targets {list(targets_nBS.shape)} and weights {list(given.shape)} must be {[n, batch, length]} and "
            f"{[batch, length]}"
        )
    flat_hidden_ND, targets_N, exact = (
        hidden_nBSD.reshape(-1, dim),
        targets_nBS.reshape(-1),
        exact_dtype(weight_VD.dtype),
    )
    check_layer(flat_hidden_ND, weight_VD, targets=targets_N)
    if given.device != targets_N.device:
        raise ValueError(f"weights must be on the hidden states' device, {targets_N.device}, not {given.device}")
    scales_N = head_rows(scales_n, targets_nBS, exact)
    count = None if counts_nB is None else sum(check_counts(counts_nB, targets_nBS).flatten().tolist())
    rows_M = row_operations(flat_hidden_ND).visited_rows(targets_N, count)
    in_triton = backend(targets_N.device, flat_hidden_ND.dtype) == "triton"

    def operation(hidden_ND: Tensor, weight_VD: Tensor, **wanted: bool) -> tuple[ChunkedLinear, tuple[Tensor, ...]]:
        linear = ChunkedLinear(hidden_ND, weight_VD, scales_N, rows=rows_M, **wanted)
        if isinstance(weights, TDWeights) and linear.wants_gradient and in_triton:
            losses_N, weights_N, td_N = _td_chunks(linear, targets_N, weights)
            # Of the targets of head 1 each is emitted by a decision of its own.
            ready: tuple[Tensor, ...] = tuple(x_N.view(n, batch, length)[0].clone() for x_N in (td_N, weights_N))
        else:
            ready = (weights.detach(),) if isinstance(weights, Tensor) else decision_weights(weights)
            weights_N = learned(targets_N, per_head(ready[-1], n).reshape(-1), exact)
            losses_N = weighted_chunks(linear, targets_N, weights_N)
        weighted_N = weights_N * losses_N
        return linear, ((scales_N * weighted_N).sum(), weighted_N.view(n, -1).sum(1), *ready)

    loss, losses_n, *td, weights_BS = formed_in_forward(operation, flat_hidden_ND, weight_VD)
    decided_BS = targets_nBS[0] != IGNORE_INDEX
    td_BS = td[0].masked_fill(~decided_BS, 0.0) if td else None
    if td_BS is not None:
        weights_BS = weights_BS.masked_fill(~decided_BS, 0.0)
    statistics = decision_statistics(weights_BS, decided_BS, td_BS)
    return WeightedLoss(loss, losses_n, statistics, weights_BS, td_BS)


def check_counts(counts_nB: Tensor, targets_nBS: Tensor) -> Tensor:
    """The counts, if they can be used without waiting for a device.

    Raises:
        ValueError: if they are of another shape, or not on the host.
    """
    if counts_nB.shape != targets_nBS.shape[:2] or counts_nB.device.type != "cpu":
        raise ValueError(
            f"counts must be {list(targets_nBS.shape[:2])} on the CPU, not {list(counts_nB.shape)} on "
            f"{counts_nB.device}"
        )
    return counts_nB


def head_rows(scales_n: Tensor | None, targets_nBS: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor of each row of the flattened ``[n, B, S]``: its head's, 0 where there is no target."""
    n = len(targets_nBS)
    if scales_n is None:
        scales_n = torch.ones(n, dtype=dtype, device=targets_nBS.device)
    if scales_n.shape != (n,):
        raise ValueError(f"scales must have shape [{n}], one for each head, not {list(scales_n.shape)}")
    if scales_n.device != targets_nBS.device:
        raise ValueError(f"scales must be on the targets' device, {targets_nBS.device}, not {scales_n.device}")
    rows_N = scales_n[:, None].expand(n, targets_nBS[0].numel()).reshape(-1)
    return learned(targets_nBS.reshape(-1), rows_N, dtype)


def _td_chunks(linear: ChunkedLinear, targets_N: Tensor, td: TDWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, weight and δ of each row, with δ, exponential and clip inside the row kernel."""
    from wmtp_kernels.rows_triton import TDSource, td_weighted_

    source = TDSource(
        values_BS=td.values_BS.detach().float().contiguous(),
        rewards_B=td.rewards_B.detach().float().contiguous(),
        last_B=_last(td.decisions_BS),
        advantages_BS=td.advantages() if td.td_lambda > 0 else None,
        decisions_BS=td.decisions_BS.contiguous(),
        constants_3=td.standardisation.constants(td.beta, targets_N.device),
        gamma=td.gamma,
        min_weight=td.min_weight,
        max_weight=td.max_weight,
    )
    found_3N = torch.zeros(3, len(targets_N), dtype=torch.float32, device=targets_N.device)
    for rows_R in linear.chunks():
        logits_RV = linear.logits(rows_R)
        for whole_N, chunk_R in zip(found_3N, td_weighted_(logits_RV, targets_N[rows_R], source, rows_R), strict=True):
            whole_N[rows_R] = chunk_R
        linear.add(logits_RV, rows_R)
    losses_N, weights_N, td_N = found_3N
    return losses_N, weights_N, td_N


def _last(decisions_BS: Tensor) -> Tensor:
    """The place of each sequence's last decision, int64 ``[B]``; some other place where there is none."""
    if not decisions_BS.numel():
        return decisions_BS.new_zeros(len(decisions_BS), dtype=torch.int64)
    places_S = torch.arange(decisions_BS.shape[1], device=decisions_BS.device)
    return torch.where(decisions_BS, places_S, 0).amax(-1)
