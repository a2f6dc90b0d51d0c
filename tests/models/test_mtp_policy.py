"""The policy against plain Llamas: every head run alone, as a model of its own."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp_ds.models.mtp import MTPLlamaForCausalLM

SHAPES = {
    "grouped-query attention": {},
    "full attention": {"num_key_value_heads": 4},
    "tied embeddings": {"tie_word_embeddings": True},
    "long trunk": {"num_hidden_layers": 5},
    "no trunk": {"num_hidden_layers": 1},
    "attention and MLP biases": {"attention_bias": True, "mlp_bias": True},
    "attention that needs a mask": {"attn_implementation": "eager"},
    "another rotary base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}


def head_alone(policy: MTPLlamaForCausalLM, head: int) -> LlamaForCausalLM:
    """Head ``head`` (from 1) as a plain Llama: the trunk's blocks, then that head as its last block."""
    trunk = policy.config.num_hidden_layers - 1
    fields = {name: value for name, value in policy.config.to_dict().items() if name != "n_future_tokens"}
    plain = LlamaForCausalLM(LlamaConfig.from_dict(fields)).eval()
    block = f"model.layers.{trunk}." if head == 1 else f"mtp_heads.{head - 2}."
    kept = ("model.embed_tokens.", "model.norm.", "lm_head.", *(f"model.layers.{layer}." for layer in range(trunk)))
    weights = {}
    for name, value in policy.state_dict().items():
        if name.startswith(kept):
            weights[name] = value.clone()
        if name.startswith(block):
            weights[f"model.layers.{trunk}.{name.removeprefix(block)}"] = value.clone()
    plain.load_state_dict(weights)
    return plain


@torch.no_grad()
def head_logits(policy: MTPLlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """``[n, B, S, V]``."""
    return policy.lm_head(policy.head_states(policy.trunk(tokens)))


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_each_head_is_a_plain_llama(make_policy, tokens, n, changes):
    policy = make_policy(n, **changes)
    assert policy.n_future_tokens == n
    assert policy.config._attn_implementation == changes.get("attn_implementation", "sdpa")
    logits = head_logits(policy, tokens)
    assert logits.shape == (n, *tokens.shape, 61)
    for head in range(1, n + 1):
        with torch.no_grad():
            expected = head_alone(policy, head)(tokens).logits
        torch.testing.assert_close(logits[head - 1], expected, rtol=1e-5, atol=1e-5)
    for one in range(n):
        for other in range(one):
            assert (logits[one] - logits[other]).abs().max() > 0.1  # heads that were mixed up would be seen


def test_head_1_is_the_models_own_forward(policy, tokens):
    with torch.no_grad():
        torch.testing.assert_close(policy(tokens).logits, head_logits(policy, tokens)[0], rtol=1e-5, atol=1e-5)


def test_the_norm_is_shared_and_comes_after_the_head(policy, tokens):
    trunk = policy.trunk(tokens)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        other.model.norm.weight.mul_(3.0)
    torch.testing.assert_close(other.trunk(tokens), trunk, rtol=0, atol=0)
    torch.testing.assert_close(other.head_states(trunk), 3 * policy.head_states(trunk), rtol=1e-5, atol=1e-5)


def test_names_of_parameters(make_policy):
    names = {name for name, _ in make_policy(4).named_parameters()}
    plain = {name for name, _ in LlamaForCausalLM(make_policy(4).config).named_parameters()}
    extra = {
        f"mtp_heads.{head}.{name.removeprefix('model.layers.0.')}"
        for head in range(3)
        for name in plain
        if name.startswith("model.layers.0.")
    }
    assert names == plain | extra
    assert {name for name, _ in make_policy(1).named_parameters()} == plain


def test_no_position_sees_what_follows(policy, tokens):
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 7) % 61
    before, after = head_logits(policy, tokens), head_logits(policy, changed)
    assert torch.equal(before[:, :, :6], after[:, :, :6])
    assert not torch.isclose(before[:, :, 6:], after[:, :, 6:]).all()


@settings(deadline=None, max_examples=25)
@given(
    length=st.integers(1, 12),
    padding=st.lists(st.integers(0, 60), min_size=0, max_size=6),
    seed=st.integers(0, 1000),
)
def test_right_padding_never_changes_real_tokens(policy, length, padding, seed):
    real = torch.randint(0, 61, (1, length), generator=torch.Generator().manual_seed(seed))
    padded = torch.cat([real, torch.tensor([padding], dtype=torch.int64)], dim=1)
    alone = head_logits(policy, real)
    torch.testing.assert_close(head_logits(policy, padded)[:, :, :length], alone, rtol=1e-5, atol=1e-5)
    # Whatever the padding is: not a bit changes.
    other = torch.cat([real, torch.zeros(1, len(padding), dtype=torch.int64)], dim=1)
    assert torch.equal(head_logits(policy, padded)[:, :, :length], head_logits(policy, other)[:, :, :length])


def test_padding_agrees_with_transformers_own_masking(policy, tokens):
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    ids = tokens.masked_fill(mask == 0, 0)
    logits = head_logits(policy, ids)
    for head in range(1, 5):
        with torch.no_grad():
            expected = head_alone(policy, head)(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits[head - 1][mask == 1], expected[mask == 1], rtol=1e-5, atol=1e-5)


def gradients(policy: MTPLlamaForCausalLM, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    logits = policy.lm_head(policy.head_states(policy.trunk(tokens)))
    F.cross_entropy(logits[..., :-1, :].flatten(0, -2), tokens[:, 1:].repeat(len(logits), 1).flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients_with_less_memory(policy, tokens):
    policy = copy.deepcopy(policy).train()
    blocks = [*policy.model.layers, *policy.mtp_heads]
    runs = [0] * len(blocks)

    def count(number: int) -> None:
        runs[number] += 1

    for number, block in enumerate(blocks):
        block.mlp.register_forward_pre_hook(lambda *_, number=number: count(number))
    expected = gradients(policy, tokens)
    assert runs == [1] * 6
    policy.gradient_checkpointing_enable()
    found = gradients(policy, tokens)
    assert runs == [3] * 6, "every block runs once more, and is run again in backward"
    assert found.keys() == expected.keys()
    for name in expected:
        assert expected[name].abs().max() > 0, name
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_gradients_are_those_of_the_heads_alone(make_policy, tokens):
    policy = make_policy(3)
    found = gradients(policy, tokens)
    trunk_name = "model.layers.0.self_attn.q_proj.weight"
    expected = torch.zeros_like(found[trunk_name])
    for head in (1, 2, 3):
        plain = head_alone(policy, head)
        logits = plain(tokens).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).div(3).backward()
        parameters = dict(plain.named_parameters())
        expected += parameters[trunk_name].grad
        own = "model.layers.2." if head == 1 else f"mtp_heads.{head - 2}."
        torch.testing.assert_close(
            found[f"{own}mlp.up_proj.weight"],
            parameters["model.layers.2.mlp.up_proj.weight"].grad,
            rtol=1e-4,
            atol=1e-6,
        )
    torch.testing.assert_close(found[trunk_name], expected, rtol=1e-4, atol=1e-6)


def test_the_unembedding_hands_its_weight_to_a_loss(policy):
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    seen = policy.lm_head(hidden, loss=lambda states, weight: (states is hidden, weight is policy.lm_head.weight))
    assert seen == (True, True)
    torch.testing.assert_close(policy.lm_head(hidden), hidden @ policy.lm_head.weight.T)


def test_generates(policy, tokens):
    prompt = tokens[:1, :4]
    with torch.no_grad():
        made = policy.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    slow = prompt
    for _ in range(4):
        slow = torch.cat([slow, head_logits(policy, slow)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, slow)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_future_tokens": 0}, "n_future_tokens >= 1, not 0"),
        ({"n_future_tokens": -2}, "n_future_tokens >= 1, not -2"),
        ({"n_future_tokens": "4"}, "n_future_tokens >= 1, not '4'"),
        ({"n_future_tokens": True}, "n_future_tokens >= 1, not True"),
        ({"n_future_tokens": None}, "n_future_tokens >= 1, not None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers >= 1, not 0"),
    ],
)
def test_a_config_without_heads_is_refused(make_policy, changes, message):
    with pytest.raises(ValueError, match=message):
        MTPLlamaForCausalLM(LlamaConfig(**{"n_future_tokens": 2, "num_hidden_layers": 2, **changes}))
