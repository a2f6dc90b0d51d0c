r"""Per-token weighted cross-entropy of a linear layer, without ever holding all of its logits.

For rows ``h_r`` with target ``y_r``, weight ``w_r`` and scale ``s_r``::

    z_r = W h_r,   CE_r = logsumexp(z_r) − z_r[y_r],   L = Σ_r s_r · w_r · CE_r

    ∂L/∂z_r = s_r · w_r · (softmax(z_r) − onehot(y_r)) = s_r · g_r
    ∂L/∂h_r = s_r · g_r W          ∂L/∂W = Σ_r g_r ⊗ (s_r h_r)

Rows are taken a chunk at a time: the logits of a chunk are turned into ``g`` in place and used for both gradients at
once, *during forward*, so nothing is computed twice: 6·N·D·V operations in all, and one chunk of logits as memory.
Backward multiplies the gradients by what flows in. Four choices about rounding, in 16-bit dtypes:

- ``∂L/∂W`` is a float32 product of each chunk, summed in float32 and cast once, in backward;
- the scale ``s_r`` is kept out of ``g_r``. Its rounding would be the same for every row of equal weight, a bias
  that does not average out; on ``s_r h_r`` it differs from element to element and does;
- of the scales, which are as small as 1 over the number of tokens, a common power of two waits for backward. There a
  float16 loss scale meets it, which keeps gradients from underflowing; a power of two rounds nothing;
- softmax and losses are float32.

Rows to be ignored are dropped before the first product, so prompts and padding cost nothing.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100

# Logits that one chunk may hold. Small enough to stay near the cache of a CPU, large enough for efficient products:
# 256 rows at V = 32,000.
_CHUNK_ELEMENTS = 256 * 32_000


def _chunk_rows(vocabulary: int) -> int:
    return max(16, _CHUNK_ELEMENTS // vocabulary)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """Losses and sums are float32, or float64 if the inputs are (the tests' oracle)."""
    return torch.promote_types(dtype, torch.float32)


def _check(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *row_tensors: Tensor | None) -> None:
    if weight_VD.numel() == 0 and hidden_ND.shape[-1] > 0:
        raise RuntimeError(
            "the unembedding has no elements: under ZeRO-3 it is gathered only inside the engine's forward, "
            "within the module that owns it. Call the loss from there."
        )
    if hidden_ND.dim() != 2 or weight_VD.dim() != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden states {list(hidden_ND.shape)} and unembedding {list(weight_VD.shape)} must be [N, D] and [V, D]"
        )
    for tensor in (targets_N, *row_tensors):
        if tensor is not None and tensor.shape != hidden_ND.shape[:1]:
            raise ValueError(
                f"targets, weights and scales must have shape [{hidden_ND.shape[0]}], not {list(tensor.shape)}"
            )


def _logits(hidden_RD: Tensor, weight_VD: Tensor) -> Tensor:
    """``[R, V]`` in float32 (float64 for float64 inputs), a buffer of its own that may be overwritten."""
    logits_RV = hidden_RD @ weight_VD.T
    return logits_RV.to(_accumulator(logits_RV.dtype))


def _log_sum_exp_(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits into ``exp(z − max)`` in place; return its row sums and ``logsumexp(z)``, both ``[R]``."""
    largest_R1 = logits_RV.amax(-1, keepdim=True)
    sums_R = logits_RV.sub_(largest_R1).exp_().sum(-1)
    return sums_R, sums_R.log() + largest_R1.squeeze(-1)


def _common_power(scales_N: Tensor) -> Tensor:
    """The power of two just above the largest scale, a scalar; 1 if all scales are 0."""
    largest = scales_N.abs().amax() if scales_N.numel() else scales_N.new_zeros(())
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)


@torch.no_grad()
def reference_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy of each row in nats, without gradient: what a frozen model has to say about the targets.

    Args:
        hidden_ND: ``[N, D]`` hidden states.
        weight_VD: ``[V, D]`` unembedding, same dtype.
        targets_N: ``[N]`` int64; ``-100`` is ignored.

    Returns:
        ``[N]`` float32 (float64 for float64 inputs), 0 where ignored.

    Raises:
        ValueError: if shapes do not fit. RuntimeError: if the unembedding is not gathered.
    """
    _check(hidden_ND, weight_VD, targets_N)
    rows_M = (targets_N != IGNORE_INDEX).nonzero().squeeze(-1)
    losses_N = torch.zeros(targets_N.shape, dtype=_accumulator(hidden_ND.dtype), device=hidden_ND.device)
    for rows_R in rows_M.split(_chunk_rows(weight_VD.shape[0])):
        logits_RV = _logits(hidden_ND[rows_R], weight_VD)
        at_target_R = logits_RV.gather(-1, targets_N[rows_R, None]).squeeze(-1)
        losses_N[rows_R] = _log_sum_exp_(logits_RV)[1] - at_target_R
        del logits_RV  # before the next chunk's are made
    return losses_N


class _WeightedLinearCrossEntropy(torch.autograd.Function):
    """Gradients are formed in forward, while a chunk's logits are at hand, and handed out in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        scales_N: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        exact = _accumulator(hidden_ND.dtype)
        losses_N = torch.zeros(targets_N.shape, dtype=exact, device=hidden_ND.device)
        grad_hidden_ND = torch.zeros_like(hidden_ND) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if wants_weight else None
        power = _common_power(scales_N)
        relative_N = scales_N / power
        rows_M = (targets_N != IGNORE_INDEX).nonzero().squeeze(-1)
        for rows_R in rows_M.split(_chunk_rows(weight_VD.shape[0])):
            hidden_RD, targets_R1 = hidden_ND[rows_R], targets_N[rows_R, None]
            logits_RV = _logits(hidden_RD, weight_VD)
            at_target_R = logits_RV.gather(-1, targets_R1).squeeze(-1)
            sums_R, log_sums_R = _log_sum_exp_(logits_RV)
            losses_N[rows_R] = log_sums_R - at_target_R
            if not (wants_hidden or wants_weight):
                continue
            weights_R1, scales_R1 = weights_N[rows_R, None], relative_N[rows_R, None]
            # From exp(z − max) to w·(softmax − onehot), in place.
            logits_RV.mul_(weights_R1 / sums_R[:, None]).scatter_add_(-1, targets_R1, -weights_R1)
            grad_RV = logits_RV.to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows_R] = ((grad_RV @ weight_VD).to(exact) * scales_R1).to(hidden_ND.dtype)
            if grad_weight_VD is not None:
                scaled_RD = hidden_RD.to(exact) * scales_R1
                if grad_RV.is_cuda and grad_RV.dtype != exact:
                    # Tensor cores take 16-bit factors, and need not round their product to 16 bits.
                    product_VD = torch.mm(grad_RV.T, scaled_RD.to(grad_RV.dtype), out_dtype=exact)
                    grad_weight_VD.add_(product_VD)
                else:
                    grad_weight_VD.addmm_(logits_RV.T, scaled_RD)
            del logits_RV, grad_RV  # before the next chunk's are made
        # Kept as attributes, not through save_for_backward: they are results, used once and then given away.
        ctx.gradients = (grad_hidden_ND, grad_weight_VD)
        ctx.power, ctx.dtype = power, hidden_ND.dtype
        ctx.mark_non_differentiable(losses_N)
        return (scales_N * weights_N * losses_N).sum(), losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        if gradients is None:
            raise RuntimeError(
                "backward was called twice on weighted_linear_cross_entropy: its gradients are formed once, during "
                "forward, and given away by the first backward. Run forward again."
            )
        ctx.gradients = None
        factor = grad_outputs[0] * ctx.power
        grad_hidden, grad_weight = (None if g is None else g.mul_(factor).to(ctx.dtype) for g in gradients)
        return grad_hidden, grad_weight, None, None, None


def weighted_linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    *,
    scales_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""``Σ_r scales_r · weights_r · CE_r`` with bounded memory, forward and backward.

    Args:
        hidden_ND: ``[N, D]`` hidden states after the final norm; float32, bfloat16, float16 or float64.
        weight_VD: ``[V, D]`` unembedding, same dtype.
        targets_N: ``[N]`` int64 in [0, V); ``-100`` is ignored, whatever its weight.
        weights_N: ``[N]`` weight of each row; no gradient flows to it.
        scales_N: ``[N]`` factor of each row that is kept out of the low-precision gradients (``1/(n·M_k)``); 1 if None.

    Returns:
        The scalar loss, float32 (float64 for float64 inputs), differentiable once in ``hidden_ND`` and ``weight_VD``;
        and the detached cross-entropy of each row in nats, ``[N]``, 0 where ignored.

    Raises:
        ValueError: if shapes do not fit.
        RuntimeError: if the unembedding is empty (not gathered under ZeRO-3), or on a second backward.
    """
    _check(hidden_ND, weight_VD, targets_N, weights_N, scales_N)
    exact = _accumulator(hidden_ND.dtype)
    # Zeros, not products with zero: whatever stands at an ignored row (NaN, too) counts for nothing.
    ignored_N = targets_N == IGNORE_INDEX
    weights_N = weights_N.detach().to(exact).masked_fill(ignored_N, 0.0)
    scales_N = torch.ones_like(weights_N) if scales_N is None else scales_N.detach().to(exact)
    scales_N = scales_N.masked_fill(ignored_N, 0.0)
    if not torch.is_grad_enabled():
        # An autograd function forms gradients of whatever requires them, even where none can be asked for.
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    loss, losses_N = _WeightedLinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, weights_N, scales_N)
    return loss, losses_N
