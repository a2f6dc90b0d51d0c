r"""How many operations a step needs, and what share of the device's peak that is (MFU).

A matrix of ``P`` elements that multiplies one vector takes ``2P`` operations (a multiplication and an addition each).
Backward takes twice what forward does: one product for the gradient of the input, one for that of the matrix. So a
trained matrix needs ``6P`` a token, and a frozen one ``2P``.

With ``T`` tokens that are not padding, ``A = Σ L·(L+1)/2`` pairs of tokens that attend to each other (causally, over
sequences of ``L`` tokens), ``M`` supervised targets over all heads, of which ``K`` are learned from::

    trunk        6·T·P_block·(trunk blocks) + 12·A·d_attention·(trunk blocks)
    heads        the same with n blocks
    unembedding  (2·M + 4·K)·D·V               every target is scored; only what is learned from has a gradient
    value head   6·T·P_value
    reference    2·T·P_block·(its blocks) + 4·A·d_attention·(its blocks) + 2·M_1·D·V

Where the policy is frozen (critic), its trunk needs a third of that and its heads nothing. Of the attention's 12: two
products (queries with keys, weights with values), two operations each, three times for forward and backward. Recomputed
activations (gradient checkpointing, a value pass for normalised weights), prompts' and padding's logits, norms,
softmaxes, and optimizer are not counted: the model does not need them, or they are no products of matrices.

    MFU = operations of the global batch / (seconds of the step · ranks · peak operations per second of one device)

Many publish a *nominal* MFU, in which every position counts, padding included, with full (not causal) attention and all
positions' logits: ``6P·tokens + 12·layers·d·S·tokens``. It flatters; it is reported beside the other for comparison.
"""

from dataclasses import asdict, dataclass

from wmtp_ds.bench.sizes import Shape

# Dense peak of a device's matrix units in TFLOP/s, from the makers' data sheets (without sparsity). float32 is without
# TF32, which torch does not use for matrix products unless told to. The first name that a device's contains counts.
PEAKS: dict[str, dict[str, float]] = {
    "B200": {"bfloat16": 2250.0, "float16": 2250.0, "float32": 75.0},
    "GH200": {"bfloat16": 989.4, "float16": 989.4, "float32": 66.9},
    "H200 NVL": {"bfloat16": 835.5, "float16": 835.5, "float32": 60.0},
    "H200": {"bfloat16": 989.4, "float16": 989.4, "float32": 66.9},
    "H100 PCIe": {"bfloat16": 756.5, "float16": 756.5, "float32": 51.2},
    "H100 NVL": {"bfloat16": 835.5, "float16": 835.5, "float32": 60.0},
    "H100": {"bfloat16": 989.4, "float16": 989.4, "float32": 66.9},
    "H800": {"bfloat16": 989.4, "float16": 989.4, "float32": 66.9},
    "A100": {"bfloat16": 311.9, "float16": 311.9, "float32": 19.5},
    "A800": {"bfloat16": 311.9, "float16": 311.9, "float32": 19.5},
    "L40S": {"bfloat16": 362.1, "float16": 362.1, "float32": 91.6},
    "RTX 4090": {"bfloat16": 165.2, "float16": 165.2, "float32": 82.6},
    "RTX 3090": {"bfloat16": 71.0, "float16": 71.0, "float32": 35.6},
    "V100": {"float16": 125.0, "float32": 15.7},
}


def peak_of(device_name: str, dtype: str) -> float | None:
    """Peak TFLOP/s of a GPU by its name; None if it is not in the table."""
    for name, peaks in PEAKS.items():
        if name.lower() in device_name.lower():
            return peaks.get(dtype)
    return None


@dataclass(frozen=True)
class Work:
    """What a global batch consists of, as far as operations go. Sums over its sequences."""

    tokens: float  # that are not padding
    pairs: float  # Σ L·(L+1)/2
    positions: float  # padding included
    full_pairs: float  # Σ S²
    targets: float  # supervised targets over all heads
    learned: float  # those that a gradient flows from
    next_targets: float  # supervised targets of head 1


@dataclass(frozen=True)
class Trains:
    """What a stage trains and reads."""

    policy: bool = True
    value_head: str | None = None  # "linear" or "mlp"
    reference: Shape | None = None


@dataclass(frozen=True)
class Operations:
    """Operations of one step, part by part."""

    trunk: float
    heads: float
    unembedding: float
    value_head: float
    reference: float

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(asdict(self).values()))


def needed(shape: Shape, trains: Trains, work: Work) -> Operations:
    """The operations that the model needs; see the module's formula."""
    return _count(shape, trains, work.tokens, work.pairs, work.targets, work.learned, work.next_targets)


def nominal(shape: Shape, trains: Trains, work: Work) -> Operations:
    """By the usual convention: every position, full attention, all heads' logits at all positions."""
    targets = shape.n_future_tokens * work.positions
    return _count(shape, trains, work.positions, work.full_pairs, targets, targets, work.positions)


def _count(
    shape: Shape, trains: Trains, tokens: float, pairs: float, targets: float, learned: float, next_targets: float
) -> Operations:
    passes = 3 if trains.policy else 1
    block = _block(shape, tokens, pairs)
    unembedding = shape.hidden_size * shape.vocab_size
    reference = 0.0
    if trains.reference is not None:
        other = trains.reference
        reference = other.num_hidden_layers * _block(other, tokens, pairs)
        reference += 2 * next_targets * other.hidden_size * other.vocab_size
    return Operations(
        trunk=passes * shape.trunk_blocks * block,
        heads=3 * shape.n_future_tokens * block if trains.policy else 0.0,
        unembedding=(2 * targets + 4 * learned) * unembedding if trains.policy else 0.0,
        value_head=6 * tokens * _value_matrices(shape.hidden_size, trains.value_head),
        reference=reference,
    )


def _block(shape: Shape, tokens: float, pairs: float) -> float:
    """Forward operations of one block."""
    attention = shape.num_attention_heads * shape.head_dim
    return 2 * tokens * shape.block_matrices + 4 * pairs * attention


def _value_matrices(hidden_size: int, kind: str | None) -> int:
    if kind is None:
        return 0
    return hidden_size + (hidden_size**2 if kind == "mlp" else 0)


def mfu(operations: float, seconds: float, ranks: int, peak_tflops: float) -> float:
    """The share of the devices' peak: ``operations / (seconds · ranks · peak)``.

    Raises:
        ValueError: if a quantity is not positive.
    """
    if min(seconds, ranks, peak_tflops) <= 0:
        raise ValueError(f"seconds {seconds}, ranks {ranks} and peak {peak_tflops} must be positive")
    return operations / (seconds * ranks * peak_tflops * 1e12)
