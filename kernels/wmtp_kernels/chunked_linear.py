r"""A linear layer taken a chunk of rows at a time, with its gradients formed during forward.

Every operation of this package is a loop over chunks: multiply (``z = h Wᵀ``), turn the logits into losses and
``g = ∂L/∂z`` in place, multiply twice (``∂L/∂h = s·gW``, ``∂L/∂W += gᵀ(s·h)``), forget the logits. What is common to
all of them is here; what they do with the logits is theirs. Four choices about rounding, in 16-bit dtypes:

- ``∂L/∂W`` is a float32 product of each chunk, summed in float32 and cast once, in backward;
- the scale ``s_r`` (``1/(n·M_k)``) is kept out of ``g_r``. Its rounding would be the same for every row of equal
  weight, a bias that does not average out; on ``s_r h_r`` it differs from element to element and does;
- of the scales, which are as small as 1 over the number of tokens, a common power of two waits for backward. There a
  float16 loss scale meets it, which keeps gradients from underflowing; a power of two rounds nothing;
- softmax and losses are float32.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wmtp_kernels.backend import row_operations
from wmtp_kernels.constants import IGNORE_INDEX

Rows = Tensor | slice


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Losses and sums are float32, or float64 if the inputs are (the tests' oracle)."""
    return torch.promote_types(dtype, torch.float32)


def check_layer(hidden_ND: Tensor, weight_VD: Tensor, **row_tensors: Tensor | None) -> None:
    """Shapes, dtypes and devices that fit together.

    Raises:
        ValueError: naming what does not fit.
        RuntimeError: if the unembedding has no elements.
    """
    if weight_VD.numel() == 0 and hidden_ND.shape[-1] > 0:
        raise RuntimeError(
            "the unembedding has no elements: under ZeRO-3 it is gathered only inside the engine's forward, "
            "within the module that owns it. Call the loss from there."
        )
    if hidden_ND.dim() != 2 or weight_VD.dim() != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden states {list(hidden_ND.shape)} and unembedding {list(weight_VD.shape)} must be [N, D] and [V, D]"
        )
    if hidden_ND.dtype != weight_VD.dtype:
        raise ValueError(f"hidden states are {hidden_ND.dtype}, the unembedding is {weight_VD.dtype}: cast one of them")
    for name, tensor in {"unembedding": weight_VD, **row_tensors}.items():
        if tensor is not None and tensor.device != hidden_ND.device:
            raise ValueError(f"{name} must be on the hidden states' device, {hidden_ND.device}, not {tensor.device}")
    for name, tensor in row_tensors.items():
        if tensor is not None and tensor.shape != hidden_ND.shape[:1]:
            raise ValueError(f"{name} must have shape [{hidden_ND.shape[0]}], not {list(tensor.shape)}")


class ChunkedLinear:
    """Logits of one chunk of rows after the other, in one workspace, and the gradients made of them.

    Args:
        hidden_ND: ``[N, D]``.
        weight_VD: ``[V, D]``, same dtype.
        scales_N: ``[N]`` factor of each row's gradient; 0 where there is nothing to learn.
        rows: which rows are visited; None means all.
        every_row: False if :meth:`add` will not be called for all visited rows.
        wants_hidden, wants_weight: which gradients are wanted.
    """

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        scales_N: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        every_row: bool = True,
        wants_hidden: bool = False,
        wants_weight: bool = False,
    ):
        self.operations = row_operations(hidden_ND)
        self.hidden_ND, self.weight_VD = hidden_ND.contiguous(), weight_VD
        self.rows = rows
        self.count = len(hidden_ND) if rows is None else len(rows)
        self.chunk_rows: int = self.operations.chunk_rows(len(weight_VD), hidden_ND.dtype, hidden_ND.device)
        self._workspace: Tensor | None = None
        self.wants_gradient = wants_hidden or wants_weight
        self.grad_hidden_ND = self.grad_weight_VD = None
        if wants_hidden:
            make = torch.empty_like if rows is None and every_row else torch.zeros_like
            self.grad_hidden_ND = make(self.hidden_ND)
        if wants_weight:
            self.grad_weight_VD = torch.empty_like(weight_VD, dtype=exact_dtype(weight_VD.dtype))
        self._first = True  # of the chunks: its product needs nothing to be added to
        if self.wants_gradient:
            assert scales_N is not None
            self.power = _common_power(scales_N)
            self._relative_N = scales_N / self.power

    def chunks(self) -> Iterator[Rows]:
        """The rows of each chunk: indices, or a slice where all rows are visited."""
        for start in range(0, self.count, self.chunk_rows):
            yield self.between(start, min(start + self.chunk_rows, self.count))

    def between(self, start: int, stop: int) -> Rows:
        """Those from the ``start``-th to before the ``stop``-th of the visited rows."""
        return slice(start, stop) if self.rows is None else self.rows[start:stop]

    def logits(self, rows_R: Rows) -> Tensor:
        """``[R, V]`` logits, in the workspace: what the last call returned is overwritten."""
        hidden_RD = self.hidden_ND[rows_R]
        if self._workspace is None:
            rows = min(self.count, max(self.chunk_rows, len(hidden_RD)))
            self._workspace = self.operations.workspace(rows, len(self.weight_VD), hidden_RD.dtype, hidden_RD.device)
        logits_RV = self._workspace[: len(hidden_RD)]
        if logits_RV.dtype == hidden_RD.dtype:
            return torch.mm(hidden_RD, self.weight_VD.T, out=logits_RV)
        return logits_RV.copy_(hidden_RD @ self.weight_VD.T)

    def add(self, grad_RV: Tensor, rows_R: Rows) -> None:
        """Take in the gradient of the logits of these rows, without their scales."""
        grad = grad_RV.to(self.hidden_ND.dtype)
        if self.grad_hidden_ND is not None:
            if isinstance(rows_R, slice):
                torch.mm(grad, self.weight_VD, out=self.grad_hidden_ND[rows_R])
            else:
                self.grad_hidden_ND[rows_R] = grad @ self.weight_VD
        if self.grad_weight_VD is not None:
            self._add_weight(grad, grad_RV, rows_R)

    def _add_weight(self, grad: Tensor, grad_RV: Tensor, rows_R: Rows) -> None:
        assert self.grad_weight_VD is not None
        total_VD, relative_R = self.grad_weight_VD, self._relative_N[rows_R]
        if isinstance(rows_R, slice):
            scaled_RD = self.operations.scaled_rows(self.hidden_ND[rows_R], relative_R)
        else:
            scaled_RD = self.operations.scaled_rows(self.hidden_ND, relative_R, rows_R)
        if grad.is_cuda and grad.dtype != total_VD.dtype:
            # Tensor cores take 16-bit factors, and need not round their product to 16 bits.
            factors = grad.T, scaled_RD.to(grad.dtype)
            torch.addmm(total_VD, *factors, out_dtype=total_VD.dtype, beta=0 if self._first else 1, out=total_VD)
        else:
            factors = grad_RV.T.to(total_VD.dtype), scaled_RD.to(total_VD.dtype)
            total_VD.addmm_(*factors, beta=0 if self._first else 1)
        self._first = False

    def gradients(self, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of hidden states and unembedding, given that of the loss; once, after :meth:`release`."""
        hidden, weight = self.grad_hidden_ND, self.grad_weight_VD
        if hidden is not None:
            hidden = hidden.mul_((self._relative_N * (upstream * self.power))[:, None])
        if weight is not None:
            if self._first:
                weight.zero_()
            weight = _times(weight, upstream * self.power, self._weight_dtype)
        return hidden, weight

    def release(self) -> None:
        """Keep what backward needs, the gradients; neither logits nor inputs."""
        self._weight_dtype = self.weight_VD.dtype
        del self._workspace, self.hidden_ND, self.weight_VD, self.rows


def _times(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor.mul_(factor)
    return torch.mul(tensor, factor, out=torch.empty_like(tensor, dtype=dtype))


def _common_power(scales_N: Tensor) -> Tensor:
    """The power of two just above the largest scale, a scalar; 1 if all scales are 0."""
    largest = scales_N.abs().amax() if scales_N.numel() else scales_N.new_zeros(())
    # A number over its mantissa, which is exact; a power computed on a GPU need not be.
    return torch.where(largest > 0, largest / torch.frexp(largest).mantissa, 1.0)


class _FormedInForward(torch.autograd.Function):
    """Gradients are formed in forward, while a chunk's logits are at hand, and handed out in backward."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, operation: Callable[..., Any]) -> tuple[Tensor, ...]:
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        linear, outputs = operation(hidden_ND, weight_VD, wants_hidden=wants_hidden, wants_weight=wants_weight)
        linear.release()
        # Kept as an attribute, not through save_for_backward: results, used once and then given away.
        ctx.linear = linear
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.linear is None:
            raise RuntimeError(
                "backward was called twice on a fused cross-entropy: its gradients are formed once, during forward, "
                "and given away by the first backward. Run forward again."
            )
        linear, ctx.linear = ctx.linear, None
        return *linear.gradients(grad_outputs[0]), None


def formed_in_forward(operation: Callable[..., Any], hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, ...]:
    """Run an operation whose first output is a loss, differentiable once in both tensors.

    Args:
        operation: called with hidden states, unembedding and which gradients are wanted; returns the
            :class:`ChunkedLinear` that holds them, and its outputs, the loss first.
        hidden_ND: ``[N, D]``.
        weight_VD: ``[V, D]``.
    """
    if not torch.is_grad_enabled():
        # An autograd function forms gradients of whatever requires them, even where none can be asked for.
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    # Autocast would give some of the products another dtype than what they are added to.
    with torch.autocast(hidden_ND.device.type, enabled=False):
        outputs: tuple[Tensor, ...] = _FormedInForward.apply(hidden_ND, weight_VD, operation)
    return outputs


def learned(targets_N: Tensor, values_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights or scales, detached, 0 at ignored targets: zero, not a product, so that NaN there counts for nothing."""
    return values_N.detach().to(dtype).masked_fill(targets_N == IGNORE_INDEX, 0.0)
