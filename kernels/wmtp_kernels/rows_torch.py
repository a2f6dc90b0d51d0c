"""The steps from a chunk of logits to losses and gradients, in torch: the reference of :mod:`wmtp_kernels.rows_triton`.

Each works on ``[R, V]`` logits in float32 (float64 for float64 inputs), in place. On a CPU the rows are taken a few at
a time: the passes over them then find them in the cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from wmtp_kernels.constants import IGNORE_INDEX

# Logits of one block of rows on a CPU: 1 MiB in float32, which stays in a core's cache from pass to pass.
_BLOCK_ELEMENTS = 2**18

# Whether numbers of the device are left alone: here what is to be done may depend on them.
WAITING_COSTS = False

# Logits that one chunk may hold. Larger chunks make the products a little faster and the memory larger.
_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}


def chunk_rows(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows of logits are held at once."""
    return max(16, _CHUNK_ELEMENTS.get(device.type, 2**27) // vocabulary)


def workspace(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[rows, V]``, where a chunk's logits go and their gradients come from."""
    return torch.empty(rows, vocabulary, dtype=torch.promote_types(dtype, torch.float32), device=device)


def visited_rows(targets_N: Tensor, count: int | None) -> Tensor | None:
    """Rows that have a target, ``[M]``: the others cost nothing."""
    return (targets_N != IGNORE_INDEX).nonzero().squeeze(-1)


def selected_count(weights_R: Tensor, bound: int) -> int:
    """How many rows go on to the gradient: those that weigh something."""
    return int((weights_R > 0).sum())


def _blocks(logits_RV: Tensor) -> Iterator[slice]:
    rows, vocabulary = logits_RV.shape
    step = max(1, _BLOCK_ELEMENTS // vocabulary) if logits_RV.device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def cross_entropy(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """``logsumexp(z) − z[y]`` (0 where ignored) and ``logsumexp(z)`` of each row, ``[R]``; logits stay as they are."""
    log_sums_R = torch.empty_like(logits_RV[:, 0])
    for block in _blocks(logits_RV):
        torch.logsumexp(logits_RV[block], -1, out=log_sums_R[block])
    ignored_R = targets_R == IGNORE_INDEX
    at_target_R = logits_RV.gather(-1, targets_R.masked_fill(ignored_R, 0)[:, None]).squeeze(-1)
    return (log_sums_R - at_target_R).masked_fill(ignored_R, 0.0), log_sums_R


def weighted_(logits_RV: Tensor, targets_R: Tensor, weights_R: Tensor) -> Tensor:
    """Turn logits into ``w·(softmax(z) − onehot(y))`` in place; returns the cross-entropy, ``[R]``."""
    losses_R = torch.empty_like(logits_RV[:, 0])
    for block in _blocks(logits_RV):
        z, targets, weights = logits_RV[block], targets_R[block, None], weights_R[block, None]
        at_target = z.gather(-1, targets)
        largest = z.amax(-1, keepdim=True)
        sums = z.sub_(largest).exp_().sum(-1, keepdim=True)
        losses_R[block] = (sums.log() + (largest - at_target)).squeeze(-1)
        z.mul_(weights / sums).scatter_add_(-1, targets, -weights)
    return losses_R


def selected_(logits_RV: Tensor, sources_K: Tensor, targets_K: Tensor, weights_K: Tensor, log_sums_K: Tensor) -> None:
    """Row ``j < K`` becomes ``w·(softmax(z) − onehot(y))`` of logits row ``sources[j]``, in place.

    A source is either the row itself or one beyond the first ``K``, so no row is read after it was overwritten.

    Args:
        logits_RV: logits; its first K rows are overwritten.
        sources_K: int64, ``j`` or at least ``K``, all different.
        targets_K: the sources' targets.
        weights_K: the sources' weights.
        log_sums_K: the sources' ``logsumexp(z)``.
    """
    for block in _blocks(logits_RV[: len(sources_K)]):
        targets, weights = targets_K[block, None], weights_K[block, None]
        z = logits_RV[sources_K[block]].sub_(log_sums_K[block, None])
        logits_RV[block.start : block.start + len(z)] = z.exp_().mul_(weights).scatter_add_(-1, targets, -weights)


def scaled_rows(hidden_ND: Tensor, scales_R: Tensor, rows_R: Tensor | None = None) -> Tensor:
    """``s_r·h_r`` of the given rows (None: all), ``[R, D]``; 0 where the scale is 0, whatever stands there."""
    hidden_RD = hidden_ND if rows_R is None else hidden_ND[rows_R]
    return torch.where(scales_R[:, None] == 0, 0.0, hidden_RD * scales_R[:, None])
