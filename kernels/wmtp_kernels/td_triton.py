"""TD errors, GAE, weights and their statistics as Triton kernels: one program takes one sequence."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wmtp_kernels.rows_triton import clipped_exponential, launch

_BLOCK = 1024
_STATISTICS_BLOCK = 256  # sums in float64 take many registers


def _block(length: int, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(length)))


@triton.jit
def _discounted(decay_right, sum_right, decay_left, sum_left):
    """``A_i = δ_i + c·A_{i+1}``, associatively: what lies to the right comes first, since the scan runs leftwards."""
    return decay_right * decay_left, sum_left + decay_left * sum_right


@triton.jit
def _advantage_kernel(
    values,
    rewards,
    decisions,
    advantages,
    weights,
    constants,
    length,
    gamma,
    decay,
    least,
    most,
    SCAN: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    begin = sequence * length
    reward = tl.load(rewards + sequence)
    last = -1
    carry = 0.0
    blocks = tl.cdiv(length, BLOCK)
    for done in range(blocks):
        # From the right: the first decision met is the last one of the sequence, and sums come from there.
        i = (blocks - 1 - done) * BLOCK + tl.arange(0, BLOCK)
        inside = i < length
        decided = tl.load(decisions + begin + i, mask=inside, other=0) != 0
        last = tl.where(last < 0, tl.max(tl.where(decided, i, -1), 0), last)
        # Masked by place alone: such loads are wide. What stands off decisions is dropped after.
        value = tl.load(values + begin + i, mask=inside, other=0.0)
        following = gamma * tl.load(values + begin + i + 1, mask=i + 1 < length, other=0.0)
        delta = tl.where(i == last, reward, following) - value
        delta = tl.where(decided, delta, 0.0)
        if SCAN:
            decays, sums = tl.associative_scan(
                (tl.zeros((BLOCK,), tl.float32) + decay, delta), 0, _discounted, reverse=True
            )
            sums = sums + decays * carry
            carry = tl.sum(tl.where(i == (blocks - 1 - done) * BLOCK, sums, 0.0), 0)
            delta = tl.where(decided, sums, 0.0)
        tl.store(advantages + begin + i, delta, mask=inside)
        if WEIGHTS:
            weight = tl.where(decided, clipped_exponential(delta, constants, least, most), 0.0)
            tl.store(weights + begin + i, weight, mask=inside)


def advantages(values_BS: Tensor, rewards_B: Tensor, decisions_BS: Tensor, gamma: float, td_lambda: float) -> Tensor:
    """TD errors (``td_lambda`` 0) or GAE of each decision, ``[B, S]`` float32; 0 elsewhere."""
    return _advantages(values_BS, rewards_B, decisions_BS, gamma, td_lambda, None, 0.0, 0.0)[0]


def decision_weights(
    values_BS: Tensor,
    rewards_B: Tensor,
    decisions_BS: Tensor,
    gamma: float,
    td_lambda: float,
    constants_3: Tensor,
    min_weight: float,
    max_weight: float,
) -> tuple[Tensor, Tensor]:
    """:func:`advantages` and the weights made of them; the constants are shift, scale·β and log_mean."""
    return _advantages(values_BS, rewards_B, decisions_BS, gamma, td_lambda, constants_3, min_weight, max_weight)


def _advantages(
    values_BS: Tensor,
    rewards_B: Tensor,
    decisions_BS: Tensor,
    gamma: float,
    td_lambda: float,
    constants_3: Tensor | None,
    min_weight: float,
    max_weight: float,
) -> tuple[Tensor, Tensor]:
    batch, length = values_BS.shape
    advantages_BS = torch.empty(batch, length, dtype=torch.float32, device=values_BS.device)
    weights_BS = advantages_BS if constants_3 is None else torch.empty_like(advantages_BS)
    launch(
        _advantage_kernel, batch if length else 0, values_BS,
        values_BS.float().contiguous(), rewards_B.float().contiguous(),
        decisions_BS.contiguous().view(torch.uint8), advantages_BS, weights_BS, constants_3, length,
        gamma, gamma * td_lambda, min_weight, max_weight,
        SCAN=gamma * td_lambda != 0.0, WEIGHTS=constants_3 is not None, BLOCK=_block(length, _BLOCK), num_warps=4,
    )  # fmt: skip
    return advantages_BS, weights_BS


@triton.jit
def _statistics_kernel(weights, td, decisions, out, length, TD: tl.constexpr, BLOCK: tl.constexpr):
    sequence = tl.program_id(0).to(tl.int64)
    begin = sequence * length
    zeros = tl.zeros((BLOCK,), tl.float64)
    lowest = zeros - float("inf")
    count, w_sum, w_squares, w_low, w_high, w_logs = zeros, zeros, zeros, lowest, lowest, zeros
    d_sum, d_squares, d_low, d_high = zeros, zeros, lowest, lowest
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        decided = tl.load(decisions + begin + i, mask=i < length, other=0) != 0
        w = tl.load(weights + begin + i, mask=decided, other=0.0).to(tl.float64)
        count += tl.where(decided, 1.0, 0.0)
        w_sum += w
        w_squares += w * w
        w_low = tl.maximum(w_low, tl.where(decided, -w, -float("inf")))
        w_high = tl.maximum(w_high, tl.where(decided, w, -float("inf")))
        w_logs += tl.where(w > 0, w * tl.log(tl.where(w > 0, w, 1.0)), 0.0)
        if TD:
            d = tl.load(td + begin + i, mask=decided, other=0.0).to(tl.float64)
            d_sum += d
            d_squares += d * d
            d_low = tl.maximum(d_low, tl.where(decided, -d, -float("inf")))
            d_high = tl.maximum(d_high, tl.where(decided, d, -float("inf")))
    to = out + sequence * 12
    n = tl.sum(count, 0)
    total = tl.sum(w_sum, 0)
    # Σ −p·log p with p = w/Σw, from sums alone.
    entropy = tl.log(tl.where(total > 0, total, 1.0)) - tl.sum(w_logs, 0) / tl.where(total > 0, total, 1.0)
    tl.store(to, n)
    tl.store(to + 1, total)
    tl.store(to + 2, tl.sum(w_squares, 0))
    tl.store(to + 3, n)
    tl.store(to + 4, tl.sum(d_sum, 0))
    tl.store(to + 5, tl.sum(d_squares, 0))
    tl.store(to + 6, tl.maximum(entropy, 0.0))
    tl.store(to + 7, tl.where(n > 0, 1.0, 0.0))
    # A maximum passes over NaN; a sum does not.
    d_total = tl.sum(d_sum, 0)
    tl.store(to + 8, tl.where(total == total, tl.max(w_low, 0), total))
    tl.store(to + 9, tl.where(total == total, tl.max(w_high, 0), total))
    tl.store(to + 10, tl.where(d_total == d_total, tl.max(d_low, 0), d_total))
    tl.store(to + 11, tl.where(d_total == d_total, tl.max(d_high, 0), d_total))


def decision_statistics(
    weights_BS: Tensor, decisions_BS: Tensor, td_BS: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Moments of the weights ``[5]`` and of the TD errors ``[5]``, and the entropy's sums ``[2]``; float64."""
    batch, length = weights_BS.shape
    parts = torch.zeros(batch, 12, dtype=torch.float64, device=weights_BS.device)
    launch(
        _statistics_kernel, batch, weights_BS,
        weights_BS.contiguous(), None if td_BS is None else td_BS.contiguous(),
        decisions_BS.contiguous().view(torch.uint8), parts, length,
        TD=td_BS is not None, BLOCK=_block(length, _STATISTICS_BLOCK), num_warps=4,
    )  # fmt: skip
    sums = parts[:, :8].sum(0)
    largest = parts[:, 8:].amax(0) if batch else sums.new_full((4,), -torch.inf)
    td = None if td_BS is None else torch.cat([sums[3:6], largest[2:]])
    return torch.cat([sums[:3], largest[:2]]), td, sums[6:]
