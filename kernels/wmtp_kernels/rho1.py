"""Rho-1's linear cross-entropy: score every target against a reference model, learn from the selected ones.

``L = Σ_r scale_r · w_r · CE_r`` where the weights ``w`` come from the excess loss ``e = CE − r`` itself (Lin et al.
2024, "Rho-1: Not All Tokens Are What You Need"), so the loss of every target has to be known before the gradient of
any. The torch path takes two passes over chunks of rows: cross-entropy alone (2·N·D·V operations), selection, then
loss and gradients of the rows that were selected (6·k·N·D·V). Memory is one chunk of logits in either.
"""

from decimal import ROUND_CEILING, Decimal
from fractions import Fraction

import torch
from torch import Tensor

from wmtp_kernels.linear_cross_entropy import (
    IGNORE_INDEX,
    reference_cross_entropy,
    weighted_linear_cross_entropy,
)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the targets that Rho-1 selects, through a linear layer whose logits are never all in memory.

    Args:
        hidden_nBSD: ``[n, B, S, D]`` hidden states of the n heads, after the final norm.
        weight_VD: ``[V, D]`` unembedding.
        targets_nBS: ``[n, B, S]`` int64; ``-100`` where there is nothing to learn.
        reference_nBS: ``[n, B, S]`` float32, the reference model's cross-entropy of the same target tokens, in nats.
        k_percent, excess, weighting, scope, temperature: see :func:`topk_weights`, :func:`excess_loss`,
            :func:`softmax_weights`; ``weighting`` is "topk" or "softmax".
        scales_n: ``[n]`` float32 factor of each head (``1/(n·M_k)``), applied in float32.

    Returns:
        The scalar loss ``Σ scale·w·CE`` (float32), the detached cross-entropy ``[n, B, S]`` (0 where ignored), and
        the detached weights ``[n, B, S]``.

    Raises:
        ValueError: for an unknown mode or shapes that do not fit.
        RuntimeError: if the unembedding is not gathered, or on a second backward.
    """
    n, batch, length, dim = hidden_nBSD.shape
    if targets_nBS.shape != (n, batch, length) or reference_nBS.shape != (n, batch, length):
        raise ValueError(
            f"targets {list(targets_nBS.shape)} and reference {list(reference_nBS.shape)} must both be "
            f"{[n, batch, length]}"
        )
    flat_hidden_ND, flat_targets_N = hidden_nBSD.reshape(-1, dim), targets_nBS.reshape(-1)
    mask_nBS = targets_nBS != IGNORE_INDEX
    ce_nBS = reference_cross_entropy(flat_hidden_ND, weight_VD, flat_targets_N).view(n, batch, length)
    score_nBS = excess_loss(ce_nBS, reference_nBS, excess)
    if weighting == "topk":
        weights_nBS = topk_weights(score_nBS, mask_nBS, k_percent, scope)
    elif weighting == "softmax":
        weights_nBS = softmax_weights(score_nBS, mask_nBS, temperature)
    else:
        raise ValueError(f"weighting must be 'topk' or 'softmax', not {weighting!r}")
    # Rows of weight 0 cost nothing in the second pass: they are ignored there.
    selected_N = flat_targets_N.masked_fill(weights_nBS.reshape(-1) == 0, IGNORE_INDEX)
    scales_N = None if scales_n is None else scales_n.repeat_interleave(batch * length)
    loss, _ = weighted_linear_cross_entropy(
        flat_hidden_ND, weight_VD, selected_N, weights_nBS.reshape(-1), scales_N=scales_N
    )
    return loss, ce_nBS, weights_nBS
