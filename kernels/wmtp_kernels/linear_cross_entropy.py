r"""Per-token weighted cross-entropy of a linear layer, without ever holding all of its logits.

For rows ``h_r`` with target ``y_r``, weight ``w_r`` and scale ``s_r``::

    z_r = W h_r,   CE_r = logsumexp(z_r) − z_r[y_r],   L = Σ_r s_r · w_r · CE_r

    ∂L/∂z_r = s_r · w_r · (softmax(z_r) − onehot(y_r)) = s_r · g_r
    ∂L/∂h_r = s_r · g_r W          ∂L/∂W = Σ_r g_r ⊗ (s_r h_r)

Rows are taken a chunk at a time: the logits of a chunk are turned into ``g`` in place and used for both gradients at
once, *during forward*, so nothing is computed twice: 6·N·D·V operations in all, and one chunk of logits as memory.
:mod:`wmtp_kernels.chunked_linear` says how rounding is kept in bounds. Rows without a target (prompts, padding) are
left out where that needs no waiting for the device: on CPUs, and where the number of targets is given.
"""

import torch
from torch import Tensor

from wmtp_kernels.backend import row_operations
from wmtp_kernels.chunked_linear import ChunkedLinear, check_layer, exact_dtype, formed_in_forward, learned


@torch.no_grad()
def reference_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, count: int | None = None
) -> Tensor:
    """Cross-entropy of each row in nats, without gradient: what a frozen model has to say about the targets.

    Args:
        hidden_ND: ``[N, D]`` hidden states.
        weight_VD: ``[V, D]`` unembedding, same dtype.
        targets_N: ``[N]`` int64; ``-100`` is ignored.
        count: how many targets are not ignored (or a larger number), if the host knows: a GPU then leaves the others
            out. Not needed on a CPU.

    Returns:
        ``[N]`` float32 (float64 for float64 inputs), 0 where ignored.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit. RuntimeError: if the unembedding is not gathered.
    """
    check_layer(hidden_ND, weight_VD, targets=targets_N)
    rows_M = row_operations(hidden_ND).visited_rows(targets_N, count)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return cross_entropies(ChunkedLinear(hidden_ND, weight_VD, rows=rows_M), targets_N)


def cross_entropies(linear: ChunkedLinear, targets_N: Tensor) -> Tensor:
    """Cross-entropy of the visited rows, 0 elsewhere."""
    losses_N = targets_N.new_zeros(targets_N.shape, dtype=exact_dtype(linear.hidden_ND.dtype))
    for rows_R in linear.chunks():
        losses_N[rows_R], _ = linear.operations.cross_entropy(linear.logits(rows_R), targets_N[rows_R])
    return losses_N


def weighted_linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    *,
    scales_N: Tensor | None = None,
    count: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""``Σ_r scales_r · weights_r · CE_r`` with bounded memory, forward and backward.

    Args:
        hidden_ND: ``[N, D]`` hidden states after the final norm; float32, bfloat16, float16 or float64.
        weight_VD: ``[V, D]`` unembedding, same dtype.
        targets_N: ``[N]`` int64 in [0, V); ``-100`` is ignored, whatever its weight.
        weights_N: ``[N]`` weight of each row; no gradient flows to it.
        scales_N: ``[N]`` factor of each row that is kept out of the low-precision gradients (``1/(n·M_k)``); 1 if None.
        count: how many targets are not ignored (or a larger number), if the host knows: a GPU then leaves the others
            out. Not needed on a CPU.

    Returns:
        The scalar loss, float32 (float64 for float64 inputs), differentiable once in ``hidden_ND`` and ``weight_VD``;
        and the detached cross-entropy of each row in nats, ``[N]``, 0 where ignored.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
        RuntimeError: if the unembedding is empty (not gathered under ZeRO-3), or on a second backward.
    """
    check_layer(hidden_ND, weight_VD, targets=targets_N, weights=weights_N, scales=scales_N)
    exact = exact_dtype(hidden_ND.dtype)
    weights_N = learned(targets_N, weights_N, exact)
    scales_N = learned(targets_N, torch.ones_like(weights_N) if scales_N is None else scales_N, exact)
    rows_M = row_operations(hidden_ND).visited_rows(targets_N, count)

    def operation(hidden_ND: Tensor, weight_VD: Tensor, **wanted: bool) -> tuple[ChunkedLinear, tuple[Tensor, Tensor]]:
        linear = ChunkedLinear(hidden_ND, weight_VD, scales_N, rows=rows_M, **wanted)
        losses_N = weighted_chunks(linear, targets_N, weights_N)
        return linear, ((scales_N * weights_N * losses_N).sum(), losses_N)

    loss, losses_N = formed_in_forward(operation, hidden_ND, weight_VD)
    return loss, losses_N


def weighted_chunks(linear: ChunkedLinear, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """Cross-entropy of the visited rows, 0 elsewhere; their gradients stay with ``linear`` if it wants any."""
    if not linear.wants_gradient:
        return cross_entropies(linear, targets_N)
    losses_N = torch.zeros_like(weights_N)
    for rows_R in linear.chunks():
        logits_RV = linear.logits(rows_R)
        losses_N[rows_R] = linear.operations.weighted_(logits_RV, targets_N[rows_R], weights_N[rows_R])
        linear.add(logits_RV, rows_R)
    return losses_N
