"""The models that a step is measured with: their shapes, and the memory that training them takes."""

from dataclasses import dataclass, replace
from typing import Any

import psutil

from wmtp_ds.errors import UserError

VOCABULARY = 32_000


@dataclass(frozen=True)
class Shape:
    """A Llama with several prediction heads; the names are those of its config.json.

    Of ``num_hidden_layers`` blocks the last is head 1; ``n_future_tokens − 1`` further blocks are the other heads.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = VOCABULARY
    n_future_tokens: int = 4

    @property
    def head_dim(self) -> int:
        """Dimension of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def trunk_blocks(self) -> int:
        """Blocks that all heads share."""
        return self.num_hidden_layers - 1

    @property
    def block_matrices(self) -> int:
        """Parameters of a block's matrices: q, k, v, o of the attention; gate, up and down of the MLP."""
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        return self.hidden_size * (2 * queries + 2 * keys + 3 * self.intermediate_size)

    @property
    def parameters(self) -> int:
        """All parameters, norms and embeddings included; the unembedding is a matrix of its own."""
        blocks = self.trunk_blocks + self.n_future_tokens
        return (
            blocks * (self.block_matrices + 2 * self.hidden_size)
            + 2 * self.vocab_size * self.hidden_size
            + self.hidden_size
        )

    def fields(self, *, max_length: int, attention: str) -> dict[str, Any]:
        """The model's config.json; tokens 0, 1 and 2 are padding, beginning and end."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attn_implementation": attention,
            "max_position_embeddings": max_length,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
        }


# `micro` is the model that `wmtp-ds model micro` makes, with the vocabulary of a Llama; `7b` is Llama-2-7B as published
# with four prediction heads.
SIZES = {
    "micro": Shape(64, 160, 3, 4, 2),
    "160m": Shape(768, 2048, 12, 12, 12),
    "1b": Shape(2048, 8192, 15, 32, 8),
    "7b": Shape(4096, 11008, 29, 32, 32),
}
# The frozen reference that `rho1` compares with: a next-token model, of the policy's size or the next one below.
REFERENCES = {
    "micro": Shape(32, 64, 2, 2, 2, n_future_tokens=1),
    "160m": replace(SIZES["160m"], n_future_tokens=1),
    "1b": replace(SIZES["1b"], n_future_tokens=1),
    "7b": Shape(2560, 6912, 32, 20, 20, n_future_tokens=1),
}


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that weights, gradients and optimizer states take on one machine, activations not counted.

    Args:
        trained: parameters with gradients and Adam's two moments.
        frozen: parameters that are only read.
        sixteen_bit: whether the model computes in 16 bits (weights and gradients 2 bytes, masters 4), or in float32
            (weights and gradients 4 bytes, and ZeRO-3's own copy of the weights 4).
    """

    trained: int
    frozen: int
    sixteen_bit: bool

    @property
    def bytes(self) -> int:
        """In all: Adam's moments are 8 bytes a trained parameter, the rest as above."""
        weight = 2 if self.sixteen_bit else 4
        return self.trained * (2 * weight + 4 + 8) + self.frozen * weight

    def __str__(self) -> str:
        weight = 2 if self.sixteen_bit else 4
        text = f"{self.trained:,} trained parameters × {2 * weight + 12} bytes (weights {weight}, gradients {weight}, "
        text += "masters 4, Adam's moments 8)"
        if self.frozen:
            text += f" + {self.frozen:,} frozen ones × {weight} bytes"
        return f"{text} = {self.bytes / 2**30:.1f} GiB"


def check_memory(need: MemoryNeed, device: str, ranks: int, size: str) -> None:
    """Refuse a model that cannot fit, before anything is built.

    Raises:
        UserError: with the arithmetic. Sharded over GPUs, each holds its part; CPU ranks share one memory.
    """
    if device == "cuda":
        import torch

        # What the GPUs have, not what is free on them: asking for that takes some of it.
        each = min(torch.cuda.get_device_properties(index).total_memory for index in range(ranks))
        room, where = each * ranks, f"{ranks} GPU{'s' if ranks > 1 else ''} of {each / 2**30:.1f} GiB"
    else:
        room = psutil.virtual_memory().available
        where = f"this machine with {room / 2**30:.1f} GiB available"
    if need.bytes > room:
        raise UserError(
            f"--size {size} does not fit {where}: {need}, activations not counted. "
            "Choose a smaller --size, or more GPUs."
        )
