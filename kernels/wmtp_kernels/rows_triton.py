"""The steps from a chunk of logits to losses and gradients, as Triton kernels: one program reads one row once.

The same functions as :mod:`wmtp_kernels.rows_torch`, which says what they compute. Logits stay in the dtype of the
products (bfloat16, say); everything computed from them is float32. Products are left to the vendor's library.

A row that fits the registers of one program (V ≤ 32,768) is read from memory once. A longer one is read twice, by
blocks; its second reading comes from the L2 cache. Offsets are 64-bit: a chunk may hold more than 2^31 logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wmtp_kernels.constants import IGNORE_INDEX

# Whether numbers of the device are left alone: the host must not wait for what it computes.
WAITING_COSTS = True

# A row of up to this many logits is held in registers whole.
_WHOLE_ROW = 32_768
_BLOCK = 4096

# Bytes of logits that one chunk may hold: some 8,300 rows of 32,000 in bfloat16. Products of that many rows run at full
# speed, and adding them to the float32 sum of the unembedding's gradient is little beside them.
_CHUNK_BYTES = 8192 * 32_768 * 2
# Other buffers hold a chunk's hidden states: with few logits a row, these are what to keep small.
_MOST_ROWS = 32_768


def chunk_rows(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows of logits are held at once."""
    rows = _CHUNK_BYTES // (_row_stride(vocabulary) * dtype.itemsize)
    return max(16, min(_MOST_ROWS, rows // 128 * 128 if rows >= 128 else rows))


def _row_stride(vocabulary: int) -> int:
    return -(-vocabulary // 16) * 16


def _width(logits_RV: Tensor) -> int:
    """Columns that belong to a row: with its padding, where it comes from :func:`workspace`."""
    vocabulary, padded = logits_RV.shape[1], _row_stride(logits_RV.shape[1])
    return padded if logits_RV.stride(0) == padded else vocabulary


def workspace(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[rows, V]``, where a chunk's logits go and their gradients come from; rows start on 16-element borders."""
    padded = torch.empty(rows, _row_stride(vocabulary), dtype=dtype, device=device)
    padded[:, vocabulary:] = 0  # a product that takes columns by twos or fours reads them, times zero
    return padded[:, :vocabulary]


def visited_rows(targets_N: Tensor, count: int | None) -> Tensor | None:
    """The first ``count`` rows that have a target, found without waiting for the device; None: all rows.

    ``count`` may be too large, not too small: rows without a target follow those that have one, and weigh nothing.
    """
    if count is None or count >= targets_N.numel():
        return None
    ignored_N = targets_N == IGNORE_INDEX
    torch._assert_async((~ignored_N).sum() <= count, "there are more targets than the count that was given")
    return torch.argsort(ignored_N.to(torch.uint8), stable=True)[:count]


def selected_count(weights_R: Tensor, bound: int) -> int:
    """How many rows go on to the gradient: as many as can, which is known without waiting for the weights."""
    return bound


def _shape(vocabulary: int) -> dict[str, Any]:
    """How a row is taken: whole if it fits, by blocks if not; and by how many warps."""
    if vocabulary > _WHOLE_ROW:
        return {"BLOCK": _BLOCK, "WHOLE": False, "num_warps": 8}
    block = max(16, triton.next_power_of_2(vocabulary))
    return {"BLOCK": block, "WHOLE": True, "num_warps": min(16, max(4, block // 2048))}


@triton.jit
def _load_logits(row, columns, V, width):
    """Logits as float32, −inf from ``V`` on. Up to ``width``, of which 16 is a factor, whole vectors are loaded."""
    z = tl.load(row + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
    return tl.where(columns < V, z, -float("inf"))


@triton.jit
def _store_gradient(row, columns, gradient, target, width, IGNORED: tl.constexpr):
    """Store ``∂L/∂z``: 0 in an ignored row, even where its logits are not finite. Beyond ``V``, exp(−inf)."""
    gradient = tl.where(target == IGNORED, 0.0, gradient)
    tl.store(row + columns, gradient.to(row.dtype.element_ty), mask=columns < width)


@triton.jit
def _largest_and_sum(row, V, width, BLOCK: tl.constexpr):
    """``max z`` and ``Σ exp(z − max)`` of a row, by blocks: a running maximum and sum in each column of the block."""
    columns = tl.arange(0, BLOCK)
    # The lowest finite number, not −inf: −inf − (−inf) is NaN.
    largest = tl.full((BLOCK,), -3.4e38, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        z = _load_logits(row, start + columns, V, width)
        larger = tl.maximum(largest, z)
        sums = sums * tl.exp(largest - larger) + tl.exp(z - larger)
        largest = larger
    top = tl.max(largest, 0)
    return top, tl.sum(sums * tl.exp(largest - top), 0)


@triton.jit
def _cross_entropy_kernel(
    logits,
    stride,
    targets,
    losses,
    log_sums,
    V,
    width,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * stride
    target = tl.load(targets + r)
    known = (target >= 0) & (target < V)
    at_target = tl.load(row + target, mask=known, other=float("nan")).to(tl.float32)
    if WHOLE:
        z = _load_logits(row, tl.arange(0, BLOCK), V, width)
        top = tl.max(z, 0)
        total = tl.sum(tl.exp(z - top), 0)
    else:
        top, total = _largest_and_sum(row, V, width, BLOCK)
    tl.store(log_sums + r, top + tl.log(total))
    _store_loss(losses + r, target, at_target, top, total, IGNORED)


@triton.jit
def _store_loss(loss, target, at_target, top, total, IGNORED: tl.constexpr):
    # The difference first: where the target is nearly certain, little else is left.
    tl.store(loss, tl.where(target == IGNORED, 0.0, tl.log(total) + (top - at_target)))


@triton.jit
def _td_weight(
    flat,
    values,
    rewards,
    last,
    advantages,
    decisions,
    constants,
    positions,
    length,
    gamma,
    least,
    most,
    FROM_VALUES: tl.constexpr,
):
    """δ and the weight of the decision that emits the target of row ``flat`` of ``[n, B, S]``."""
    head, position = flat // positions, flat % positions
    sequence = position // length
    # Head k at position i predicts token i + k, which decision i + k − 1 emits; `head` counts from 0.
    i = position % length + head
    at = sequence * length + i
    decided = tl.load(decisions + at, mask=i < length, other=0) != 0
    if FROM_VALUES:
        ends = i == tl.load(last + sequence)
        following = gamma * tl.load(values + at + 1, mask=decided & (i + 1 < length), other=0.0)
        following = tl.where(ends, tl.load(rewards + sequence), following)
        delta = following - tl.load(values + at, mask=decided, other=0.0)
    else:
        delta = tl.load(advantages + at, mask=decided, other=0.0)
    delta = tl.where(decided, delta, 0.0)
    return delta, tl.where(decided, clipped_exponential(delta, constants, least, most), 0.0)


@triton.jit
def clipped_exponential(delta, constants, least, most):
    """``clip(exp((δ − shift)/(scale·β) − log_mean), least, most)``; the constants are shift, scale·β, log_mean."""
    x = (delta - tl.load(constants)) / tl.load(constants + 1) - tl.load(constants + 2)
    # exp(89) is infinite in float32, and so is no bound that a float32 can hold.
    weight = tl.minimum(tl.maximum(tl.exp(tl.minimum(x, 89.0)), least), most)
    return tl.where(x == x, weight, x)  # NaN stays NaN: a value head gone wrong must be seen


@triton.jit(do_not_specialize=["first", "positions", "length"])
def _weighted_kernel(
    logits,
    stride,
    targets,
    losses,
    weights,
    deltas,
    rows,
    first,
    values,
    rewards,
    last,
    advantages,
    decisions,
    constants,
    positions,
    length,
    gamma,
    least,
    most,
    V,
    width,
    IGNORED: tl.constexpr,
    SOURCE: tl.constexpr,
    GATHERED: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * stride
    target = tl.load(targets + r)
    known = (target >= 0) & (target < V)
    if SOURCE == 0:
        weight = tl.load(weights + r)
    else:
        flat = tl.load(rows + r) if GATHERED else first + r
        delta, weight = _td_weight(
            flat, values, rewards, last, advantages, decisions, constants, positions, length, gamma, least, most,
            SOURCE == 1,
        )  # fmt: skip
        tl.store(weights + r, tl.where(target == IGNORED, 0.0, weight))
        tl.store(deltas + r, delta)
    at_target = tl.load(row + target, mask=known, other=float("nan")).to(tl.float32)
    # A target that is no token gives NaN, in the loss and in the gradient.
    weight = tl.where(known | (target == IGNORED), weight, float("nan"))
    if WHOLE:
        columns = tl.arange(0, BLOCK)
        z = _load_logits(row, columns, V, width)
        top = tl.max(z, 0)
        powers = tl.exp(z - top)
        total = tl.sum(powers, 0)
        _store_loss(losses + r, target, at_target, top, total, IGNORED)
        gradient = (weight / total) * powers - tl.where(columns == target, weight, 0.0)
        _store_gradient(row, columns, gradient, target, width, IGNORED)
    else:
        top, total = _largest_and_sum(row, V, width, BLOCK)
        _store_loss(losses + r, target, at_target, top, total, IGNORED)
        _write_gradient(row, row, target, weight, top + tl.log(total), V, width, IGNORED, BLOCK)


@triton.jit
def _write_gradient(source, row, target, weight, log_sum, V, width, IGNORED: tl.constexpr, BLOCK: tl.constexpr):
    """``w·(exp(z − logsumexp(z)) − onehot(y))``, read from one row and written to the same or another."""
    columns = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        z = _load_logits(source, start + columns, V, width)
        gradient = weight * tl.exp(z - log_sum) - tl.where(start + columns == target, weight, 0.0)
        _store_gradient(row, start + columns, gradient, target, width, IGNORED)


@triton.jit
def _selected_kernel(
    logits, stride, sources, targets, weights, log_sums, V, width, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):
    j = tl.program_id(0).to(tl.int64)
    source = logits + tl.load(sources + j) * stride
    _write_gradient(
        source, logits + j * stride, tl.load(targets + j), tl.load(weights + j), tl.load(log_sums + j), V,
        width, IGNORED, BLOCK,
    )  # fmt: skip


@triton.jit
def _scaled_kernel(hidden, stride, rows, scales, out, D, GATHERED: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    flat = tl.load(rows + r) if GATHERED else r
    scale = tl.load(scales + r)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < D
        h = tl.load(hidden + flat * stride + columns, mask=inside, other=0.0).to(tl.float32)
        # Zero, not a product with zero: whatever stands at a row of scale 0 counts for nothing.
        tl.store(out + r * D + columns, tl.where(scale == 0.0, 0.0, h * scale).to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class TDSource:
    """What the TD weight of any row of ``[n, B, S]`` is computed from, inside the row kernel.

    Attributes:
        values_BS: float32, V after its activation; or None with ``advantages_BS``.
        rewards_B: float32.
        last_B: int64, each sequence's last decision.
        advantages_BS: float32 advantages instead of values, or None.
        decisions_BS: bool.
        constants_3: float32: shift, scale·β, log_mean.
        gamma, min_weight, max_weight: as in ``TDWeights``.
    """

    values_BS: Tensor | None
    rewards_B: Tensor
    last_B: Tensor | None
    advantages_BS: Tensor | None
    decisions_BS: Tensor
    constants_3: Tensor
    gamma: float
    min_weight: float
    max_weight: float


def launch(kernel: Any, programs: int, where: Tensor, *arguments: Any, **options: Any) -> None:
    """Run as many programs of a kernel on the device of a tensor; none is fine."""
    if programs:
        with torch.cuda.device_of(where):  # Triton launches on the current device
            kernel[(programs,)](*arguments, **options)


def cross_entropy(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """``logsumexp(z) − z[y]`` (0 where ignored) and ``logsumexp(z)`` of each row, ``[R]``; logits stay as they are."""
    rows, vocabulary = logits_RV.shape
    losses_R, log_sums_R = torch.empty(2, rows, dtype=torch.float32, device=logits_RV.device)
    launch(
        _cross_entropy_kernel, rows, logits_RV,
        logits_RV, logits_RV.stride(0), targets_R.contiguous(), losses_R, log_sums_R, vocabulary,
        _width(logits_RV), IGNORED=IGNORE_INDEX, **_shape(vocabulary),
    )  # fmt: skip
    return losses_R, log_sums_R


def weighted_(logits_RV: Tensor, targets_R: Tensor, weights_R: Tensor) -> Tensor:
    """Turn logits into ``w·(softmax(z) − onehot(y))`` in place; returns the cross-entropy, ``[R]``."""
    return _weighted(logits_RV, targets_R, weights_R, None, None, 0, None)


def td_weighted_(
    logits_RV: Tensor, targets_R: Tensor, source: TDSource, rows_R: Tensor | slice
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`weighted_` with the weights computed on the way.

    Args:
        logits_RV: overwritten.
        targets_R: the rows' targets.
        source: what weights are made of.
        rows_R: the rows' places in the flattened ``[n, B, S]``: indices, or a slice.

    Returns:
        Cross-entropy, weight and δ of each row, ``[R]`` float32.
    """
    weights_R, deltas_R = torch.empty(2, len(targets_R), dtype=torch.float32, device=logits_RV.device)
    rows, first = (None, rows_R.start) if isinstance(rows_R, slice) else (rows_R, 0)
    return _weighted(logits_RV, targets_R, weights_R, deltas_R, rows, first, source), weights_R, deltas_R


def _weighted(
    logits_RV: Tensor,
    targets_R: Tensor,
    weights_R: Tensor,
    deltas_R: Tensor | None,
    rows_R: Tensor | None,
    first: int,
    source: TDSource | None,
) -> Tensor:
    rows, vocabulary = logits_RV.shape
    losses_R = torch.empty(rows, dtype=torch.float32, device=logits_RV.device)
    td: tuple[Any, ...] = (None,) * 6 + (0, 0, 0.0, 0.0, 0.0)
    if source is not None:
        decisions_BS = source.decisions_BS
        td = (
            source.values_BS, source.rewards_B, source.last_B, source.advantages_BS, decisions_BS.view(torch.uint8),
            source.constants_3, decisions_BS.numel(), decisions_BS.shape[1], source.gamma, source.min_weight,
            source.max_weight,
        )  # fmt: skip
    launch(
        _weighted_kernel, rows, logits_RV,
        logits_RV, logits_RV.stride(0), targets_R.contiguous(), losses_R, weights_R, deltas_R, rows_R, first, *td,
        vocabulary, _width(logits_RV),
        IGNORED=IGNORE_INDEX, SOURCE=0 if source is None else 1 if source.advantages_BS is None else 2,
        GATHERED=rows_R is not None, **_shape(vocabulary),
    )  # fmt: skip
    return losses_R


def selected_(logits_RV: Tensor, sources_K: Tensor, targets_K: Tensor, weights_K: Tensor, log_sums_K: Tensor) -> None:
    """Row ``j < K`` becomes ``w·(softmax(z) − onehot(y))`` of logits row ``sources[j]``, in place.

    A source is either the row itself or one beyond the first ``K``, so no program reads what another writes.
    """
    launch(
        _selected_kernel, len(sources_K), logits_RV,
        logits_RV, logits_RV.stride(0), sources_K, targets_K, weights_K, log_sums_K, logits_RV.shape[1],
        _width(logits_RV), IGNORED=IGNORE_INDEX, BLOCK=min(_BLOCK, _shape(logits_RV.shape[1])["BLOCK"]), num_warps=8,
    )  # fmt: skip


def scaled_rows(hidden_ND: Tensor, scales_R: Tensor, rows_R: Tensor | None = None) -> Tensor:
    """``s_r·h_r`` of the given rows (None: all), ``[R, D]`` in the dtype of ``h``; 0 where the scale is 0."""
    dim = hidden_ND.shape[1]
    scaled_RD = torch.empty(len(scales_R), dim, dtype=hidden_ND.dtype, device=hidden_ND.device)
    launch(
        _scaled_kernel, len(scales_R), hidden_ND,
        hidden_ND, hidden_ND.stride(0), rows_R, scales_R, scaled_RD, dim,
        GATHERED=rows_R is not None, BLOCK=min(4096, max(16, triton.next_power_of_2(dim))), num_warps=4,
    )  # fmt: skip
    return scaled_RD
