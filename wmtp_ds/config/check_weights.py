"""A Llama's config.json against itself and against the headers of its weights, without torch or transformers."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmtp_ds.config.context import Context
from wmtp_ds.errors import UserError
from wmtp_ds.models.fingerprint import numbers_of, stored_tensors

_MICRO = "storage/models/micro-"
# transformers' LlamaConfig: what it takes for a size that config.json leaves out.
_SIZES = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True)
class Architecture:
    """The sizes that a config.json gives: ``blocks`` of the next-token model, ``heads`` that predict tokens."""

    blocks: int
    heads: int
    vocabulary: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    head_dim: int
    attention_bias: bool
    mlp_bias: bool
    is_tied: bool


def is_micro(path: str) -> bool:
    """Whether a model's folder is one that ``wmtp-ds model micro`` makes."""
    return os.path.normpath(path).startswith(_MICRO)


def how_to_mend_model(path: str) -> str:
    """What helps where a model's folder is damaged."""
    return "make it again: wmtp-ds model micro" if is_micro(path) else "copy the model again"


def read_architecture(
    context: Context, key: str, config: dict[str, Any], *, heads: int | None = None, least_blocks: int = 2
) -> Architecture | None:
    """The sizes in a config.json, or None once it is reported what is wrong.

    Args:
        context: the configuration under examination.
        key: of the model's folder.
        config: what its config.json holds.
        heads: how many heads are loaded; None: as config.json says.
        least_blocks: how many blocks the model must have.
    """
    report = _Report(context, key)
    kind = config.get("model_type")
    if kind != "llama":
        report(f"says model_type = {json.dumps(kind)}; only Llama models work here", "use a Llama model")
        return None
    blocks = report.size(config, "num_hidden_layers", least=least_blocks)
    heads = heads or report.heads(config)
    sizes = {name: report.size(config, name, default) for name, default in _SIZES.items()}
    queries = sizes["num_attention_heads"]
    keys = queries if config.get("num_key_value_heads") is None else report.size(config, "num_key_value_heads")
    head_dim = None if config.get("head_dim") is None else report.size(config, "head_dim")
    _check_attention(report, sizes["hidden_size"], queries, keys)
    _check_kinds(report, config)
    if report.found or blocks is None or heads is None or keys is None:
        return None
    vocabulary, hidden, intermediate, queries = (size or 0 for size in sizes.values())
    flags = (config.get(name) is True for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"))
    return Architecture(
        blocks, heads, vocabulary, hidden, intermediate, queries, keys, head_dim or hidden // queries, *flags
    )


class _Report:
    """Reports on one config.json, and remembers whether there was anything."""

    def __init__(self, context: Context, key: str):
        self.context, self.key, self.found = context, key, False
        self.path = context.path(key) or ""

    def __call__(self, message: str, mend: str = "") -> None:
        self.found = True
        mend = mend or f"correct config.json, or {how_to_mend_model(self.path)}"
        self.context.report(self.key, f"{self.path}/config.json {message}", mend)

    def size(self, config: dict[str, Any], name: str, default: int | None = None, least: int = 1) -> int | None:
        value = config.get(name, default)
        if type(value) is int and least <= value < 2**63:
            return value
        self(f"says {name} = {json.dumps(value)[:60]}; it must be a whole number of at least {least}")
        return None

    def heads(self, config: dict[str, Any]) -> int | None:
        if config.get("n_future_tokens") is not None:
            return self.size(config, "n_future_tokens")
        mend = 'add "n_future_tokens": 1 to train it as a plain next-token model'
        self("does not say n_future_tokens, the number of heads", mend)
        return None


def _check_attention(report: _Report, hidden: int | None, queries: int | None, keys: int | None) -> None:
    # transformers wants this even where head_dim is given.
    if hidden and queries and hidden % queries:
        report(f"says hidden_size = {hidden}, which num_attention_heads = {queries} does not divide")
    if queries and keys and queries % keys:
        report(f"says num_attention_heads = {queries}, which num_key_value_heads = {keys} does not divide")


def _check_kinds(report: _Report, config: dict[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        report(f"says hidden_act = {json.dumps(activation)}; known are {', '.join(_ACTIVATIONS)}")
    for name in ("rope_parameters", "rope_scaling"):
        value = config.get(name)
        if value is not None and not isinstance(value, dict):
            report(f"says {name} = {json.dumps(value)[:60]}; it must be an object {{...}}")


def read_shapes(context: Context, key: str) -> dict[str, tuple[int, ...]] | None:
    """Name and shape of every tensor in a model folder, or None once it is reported what is wrong."""
    path = context.path(key) or ""
    try:
        return {name: tensor.shape for name, tensor in stored_tensors(Path(path)).items()}
    except UserError as error:
        context.report(key, str(error), how_to_mend_model(path))
        return None


def check_weights(context: Context, key: str, model: Architecture) -> None:
    """The weights hold the tensors that config.json asks for, in their shapes, and no further blocks."""
    shapes = read_shapes(context, key)
    if shapes is None:
        return
    path = context.path(key) or ""
    wrong = []
    for name, expected in _expected_shapes(model, *_check_blocks(context, key, model, shapes)):
        if shapes.get(name) != expected:
            held = f"of shape {list(shapes[name])}" if name in shapes else "missing"
            wrong.append(f"{name} is {held}; config.json says {list(expected)}")
    if wrong:
        rest = f" (and {len(wrong) - 1} more tensors like it)" if len(wrong) > 1 else ""
        context.report(key, f"{path}: {wrong[0]}{rest}", how_to_mend_model(path))


def _check_blocks(
    context: Context, key: str, model: Architecture, shapes: dict[str, tuple[int, ...]]
) -> tuple[list[str], list[str]]:
    """Compare the numbers of blocks and heads; the names of those that are there as config.json says."""
    path = context.path(key) or ""
    there: list[list[str]] = []
    for what, holder, count, says in (
        ("block", "model.layers", model.blocks, f"num_hidden_layers = {model.blocks}"),
        ("head", "mtp_heads", model.heads - 1, f"n_future_tokens = {model.heads}"),
    ):
        held = sorted(numbers_of(shapes, holder))
        within, extra = [n for n in held if n < count], [n for n in held if n >= count]
        there.append([f"{holder}.{number}" for number in within])
        if len(within) < count:
            first = next(number for number in range(count) if number not in within)
            message = f"{path} has no weights of {what} {holder}.{first}, though config.json says {says}"
            context.report(key, message, how_to_mend_model(path))
        if not extra:
            continue
        message = f"{path}: the weights hold {holder}.{extra[0]}, but config.json says {says}"
        if what == "block":
            context.report(key, message, f"set num_hidden_layers to {extra[-1] + 1}, or {how_to_mend_model(path)}")
        elif key == "models.policy.path":  # a reference is loaded with head 1 alone
            context.warn(key, f"{message}: it is left out", f"set n_future_tokens to {extra[-1] + 2} to train it, too")
    return there[0], there[1]


def _expected_shapes(model: Architecture, blocks: list[str], heads: list[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (model.vocabulary, model.hidden)
    for block in (*blocks, *heads):
        yield from _block_shapes(model, block)
    yield "model.norm.weight", (model.hidden,)
    if not model.is_tied:
        yield "lm_head.weight", (model.vocabulary, model.hidden)


def _block_shapes(model: Architecture, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    queries, keys = model.queries * model.head_dim, model.keys * model.head_dim
    for layers, has_bias in (
        ({"q": (queries, model.hidden), "k": (keys, model.hidden)}, model.attention_bias),
        ({"v": (keys, model.hidden), "o": (model.hidden, queries)}, model.attention_bias),
        ({"gate": (model.intermediate, model.hidden), "up": (model.intermediate, model.hidden)}, model.mlp_bias),
        ({"down": (model.hidden, model.intermediate)}, model.mlp_bias),
    ):
        for name, shape in layers.items():
            module = f"{prefix}.{'self_attn' if len(name) == 1 else 'mlp'}.{name}_proj"
            yield f"{module}.weight", shape
            if has_bias:
                yield f"{module}.bias", shape[:1]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{norm}.weight", (model.hidden,)
