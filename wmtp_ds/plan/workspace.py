"""Bytes that the loss takes beside its inputs: one chunk of logits, and gradients formed during forward.

The sizes of a chunk are the kernels' own (kernels/wmtp_kernels/rows_torch.py and rows_triton.py), which cannot be
imported without torch; a test compares them.
"""

from dataclasses import dataclass
from typing import Literal

from wmtp_ds.plan.shape import ModelShape

Kernels = Literal["torch", "triton"]
FLOAT = 4

_TORCH_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
_TRITON_BYTES, _TRITON_MOST_ROWS = 8192 * 32_768 * 2, 32_768


def chunk_rows(vocabulary: int, b: int, device: str, kernels: Kernels) -> int:
    """Rows of logits that are held at once.

    Args:
        vocabulary: of the model.
        b: bytes of the compute dtype.
        device: "cpu" or "cuda".
        kernels: which implementation runs.
    """
    if kernels == "torch":
        return max(16, _TORCH_ELEMENTS[device] // vocabulary)
    rows = _TRITON_BYTES // (_padded(vocabulary) * b)
    return max(16, min(_TRITON_MOST_ROWS, rows // 128 * 128 if rows >= 128 else rows))


def _padded(vocabulary: int) -> int:
    return -(-vocabulary // 16) * 16


@dataclass(frozen=True)
class Workspace:
    """Of one loss over ``rows`` rows of hidden states.

    Args:
        shape: the model.
        rows: heads × sequences × tokens.
        b: bytes of the compute dtype.
        device, kernels: as in :func:`chunk_rows`.
        selects: whether rows are selected by their loss (rho1's top-k), which reads a chunk's logits twice.
    """

    shape: ModelShape
    rows: int
    b: int
    device: str
    kernels: Kernels
    selects: bool = False

    @property
    def hidden(self) -> int:
        """The hidden states themselves, or their gradient."""
        return self.rows * self.shape.hidden_size * self.b

    @property
    def weight_gradient(self) -> int:
        """Of the unembedding, summed over chunks in float32."""
        return self.shape.embedding * FLOAT

    def chunk(self, *, learns: bool) -> int:
        """The logits of a chunk, its hidden states and, where it ``learns``, the products that make gradients."""
        rows = min(self.rows, chunk_rows(self.shape.vocab_size, self.b, self.device, self.kernels))
        hidden = rows * self.shape.hidden_size
        if self.kernels == "triton":
            logits = rows * _padded(self.shape.vocab_size) * self.b
            return logits + hidden * self.b * (2 if learns else 1)
        logits = rows * self.shape.vocab_size * FLOAT
        if self.b != FLOAT:  # the products are of 16 bits, the losses of 32
            logits += rows * self.shape.vocab_size * self.b
        if self.selects and learns and self.device == "cuda":
            logits += rows * self.shape.vocab_size * FLOAT
        return logits + hidden * FLOAT * (3 if learns else 1)
