"""What of a model decides its memory: the sizes in its config.json, or those of a well-known model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from wmtp_ds.bench.sizes import REFERENCES, SIZES, Shape
from wmtp_ds.errors import UserError

_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s*(b|m)(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class ModelShape:
    """A Llama with several prediction heads; the names are those of its config.json.

    Of ``num_hidden_layers`` blocks the last is head 1; ``n_future_tokens − 1`` further blocks are the other heads.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    n_future_tokens: int = 1
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def queries(self) -> int:
        """Width of the queries, and of the attention's output."""
        return self.num_attention_heads * (self.head_dim or self.hidden_size // self.num_attention_heads)

    @property
    def keys(self) -> int:
        """Width of the keys, and of the values: narrower than the queries under grouped-query attention."""
        return self.num_key_value_heads * (self.head_dim or self.hidden_size // self.num_attention_heads)

    @property
    def trunk_blocks(self) -> int:
        """Blocks that all heads share."""
        return self.num_hidden_layers - 1

    @cached_property
    def block_modules(self) -> tuple[tuple[int, ...], ...]:
        """Elements of the parameters of each module of a block, in the order in which forward calls them."""
        d, f, q, k = self.hidden_size, self.intermediate_size, self.queries, self.keys

        def bias(wanted: bool, size: int) -> tuple[int, ...]:
            return (size,) if wanted else ()

        attention = [(d * width, *bias(self.attention_bias, width)) for width in (q, k, k)]
        mlp = [(d * f, *bias(self.mlp_bias, f)), (d * f, *bias(self.mlp_bias, f)), (f * d, *bias(self.mlp_bias, d))]
        return ((d,), *attention, (q * d, *bias(self.attention_bias, d)), (d,), *mlp)

    @cached_property
    def block(self) -> int:
        """Parameters of one block."""
        return sum(map(sum, self.block_modules))

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the unembedding."""
        return self.vocab_size * self.hidden_size

    @property
    def counts(self) -> dict[str, int]:
        """Parameters of each part: embeddings, trunk, heads, norm, unembedding (0 if it is the embeddings)."""
        return {
            "embeddings": self.embedding,
            "trunk": self.trunk_blocks * self.block,
            "heads": self.n_future_tokens * self.block,
            "norm": self.hidden_size,
            "unembedding": 0 if self.tied else self.embedding,
        }

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(self.counts.values())

    def with_heads(self, n: int) -> "ModelShape":
        """The same trunk with another number of heads; the blocks of the others are left out or added."""
        return replace(self, n_future_tokens=n)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], where: str) -> "ModelShape":
        """From a config.json.

        Args:
            fields: its content.
            where: the file, for messages.

        Raises:
            UserError: if it lacks a size, or has something else in its place.
        """

        def size(name: str, default: int | None = None) -> int:
            value = fields.get(name)
            value = default if value is None else value
            if type(value) is not int or value < 1:
                raise UserError(f"{where} says {name} = {value!r}, which is no size. Copy the model again.")
            return value

        heads, hidden = size("num_attention_heads"), size("hidden_size")
        return cls(
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_hidden_layers=size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=size("num_key_value_heads", heads),
            vocab_size=size("vocab_size"),
            n_future_tokens=size("n_future_tokens", 1),
            head_dim=size("head_dim", max(1, hidden // heads)),
            tied=bool(fields.get("tie_word_embeddings", False)),
            attention_bias=bool(fields.get("attention_bias", False)),
            mlp_bias=bool(fields.get("mlp_bias", False)),
        )


def _of(shape: Shape) -> ModelShape:
    return ModelShape(**{name: getattr(shape, name) for name in Shape.__dataclass_fields__})


# Well-known models with four heads. As in Meta's multi-token release, the heads' blocks are taken from the model's own,
# so that a policy has as many parameters as the model it is named after: Llama-2-13B has 40 blocks, CodeLlama-34B 48,
# Llama-2-70B 80; the rest is what `wmtp-ds bench step` measures.
NAMED = {name: _of(shape) for name, shape in SIZES.items()} | {
    "2.7b": replace(_of(REFERENCES["7b"]), num_hidden_layers=29, n_future_tokens=4),  # Sheared-LLaMA-2.7B
    "13b": ModelShape(5120, 13_824, 37, 40, 40, 32_000, 4),
    "34b": ModelShape(8192, 22_016, 45, 64, 8, 32_000, 4),
    "70b": ModelShape(8192, 28_672, 77, 64, 8, 32_000, 4),
}


def plain(name: str) -> ModelShape:
    """A named size as the next-token model that it comes from: all blocks, one head."""
    shape = NAMED[name]
    return replace(shape, num_hidden_layers=shape.num_hidden_layers + shape.n_future_tokens - 1, n_future_tokens=1)


def size_named_in(*texts: str) -> str | None:
    """The first known size that one of the texts names: "llama-7b-mtp" names "7b"."""
    for text in texts:
        for number, unit in _SIZE.findall(text.replace("_", "-").replace("-", " ").replace("/", " ")):
            if (name := f"{number}{unit.lower()}") in NAMED:
                return name
        if "micro" in text:
            return "micro"
    return None
