"""Bytes of activations, counted tensor by tensor as transformers' Llama blocks and torch's autograd keep them.

The method is that of Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models", section
4.1), applied to this architecture: RMSNorm in float32 and not fused, rotary embeddings, a gated MLP, attention that
never holds its scores (sdpa). docs/memory.md derives each line.

All functions give bytes a token. ``d``, ``f``, ``q``, ``k``: widths of residual stream, MLP, queries, keys; ``b``:
bytes of the compute dtype.
"""

from dataclasses import dataclass

from wmtp_ds.plan.shape import ModelShape

FLOAT = 4


@dataclass(frozen=True)
class Activations:
    """Of one model in one dtype; bytes a token.

    Args:
        shape: the model.
        b: bytes of the compute dtype.
        packed: whether rows are packed: attention under a mask repeats grouped keys and values for every query head.
    """

    shape: ModelShape
    b: int
    packed: bool = False

    @property
    def residual(self) -> int:
        """One tensor of the residual stream: all that a checkpointed block keeps."""
        return self.b * self.shape.hidden_size

    @property
    def norm(self) -> int:
        """What an RMSNorm keeps besides its input: the normalised input, and in 16 bits its float32 copy."""
        d = self.shape.hidden_size
        return d * self.b if self.b == FLOAT else d * FLOAT + d * self.b

    @property
    def norm_input(self) -> int:
        """What an RMSNorm keeps of its input: in float32 the input itself, else the copy that :attr:`norm` counts."""
        return self.residual if self.b == FLOAT else 0

    @property
    def attention(self) -> int:
        """Kept by attention: its input, rotated queries and keys, values, output, the sums of its softmax."""
        s = self.shape
        keys = s.queries if self.packed else s.keys
        return self.b * (s.hidden_size + 2 * s.queries + 2 * keys) + FLOAT * s.num_attention_heads

    @property
    def mlp(self) -> int:
        """Kept by the MLP: its input, gate, SiLU of the gate, up, and their product."""
        return self.b * (self.shape.hidden_size + 4 * self.shape.intermediate_size)

    @property
    def block(self) -> int:
        """Kept by a block for its backward pass."""
        return 2 * (self.norm + self.norm_input) + self.attention + self.mlp

    @property
    def forward_transient(self) -> int:
        """At most alive at once inside a block that keeps nothing, beyond its input."""
        s, b = self.shape, self.b
        norm = self.residual + FLOAT * s.hidden_size * (3 if b != FLOAT else 2)
        attention = 2 * self.residual + b * (4 * s.queries + 2 * s.keys)
        mlp = 3 * self.residual + b * 3 * s.intermediate_size
        return max(norm, attention, mlp)

    @property
    def backward_transient(self) -> int:
        """At most alive at once in a block's backward pass, beyond what forward kept: gradients of the MLP's inside."""
        return self.b * 2 * self.shape.intermediate_size + 3 * self.residual

    def value_head(self, kind: str) -> int:
        """Kept by a value head, which computes in float32: its norm and, of an MLP, the hidden layer and its SiLU."""
        d = self.shape.hidden_size
        copy = 0 if self.b == FLOAT else FLOAT * d
        return copy + FLOAT * d * (4 if kind == "mlp" else 2)
