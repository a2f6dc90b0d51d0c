"""Sizes of models: against transformers' own modules, and the published counts."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from wmtp_ds.errors import UserError
from wmtp_ds.models.mtp import MTPLlamaForCausalLM
from wmtp_ds.plan.shape import NAMED, ModelShape, plain, size_named_in
from wmtp_ds.plan.states import parameters_of

FIELDS = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "n_future_tokens": 4,
}


def built(**changes: object) -> tuple[ModelShape, MTPLlamaForCausalLM]:
    fields = FIELDS | changes
    with torch.device("meta"):
        model = MTPLlamaForCausalLM(LlamaConfig(**fields))
    return ModelShape.from_fields(fields, "config.json"), model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_future_tokens": 1},
        {"num_key_value_heads": 4},
        {"head_dim": 32},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
    ],
)
def test_parameters_are_the_models(changes: dict[str, object]) -> None:
    shape, model = built(**changes)
    theirs = [parameter.numel() for parameter in model.parameters()]
    assert sorted(parameters_of(shape)) == sorted(theirs)
    assert shape.parameters == sum(theirs)
    assert shape.counts["trunk"] == sum(p.numel() for block in model.model.layers[:-1] for p in block.parameters())
    heads = [model.model.layers[-1], *model.mtp_heads]
    assert shape.counts["heads"] == sum(p.numel() for block in heads for p in block.parameters())


def test_a_blocks_modules_come_in_the_order_of_forward() -> None:
    shape, model = built(attention_bias=True)
    called: list[tuple[int, ...]] = []
    block = model.model.layers[0]
    for module in block.modules():
        own = tuple(parameter.numel() for parameter in module.parameters(recurse=False))
        if own:
            module.register_forward_pre_hook(lambda _m, _i, own=own: called.append(own))
    states = torch.empty(1, 5, 64, device="meta")
    positions = torch.arange(5, device="meta")[None]
    block(states, position_embeddings=model.model.rotary_emb(states, positions), position_ids=positions)
    assert tuple(called) == shape.block_modules


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("7b", 6_738_415_616),
        ("13b", 13_015_864_320),
        ("34b", 33_743_970_304),
        ("70b", 68_976_648_192),
        ("2.7b", 2_701_560_320),
    ],
)
def test_named_sizes_have_the_published_number_of_parameters(name: str, published: int) -> None:
    assert NAMED[name].parameters == published
    assert plain(name).parameters == published
    assert plain(name).n_future_tokens == 1
    assert NAMED[name].n_future_tokens == 4


def test_heads_are_added_or_left_out() -> None:
    shape = NAMED["micro"]
    assert shape.parameters - shape.with_heads(1).parameters == 3 * shape.block
    assert replace(shape, tied=True).parameters == shape.parameters - shape.embedding


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -1, "64", True, 1.5])
def test_a_size_that_is_none_is_an_error(key: str, value: object) -> None:
    with pytest.raises(UserError, match=key):
        ModelShape.from_fields(FIELDS | {key: value}, "config.json")


def test_optional_fields_have_the_defaults_of_llama() -> None:
    given = {key: value for key, value in FIELDS.items() if key not in ("num_key_value_heads", "n_future_tokens")}
    shape = ModelShape.from_fields(given | {"head_dim": None, "num_key_value_heads": None}, "config.json")
    assert (shape.num_key_value_heads, shape.n_future_tokens, shape.head_dim) == (4, 1, 16)
    assert (shape.tied, shape.attention_bias, shape.mlp_bias) == (False, False, False)


@pytest.mark.parametrize(
    ("texts", "size"),
    [
        (["llama-7b-mtp"], "7b"),
        (["sheared-llama-2.7b"], "2.7b"),
        (["storage/models/Llama-2-70B-hf"], "70b"),
        (["the policy", "models/code_llama_34B"], "34b"),
        (["micro-policy"], "micro"),
        (["llama-160M"], "160m"),
        (["7bit-quantised"], None),
        (["llama-9b"], None),
        (["v1.7b"], None),
        ([""], None),
    ],
)
def test_a_size_is_read_from_a_name(texts: list[str], size: str | None) -> None:
    assert size_named_in(*texts) == size
