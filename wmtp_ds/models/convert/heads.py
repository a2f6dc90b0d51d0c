"""Heads for a model that has but one: copies of its last block, or new ones."""

import re
from typing import Literal

from wmtp_ds.errors import UserError
from wmtp_ds.models.convert.architecture import llama_config
from wmtp_ds.models.convert.source import Source
from wmtp_ds.models.convert.tensors import LazyTensor, constant, normal

Heads = Literal["copy", "random"]
DEFAULT_HEADS = 4


def add_heads(source: Source, kind: Heads, n_future: int | None, seed: int) -> None:
    """Give a checked next-token model ``n_future`` heads; a model that has several keeps them.

    Copies predict, at first, the next token in place of the one after it; new blocks start as transformers starts a
    Llama (normal weights of standard deviation ``initializer_range``, norms of 1).

    Args:
        source: checked by ``check_complete``.
        kind: what the extra heads start as.
        n_future: n; None is as many as the model has, or 4.
        seed: of new blocks.

    Raises:
        UserError: if the model has several heads, but not ``n_future``.
    """
    if source.heads > 1:
        if n_future not in (None, source.heads):
            raise UserError(
                f"{source.path} has {source.heads} heads already, not {n_future}: leave --n-future out. "
                "(For one head alone: wmtp-ds model export --format hf.)"
            )
        return
    count = n_future or DEFAULT_HEADS
    blocks = source.fields["num_hidden_layers"]
    prefix = f"model.layers.{blocks - 1}."
    last = {name.removeprefix(prefix): value for name, value in source.tensors.items() if name.startswith(prefix)}
    std = llama_config(source.fields, 1, str(source.path)).initializer_range
    for head in range(count - 1):
        for name, tensor in last.items():
            full = f"mtp_heads.{head}.{name}"
            source.tensors[full] = tensor if kind == "copy" else _new(full, tensor, std, seed)
    source.fields["n_future_tokens"] = count


def _new(name: str, like: LazyTensor, std: float, seed: int) -> LazyTensor:
    if re.search(r"layernorm\.weight$", name):
        return constant(name, like.dtype, like.shape, 1.0)
    if name.endswith(".bias"):
        return constant(name, like.dtype, like.shape, 0.0)
    return normal(name, like.dtype, like.shape, std, f"{seed}\0{name}")
