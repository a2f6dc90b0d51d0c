"""What a config.json asks for, compared with the tensors that there are."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.initialization import no_init_weights

from wmtp_ds.errors import UserError
from wmtp_ds.models.convert.safetensors_files import DTYPES
from wmtp_ds.models.convert.source import Source
from wmtp_ds.models.convert.tensors import LazyTensor, checksum
from wmtp_ds.models.fingerprint import numbers_of
from wmtp_ds.models.mtp import MTPLlamaForCausalLM

EMBEDDINGS, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"


def llama_config(fields: Mapping[str, Any], heads: int, where: str) -> LlamaConfig:
    """The config that transformers makes of the fields of a config.json.

    Raises:
        UserError: if they describe no Llama.
    """
    try:
        return LlamaConfig.from_dict(copy.deepcopy(dict(fields)) | {"n_future_tokens": heads})
    except Exception as error:  # its validation raises exceptions of a dozen kinds
        raise UserError(f"{where}: config describes no Llama: {_in_one_line(error)}") from None


def expected_shapes(config: LlamaConfig, where: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a policy; its unembedding is left out where it is the embeddings.

    Raises:
        UserError: if no such model can be built.
    """
    try:
        with torch.device("meta"), no_init_weights():
            model = MTPLlamaForCausalLM(config)
    except Exception as error:  # whatever transformers raises for values that do not go together
        raise UserError(f"{where}: config describes no model that can be built: {_in_one_line(error)}") from None
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if config.tie_word_embeddings:
        shapes.pop(UNEMBEDDING, None)
    return shapes


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def check_complete(source: Source) -> None:
    """Compare a source's tensors with its config, and settle whether its embeddings are tied.

    Afterwards ``source.tensors`` holds exactly what the config asks for, in the order of the model's parameters, and
    ``source.fields["tie_word_embeddings"]`` is what transformers makes of the stored tensors.

    Raises:
        UserError: naming the first tensor that is missing, too many, of another shape, or not floating-point.
    """
    where = str(source.path)
    _settle_tying(source)
    config = llama_config(source.fields, source.heads, where)
    shapes = expected_shapes(config, where)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):  # older configs leave out what is the default
        source.fields.setdefault(name, getattr(config, name))
    _check_numbers(source, shapes)
    missing = [name for name in shapes if name not in source.tensors]
    if missing:
        raise UserError(
            f"{where} lacks {len(missing)} of the tensors that its config asks for, first {missing[0]}. "
            "Copy the model again."
        )
    unknown = sorted(source.tensors.keys() - shapes.keys())
    if unknown:
        raise UserError(
            f"{where} holds {len(unknown)} tensors that a Llama of this config does not have, first {unknown[0]}: "
            "it is of another architecture, or its config.json is not its own."
        )
    for name, shape in shapes.items():
        tensor = source.tensors[name]
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.origin} has shape {list(tensor.shape)}, but the model's config asks for {list(shape)}."
            )
        if tensor.dtype not in DTYPES.values():
            raise UserError(
                f"{tensor.origin} is stored as {str(tensor.dtype).removeprefix('torch.')}: quantised weights cannot be "
                "trained. Take the model in float32, bfloat16 or float16."
            )
    source.tensors = {name: source.tensors[name] for name in shapes}


def _settle_tying(source: Source) -> None:
    """As transformers does: tied embeddings that are stored twice with different values are not tied after all."""
    if not source.fields.get("tie_word_embeddings", False):
        if UNEMBEDDING not in source.tensors and EMBEDDINGS in source.tensors:
            raise UserError(
                f"{source.path} lacks {UNEMBEDDING}. If the model shares it with its embeddings, config.json must say "
                '"tie_word_embeddings": true; otherwise copy the model again.'
            )
        return
    embeddings, unembedding = source.tensors.get(EMBEDDINGS), source.tensors.get(UNEMBEDDING)
    if unembedding is None:
        return
    if embeddings is None:
        source.tensors[EMBEDDINGS] = source.tensors.pop(UNEMBEDDING)
    elif _is_the_same(embeddings, unembedding):
        del source.tensors[UNEMBEDDING]
    else:
        source.fields["tie_word_embeddings"] = False


def _is_the_same(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two matrices are equal to the bit."""
    if len(one.shape) != 2 or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return checksum(one) == checksum(other)


def _check_numbers(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Blocks and heads are as many as the config says: too few or too many is told in one line."""
    for what, holder, key in (
        ("blocks", "model.layers", "num_hidden_layers"),
        ("extra heads", "mtp_heads", "n_future_tokens"),
    ):
        held, wanted = numbers_of(source.tensors, holder), numbers_of(shapes, holder)
        if held != wanted:
            extra = 1 if holder == "mtp_heads" else 0
            raise UserError(
                f"{source.path}: config says {key} = {len(wanted) + extra}, which is {len(wanted)} {what} "
                f"({holder}.*), but the weights hold {len(held)}. Correct {key}, or copy the model again."
            )
