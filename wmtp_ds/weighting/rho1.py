"""Rho-1: which tokens to learn, by their excess loss over a frozen reference model (Lin et al. 2024).

Heads come last here (``[B, S, n]``), as in the definitions; a single head may be given as ``[B, S]``.
"""

from typing import Literal

from torch import Tensor

from wmtp_kernels.rho1 import excess_loss, softmax_weights, topk_weights

Scope = Literal["batch", "sequence"]


def select_topk(excess: Tensor, mask: Tensor, k_percent: float, scope: Scope = "batch") -> Tensor:
    """Weight 1 for the ``⌈k_percent·M⌉`` targets of highest excess loss, 0 for the rest (Rho-1, eq. 4 and 5).

    Each head selects among its own targets. ``M`` is its number of targets in the group: the whole batch, or each
    sequence. The product is exact decimal arithmetic (0.55 of 100 is 55); ties go to the lower index.

    Args:
        excess: ``[B, S]`` or ``[B, S, n]``, any floating dtype.
        mask: same shape, non-zero at supervised targets.
        k_percent: share to keep, in (0, 1].
        scope: "batch" or "sequence", the group that competes.

    Returns:
        0/1 weights, same shape, float32, without gradient.

    Raises:
        ValueError: if shapes differ, ``k_percent`` is outside (0, 1] or ``scope`` is unknown.
    """
    if excess.shape != mask.shape or excess.dim() not in (2, 3):
        raise ValueError(
            f"excess and mask must both be [B, S] or [B, S, n], not {list(excess.shape)}, {list(mask.shape)}"
        )
    heads_last = excess if excess.dim() == 3 else excess[..., None]
    mask_last = mask if mask.dim() == 3 else mask[..., None]
    weights_nBS = topk_weights(heads_last.permute(2, 0, 1), mask_last.permute(2, 0, 1), k_percent, scope)
    return weights_nBS.permute(1, 2, 0).reshape(excess.shape)


__all__ = ["Scope", "excess_loss", "select_topk", "softmax_weights"]
