"""Rho-1's linear cross-entropy: score every target against a reference model, learn from the selected ones.

``L = Σ_r scale_r · w_r · CE_r`` where the weights ``w`` come from the excess loss ``e = CE − r`` itself (Lin et al.
2024, "Rho-1: Not All Tokens Are What You Need"), so the loss of every target of a selection group has to be known
before the gradient of any. Where the groups fit into a chunk of rows, its logits are still there when the selection is
made, and only the selected rows go on: (2 + 4k)·N·D·V operations. Otherwise there are two passes over chunks:
cross-entropy alone, selection, then logits, loss and gradients of the selected rows: (2 + 6k)·N·D·V. How many targets
are selected is known before which: no step waits for the device. Memory is one chunk of logits in either case.
"""

from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from itertools import accumulate
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp_kernels.backend import row_operations
from wmtp_kernels.chunked_linear import ChunkedLinear, Rows, check_layer, exact_dtype, formed_in_forward
from wmtp_kernels.constants import IGNORE_INDEX
from wmtp_kernels.linear_cross_entropy import cross_entropies, weighted_chunks
from wmtp_kernels.td_linear_cross_entropy import check_counts, head_rows


def kept_count(supervised: int, k_percent: float) -> int:
    """``⌈k_percent·M⌉`` in exact decimal arithmetic: 0.55 of 100 is 55, not 56.

    Raises:
        ValueError: if ``k_percent`` is outside (0, 1].
    """
    if not 0.0 < k_percent <= 1.0:
        raise ValueError(f"k_percent must lie in (0, 1], not {k_percent}")
    return int((Decimal(repr(float(k_percent))) * supervised).to_integral_value(ROUND_CEILING))


def kept_counts(supervised: Tensor, k_percent: float) -> Tensor:
    """:func:`kept_count` of an int64 tensor, on its device and without waiting for it where that is exact."""
    kept_count(0, k_percent)
    share = Fraction(Decimal(repr(float(k_percent))))
    # p·M must fit 63 bits. M is a number of tokens in a batch (< 2^31), so p and q up to 2^31 always do;
    # shares with more decimals than that are counted on the host instead.
    if share.denominator < 2**31:
        return (supervised * share.numerator + share.denominator - 1) // share.denominator
    counts = [kept_count(m, k_percent) for m in supervised.flatten().tolist()]
    return torch.tensor(counts, device=supervised.device).view_as(supervised)


def excess_loss(cross_entropy: Tensor, reference: Tensor, mode: str = "signed") -> Tensor:
    """Score of a target: ``CE − r`` ("signed", the paper's), ``|CE − r|`` ("absolute") or ``r`` ("reference")."""
    if mode == "signed":
        return cross_entropy - reference
    if mode == "absolute":
        return (cross_entropy - reference).abs()
    if mode == "reference":
        return reference
    raise ValueError(f"excess must be 'signed', 'absolute' or 'reference', not {mode!r}")


def topk_weights(excess_nBS: Tensor, mask_nBS: Tensor, k_percent: float, scope: str = "batch") -> Tensor:
    """0/1 weights: per head, the ``⌈k·M⌉`` highest of each selection group; ties to the lower index.

    Args:
        excess_nBS: ``[n, B, S]`` scores.
        mask_nBS: ``[n, B, S]``, non-zero at supervised targets.
        k_percent: share in (0, 1].
        scope: "batch" (a head's whole batch is one group) or "sequence" (each of its sequences is).

    Returns:
        ``[n, B, S]`` float32.
    """
    if scope not in ("batch", "sequence"):
        raise ValueError(f"selection_scope must be 'batch' or 'sequence', not {scope!r}")
    n, batch, length = excess_nBS.shape
    shape = (n, batch * length) if scope == "batch" else (n * batch, length)
    excess_GM, mask_GM = excess_nBS.detach().reshape(shape), mask_nBS.bool().reshape(shape)
    # Real scores stay above the masked ones, even if they are -inf.
    lowest = torch.finfo(excess_GM.dtype).min
    ranked_GM = excess_GM.clamp(min=lowest).masked_fill(~mask_GM, -torch.inf)
    order_GM = ranked_GM.sort(dim=-1, descending=True, stable=True).indices
    keep_GM = torch.arange(shape[1], device=excess_GM.device) < kept_counts(mask_GM.sum(-1, keepdim=True), k_percent)
    weights_GM = torch.zeros(shape, device=excess_GM.device).scatter_(-1, order_GM, keep_GM.float())
    return weights_GM.view(n, batch, length)


def softmax_weights(excess_nBS: Tensor, mask_nBS: Tensor, temperature: float = 1.0) -> Tensor:
    """Over the valid heads of a position: their number times ``softmax_k(e / temperature)``; mean 1, detached.

    Args:
        excess_nBS: ``[n, B, S]`` scores.
        mask_nBS: ``[n, B, S]``, non-zero at supervised targets.
        temperature: > 0.

    Returns:
        ``[n, B, S]`` float32, 0 where there is no target.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    mask = mask_nBS.bool()
    excess_nBS = excess_nBS.detach().float().masked_fill(~mask, -torch.inf)
    # Divided after the largest is taken away: a small temperature must not make infinities of ordinary scores.
    scores = (excess_nBS - excess_nBS.amax(0, keepdim=True)) / temperature
    return torch.where(mask, mask.sum(0) * scores.softmax(0), 0.0)


class Groups(NamedTuple):
    """The sequences that compete within themselves, where they are not the rows of the batch.

    Attributes:
        counts: int64 ``[n, G]`` (``[n, B]``) on the host, the targets of each head and sequence; None if not known.
        ids_BS: int64, the sequence of each position, from 0 and ascending; None where each row is one.
        number: G, where there are ``ids_BS``.
    """

    counts: Tensor | None
    ids_BS: Tensor | None = None
    number: int | None = None


class _TopK:
    """Selection of the highest scores of each group; rows lie group by group, a head's or a sequence's together."""

    def __init__(self, targets_nBS: Tensor, groups: "Groups", k_percent: float, scope: str, operations: ModuleType):
        n, batch, length = targets_nBS.shape
        if scope not in ("batch", "sequence"):
            raise ValueError(f"selection_scope must be 'batch' or 'sequence', not {scope!r}")
        whole = batch * length if scope == "batch" else length
        self.group_rows = max(whole, 1)
        mask_nBS = targets_nBS != IGNORE_INDEX
        counts, ids_BS = groups.counts, groups.ids_BS if scope == "sequence" else None
        self._ids_N = None
        if ids_BS is not None:
            assert groups.number is not None
            self._ids_N = (torch.arange(n, device=ids_BS.device)[:, None, None] * groups.number + ids_BS).reshape(-1)
            supervised_G = mask_nBS.new_zeros(n * groups.number, dtype=torch.int64)
            supervised_G.scatter_add_(0, self._ids_N, mask_nBS.reshape(-1).long())
        else:
            supervised_G = mask_nBS.reshape(n if scope == "batch" else n * batch, whole).sum(-1)
        if not operations.WAITING_COSTS:
            counts = supervised_G.view(n, -1)
        if counts is None:  # every row, whether it has a target or not: their number is known to the host
            self.rows_M, sizes = None, [whole] * len(supervised_G)
            self._sizes_G = torch.full_like(supervised_G, whole)
        else:
            counts_G = counts.sum(-1) if scope == "batch" else counts.reshape(-1)
            sizes, self._sizes_G = [int(count) for count in counts_G.tolist()], supervised_G
            self.rows_M = operations.visited_rows(targets_nBS.reshape(-1), sum(sizes))
        self._kept_G = kept_counts(supervised_G, k_percent)
        self._starts_G = self._sizes_G.cumsum(0) - self._sizes_G
        self.ends = list(accumulate(sizes))
        self.kept_until = [0, *accumulate(kept_count(size, k_percent) for size in sizes)]

    def ranges(self, chunk_rows: int) -> list[tuple[int, int, int]] | None:
        """Whole groups by the chunk: first row, last row + 1, selected at most. None if a group does not fit."""
        found, start, first = [], 0, 0
        for g, end in enumerate(self.ends):
            if end - (self.ends[g - 1] if g else 0) > chunk_rows:
                return None
            following = self.ends[g + 1] if g + 1 < len(self.ends) else None
            if following is None or following - start > chunk_rows:
                found.append((start, end, self.kept_until[g + 1] - self.kept_until[first]))
                start, first = end, g + 1
        return found

    def weights(self, scores_R: Tensor, mask_R: Tensor, rows_R: Tensor, start: int) -> Tensor:
        """1 for the selected of these rows, 0 for the others, float32; ties to the lower index."""
        groups_R = rows_R // self.group_rows if self._ids_N is None else self._ids_N[rows_R]
        lowest = torch.finfo(scores_R.dtype).min
        ranked_R = scores_R.clamp(min=lowest).masked_fill(~mask_R, -torch.inf)
        order_R = ranked_R.argsort(descending=True, stable=True)
        order_R = order_R[groups_R[order_R].argsort(stable=True)]
        sorted_R = groups_R[order_R]
        rank_R = torch.arange(start, start + len(order_R), device=order_R.device) - self._starts_G[sorted_R]
        keep_R = (rank_R < self._kept_G[sorted_R]) & mask_R[order_R]
        return torch.zeros_like(scores_R, dtype=torch.float32).scatter_(0, order_R, keep_R.float())


class _Softmax:
    """Soft weights over the heads of a position; rows lie position by position."""

    def __init__(self, targets_nBS: Tensor, temperature: float, operations: ModuleType):
        self.n, self.temperature = len(targets_nBS), temperature
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        mask_nP = targets_nBS.reshape(self.n, -1) != IGNORE_INDEX
        rows_nP = torch.arange(mask_nP.numel(), device=mask_nP.device).view_as(mask_nP)
        if not operations.WAITING_COSTS:
            rows_nP = rows_nP[:, mask_nP.any(0)]
        self.rows_M = rows_nP.T.reshape(-1)

    def ranges(self, chunk_rows: int) -> list[tuple[int, int, int]]:
        """Whole positions by the chunk."""
        step, total = max(1, chunk_rows // self.n) * self.n, len(self.rows_M)
        return [(start, min(start + step, total), min(step, total - start)) for start in range(0, total, step)]

    def weights(self, scores_R: Tensor, mask_R: Tensor, rows_R: Tensor, start: int) -> Tensor:
        """Of each row, float32."""
        scores_n1P, mask_n1P = (x.view(-1, self.n).T[:, None] for x in (scores_R, mask_R))
        return softmax_weights(scores_n1P, mask_n1P, self.temperature)[:, 0].T.reshape(-1)


def _first(selected_R: Tensor, count: int) -> Tensor:
    """Sources of the first ``count`` rows if the selected ones are to be among them: themselves, or a later row.

    Selected rows within the first ``count`` stay; the unselected among them give their places to the selected ones
    that come later. No source is a place that another row is written to, so all can be moved at once.
    """
    later = len(selected_R) - count
    sources_K = torch.arange(count, device=selected_R.device)
    places = min(count, later)
    if places == 0:
        return sources_K
    free = selected_R[:count].to(torch.uint8).argsort(stable=True)[:places]
    moving = selected_R[count:].to(torch.uint8).argsort(descending=True, stable=True)[:places] + count
    needed = torch.arange(places, device=free.device) < selected_R[count:].sum()
    return sources_K.scatter_(0, free, torch.where(needed, moving, free))


def rho1_linear_cross_entropy(
    hidden_nBSD: Tensor,
    weight_VD: Tensor,
    targets_nBS: Tensor,
    reference_nBS: Tensor,
    *,
    k_percent: float = 1.0,
    excess: str = "signed",
    weighting: str = "topk",
    scope: str = "batch",
    temperature: float = 1.0,
    scales_n: Tensor | None = None,
    counts_nB: Tensor | None = None,
    sequences_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the targets that Rho-1 selects, through a linear layer whose logits are never all in memory.

    Args:
        hidden_nBSD: ``[n, B, S, D]`` hidden states of the n heads, after the final norm.
        weight_VD: ``[V, D]`` unembedding, same dtype.
        targets_nBS: ``[n, B, S]`` int64; ``-100`` where there is nothing to learn.
        reference_nBS: ``[n, B, S]`` float32, the reference model's cross-entropy of the same target tokens, in nats.
        k_percent, excess, weighting, scope, temperature: see :func:`topk_weights`, :func:`excess_loss`,
            :func:`softmax_weights`; ``weighting`` is "topk" or "softmax".
        scales_n: ``[n]`` float32 factor of each head (``1/(n·M_k)``), applied in float32.
        counts_nB: int64 ``[n, B]`` *on the host*: exactly how many targets of each head and sequence are not ignored,
            if known. A GPU then leaves out the others' rows without being waited for. Not needed on a CPU.
        sequences_BS: int64 ``[B, S]``, the sequence of each position where rows hold several: numbers from 0 that never
            fall from one position to the next, row after row. Needs ``counts_nB``, which is ``[n, G]`` then, G being
            the number of sequences.

    Returns:
        The scalar loss ``Σ scale·w·CE`` (float32), the detached cross-entropy ``[n, B, S]`` (0 where ignored), and
        the detached weights ``[n, B, S]``.

    Raises:
        ValueError: for an unknown mode, or shapes, dtypes or devices that do not fit.
        RuntimeError: if the unembedding is not gathered, or on a second backward.
    """
    shape = targets_nBS.shape
    if hidden_nBSD.shape[:-1] != shape or reference_nBS.shape != shape:
        raise ValueError(
            f"targets {list(shape)} and reference {list(reference_nBS.shape)} must both be "
            f"{list(hidden_nBSD.shape[:-1])}"
        )
    flat_hidden_ND, targets_N = hidden_nBSD.reshape(-1, hidden_nBSD.shape[-1]), targets_nBS.reshape(-1)
    check_layer(flat_hidden_ND, weight_VD, targets=targets_N)
    if reference_nBS.device != targets_N.device:
        raise ValueError(
            f"reference must be on the hidden states' device, {targets_N.device}, not {reference_nBS.device}"
        )
    excess_loss(reference_nBS[:0], reference_nBS[:0], excess)  # an unknown mode is found before any work is done
    if weighting not in ("topk", "softmax"):
        raise ValueError(f"weighting must be 'topk' or 'softmax', not {weighting!r}")
    scales_N = head_rows(scales_n, targets_nBS, exact_dtype(weight_VD.dtype))
    groups = Groups(counts_nB)
    if sequences_BS is not None:
        groups = _check_sequences(sequences_BS, counts_nB, targets_nBS)
    elif counts_nB is not None:
        check_counts(counts_nB, targets_nBS)
    operations = row_operations(flat_hidden_ND)
    if weighting == "topk":
        selection: _TopK | _Softmax = _TopK(targets_nBS, groups, k_percent, scope, operations)
    else:
        selection = _Softmax(targets_nBS, temperature, operations)
    scoring = _Scoring(selection, targets_N, reference_nBS.detach().reshape(-1), excess)

    def operation(hidden_ND: Tensor, weight_VD: Tensor, **wanted: bool) -> tuple[ChunkedLinear, tuple[Tensor, ...]]:
        linear, losses_N, weights_N = _select_and_learn(scoring, hidden_ND, weight_VD, scales_N, **wanted)
        return linear, ((scales_N * weights_N * losses_N).sum(), losses_N, weights_N)

    loss, losses_N, weights_N = formed_in_forward(operation, flat_hidden_ND, weight_VD)
    return loss, losses_N.view(shape), weights_N.view(shape)


def _check_sequences(sequences_BS: Tensor, counts_nG: Tensor | None, targets_nBS: Tensor) -> Groups:
    if counts_nG is None or counts_nG.dim() != 2 or len(counts_nG) != len(targets_nBS):
        raise ValueError(f"sequences need their counts, [{len(targets_nBS)}, sequences]")
    if sequences_BS.shape != targets_nBS.shape[1:] or sequences_BS.device != targets_nBS.device:
        raise ValueError(
            f"sequences {list(sequences_BS.shape)} must be {list(targets_nBS.shape[1:])} on {targets_nBS.device}, not "
            f"on {sequences_BS.device}"
        )
    if counts_nG.device.type != "cpu":
        raise ValueError(f"counts must be on the CPU, not on {counts_nG.device}")
    return Groups(counts_nG, sequences_BS, counts_nG.shape[1])


class _Scoring(NamedTuple):
    selection: _TopK | _Softmax
    targets_N: Tensor
    reference_N: Tensor
    excess: str

    def weights(self, losses_R: Tensor, rows_R: Rows, start: int) -> Tensor:
        """The weights of rows whose cross-entropies are known."""
        mask_R = self.targets_N[rows_R] != IGNORE_INDEX
        scores_R = excess_loss(losses_R, self.reference_N[rows_R], self.excess)
        if isinstance(rows_R, slice):
            rows_R = torch.arange(rows_R.start, rows_R.stop, device=losses_R.device)
        return self.selection.weights(scores_R, mask_R, rows_R, start)


def _select_and_learn(
    scoring: _Scoring, hidden_ND: Tensor, weight_VD: Tensor, scales_N: Tensor, **wanted: bool
) -> tuple[ChunkedLinear, Tensor, Tensor]:
    """Cross-entropies ``[N]`` and weights ``[N]``, and the layer with its gradients."""
    selection, targets_N = scoring.selection, scoring.targets_N
    linear = ChunkedLinear(hidden_ND, weight_VD, scales_N, rows=selection.rows_M, every_row=False, **wanted)
    weights_N = torch.zeros_like(targets_N, dtype=torch.float32)
    ranges = selection.ranges(linear.chunk_rows)
    if ranges is None:
        return _in_two_passes(scoring, linear, weights_N)
    losses_N = torch.zeros_like(scales_N)
    for start, stop, count in ranges:
        rows_R = linear.between(start, stop)
        logits_RV, targets_R = linear.logits(rows_R), targets_N[rows_R]
        losses_R, log_sums_R = linear.operations.cross_entropy(logits_RV, targets_R)
        weights_R = scoring.weights(losses_R, rows_R, start)
        losses_N[rows_R], weights_N[rows_R] = losses_R, weights_R
        if not linear.wants_gradient:
            continue
        count = linear.operations.selected_count(weights_R, count)
        sources_K = _first(weights_R > 0, count)
        chosen = (x[sources_K] for x in (targets_R, weights_R.to(losses_R.dtype), log_sums_R))
        linear.operations.selected_(logits_RV, sources_K, *chosen)
        linear.add(logits_RV[:count], sources_K + start if isinstance(rows_R, slice) else rows_R[sources_K])
    return linear, losses_N, weights_N


def _in_two_passes(scoring: _Scoring, linear: ChunkedLinear, weights_N: Tensor) -> tuple[ChunkedLinear, Tensor, Tensor]:
    """All cross-entropies, then the selected rows once more: groups that are larger than a chunk."""
    assert isinstance(scoring.selection, _TopK)
    losses_N = cross_entropies(linear, scoring.targets_N)
    rows_M = linear.between(0, linear.count)
    weights_M = scoring.weights(losses_N[rows_M], rows_M, 0)
    weights_N[rows_M] = weights_M
    if linear.wants_gradient:
        order = (weights_M > 0).to(torch.uint8).argsort(descending=True, stable=True)
        order = order[: linear.operations.selected_count(weights_M, scoring.selection.kept_until[-1])]
        linear.rows = order if isinstance(rows_M, slice) else rows_M[order]
        linear.count = len(order)
        weighted_chunks(linear, scoring.targets_N, weights_N.to(losses_N.dtype))
    return linear, losses_N, weights_N
