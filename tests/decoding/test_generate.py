"""Plain decoding is transformers' own; self-speculative decoding is plain decoding, in fewer passes."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp_ds.decoding import Sampling, generate
from wmtp_ds.decoding.generate import Limits
from wmtp_ds.decoding.sampling import accept
from wmtp_ds.models.mtp import MTPLlamaForCausalLM

VOCABULARY, END = 37, 1


def policy_of(n: int, seed: int = 0, vocabulary: int = VOCABULARY, scale: float = 1.0) -> MTPLlamaForCausalLM:
    """Random weights in float64, with grouped-query attention; ``scale`` sharpens the distributions."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=END,
        pad_token_id=None,
    )
    config.n_future_tokens = n
    torch.manual_seed(seed)
    policy = MTPLlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        policy.lm_head.weight.mul_(scale)
    return policy


def with_knowing_heads(policy: MTPLlamaForCausalLM) -> MTPLlamaForCausalLM:
    """Extra heads that are copies of head 1: some of their drafts are right."""
    for head in policy.mtp_heads:
        head.load_state_dict(policy.model.layers[-1].state_dict())
    return policy


def prompts_of(count: int, seed: int = 0, longest: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def plain_greedy(policy: MTPLlamaForCausalLM, prompt: Sequence[int], count: int) -> list[int]:
    """transformers' own model and loop, one prompt at a time, without a cache."""
    model = LlamaForCausalLM(policy.config).double().eval()
    model.load_state_dict({name: value for name, value in policy.state_dict().items() if "mtp_heads" not in name})
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == END:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


LIMITS = Limits(20, frozenset([END]))


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_completions_are_those_of_transformers(speculative: bool, batch_size: int) -> None:
    policy, prompts = with_knowing_heads(policy_of(4)), prompts_of(7)
    found = generate(policy, prompts, LIMITS, speculative=speculative, batch_size=batch_size)
    assert [completion.tokens for completion in found] == [plain_greedy(policy, prompt, 20) for prompt in prompts]


@given(seed=st.integers(0, 10**6), n=st.integers(2, 5), knowing=st.booleans(), batch_size=st.sampled_from([1, 2, 5]))
@settings(max_examples=10, deadline=None)
def test_speculation_changes_no_token(seed: int, n: int, knowing: bool, batch_size: int) -> None:
    policy = policy_of(n, seed)
    if knowing:
        with_knowing_heads(policy)
    prompts = prompts_of(5, seed)
    plain = generate(policy, prompts, LIMITS, batch_size=batch_size)
    drafted = generate(policy, prompts, LIMITS, speculative=True, batch_size=batch_size)
    for one, other in zip(plain, drafted, strict=True):
        assert (one.tokens, one.ended) == (other.tokens, other.ended)
        assert other.passes <= one.passes
        # Each pass yields one to n tokens; the first token comes with the prompt, the last may be the end.
        yielded = len(other.tokens) + other.ended - 1
        assert math.ceil(yielded / n) <= other.passes


def test_right_drafts_save_passes() -> None:
    """Heads that know what comes: a policy whose head k repeats the token that head 1 always chooses."""
    policy = policy_of(4)
    with torch.no_grad():
        policy.lm_head.weight.zero_()
        policy.lm_head.weight[5] = policy.model.norm.weight  # no other logit differs from 0
        for block in (policy.model.layers[-1], *policy.mtp_heads):
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        policy.model.embed_tokens.weight.copy_(policy.model.embed_tokens.weight.abs())
        for block in policy.model.layers[:-1]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    limits = Limits(21, frozenset([END]))
    (plain,) = generate(policy, [[3]], limits)
    (drafted,) = generate(policy, [[3]], limits, speculative=True)
    assert plain.tokens == drafted.tokens == [5] * 21
    assert (plain.passes, drafted.passes) == (20, 5)  # four tokens a pass behind the first


def passes_without_a_cache(policy: MTPLlamaForCausalLM, prompt: list[int], limits: Limits) -> int:
    """Blockwise decoding as its papers write it: drafts are what the heads say of all that is accepted."""

    def heads_say(prefix: list[int]) -> list[int]:
        with torch.no_grad():
            states_n1SD = policy.head_states(policy.trunk(torch.tensor([prefix])))
            drafts: list[int] = policy.lm_head(states_n1SD[:, 0, -1]).argmax(-1).tolist()
        return drafts

    first, *drafts = heads_say(prompt)
    written, passes = [first], 0
    while len(written) < limits.max_new_tokens and not limits.end_ids.intersection(written):
        passes += 1
        own, *following = heads_say([*prompt, *written])
        for draft in drafts:
            if draft != own:
                break
            written.append(draft)
            own, *following = heads_say([*prompt, *written])
        written.append(own)
        drafts = following
    return passes


def test_drafts_are_made_from_all_that_is_accepted() -> None:
    policy, prompts = with_knowing_heads(policy_of(4)), prompts_of(30, seed=1)
    found = generate(policy, prompts, LIMITS, speculative=True)
    assert [one.passes for one in found] == [passes_without_a_cache(policy, prompt, LIMITS) for prompt in prompts]
    plain = generate(policy, prompts, LIMITS)
    assert 0.4 < sum(one.passes for one in found) / sum(one.passes for one in plain) < 0.95, "some drafts are accepted"


def test_the_end_token_ends_wherever_it_is_accepted() -> None:
    policy, prompts = with_knowing_heads(policy_of(4)), prompts_of(40, seed=3)
    limits = Limits(30, frozenset(range(0, VOCABULARY, 5)))
    plain = generate(policy, prompts, limits)
    drafted = generate(policy, prompts, limits, speculative=True)
    assert [one.tokens for one in plain] == [one.tokens for one in drafted]
    assert any(completion.ended for completion in plain)
    assert not any(set(completion.tokens) & limits.end_ids for completion in drafted)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("most", [1, 2, 7])
def test_no_more_tokens_than_asked_for(speculative: bool, most: int) -> None:
    policy = with_knowing_heads(policy_of(3))
    found = generate(policy, prompts_of(5), Limits(most, frozenset()), speculative=speculative)
    assert [len(completion.tokens) for completion in found] == [most] * 5
    assert not any(completion.ended for completion in found)


@pytest.mark.parametrize("speculative", [False, True])
def test_whoever_asked_may_say_that_it_is_enough(speculative: bool) -> None:
    policy = with_knowing_heads(policy_of(4))
    limits = Limits(20, frozenset(), is_done=lambda tokens: len(tokens) >= 3)
    found = generate(policy, prompts_of(4), limits, speculative=speculative)
    assert [len(completion.tokens) for completion in found] == [3] * 4


def test_each_completion_is_told_once() -> None:
    told: dict[int, list[int]] = {}

    def on_done(number: int, completion: object) -> None:
        assert number not in told
        told[number] = completion.tokens  # type: ignore[attr-defined]

    found = generate(policy_of(2), prompts_of(9), LIMITS, batch_size=2, on_done=on_done)
    assert [told[number] for number in range(9)] == [completion.tokens for completion in found]


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_sampled_completions_do_not_depend_on_the_batch(speculative: bool, top_p: float) -> None:
    policy, prompts = with_knowing_heads(policy_of(3)), prompts_of(6)
    sampling = Sampling(temperature=0.8, top_p=top_p, seed=5)
    together = generate(policy, prompts, LIMITS, sampling, speculative=speculative)
    for number, prompt in enumerate(prompts):
        (alone,) = generate(policy, [prompt], LIMITS, sampling, streams=[number], speculative=speculative)
        assert alone.tokens == together[number].tokens
    other = generate(policy, prompts, LIMITS, Sampling(0.8, top_p, seed=6), speculative=speculative)
    assert [one.tokens for one in other] != [one.tokens for one in together]


def distribution(policy: MTPLlamaForCausalLM, prompt: list[int], sampling: Sampling, length: int) -> torch.Tensor:
    """The exact probability of each sequence of tokens, flattened: from logits of the whole model, one by one."""
    size = policy.config.vocab_size
    found = torch.ones(1, dtype=torch.float64)
    sequences = [list(prompt)]
    for _ in range(length):
        with torch.no_grad():
            logits = policy(torch.tensor(sequences)).logits[:, -1]
        probabilities = (logits / sampling.temperature).softmax(-1)
        if sampling.top_p < 1:
            for row in probabilities:
                order = row.argsort(descending=True).tolist()
                total = 0.0
                for place in order:
                    if total >= sampling.top_p:
                        row[place] = 0.0
                    else:
                        total += float(row[place])
            probabilities /= probabilities.sum(-1, keepdim=True)
        found = (found[:, None] * probabilities).flatten()
        sequences = [[*sequence, token] for sequence in sequences for token in range(size)]
    return found


@pytest.mark.parametrize("near", [0.0, 0.004, 0.05, 1.0])
def test_what_is_accepted_or_drawn_anew_is_distributed_as_asked(near: float) -> None:
    """Over a grid of random numbers, for drafts of a distribution that differs a little or a lot."""
    p_V, q_V = torch.tensor([0.2, 0.5, 0.3, 0.0]).double(), torch.tensor([0.6, 0.0, 0.1, 0.3]).double()
    q_V = near * q_V + (1 - near) * p_V
    first_u, second_u = ((torch.arange(count).double() + 0.5) / count for count in (1000, 100))
    uniform_Bu = torch.cartesian_prod(first_u, second_u)
    probabilities_BpV = torch.stack([p_V, torch.tensor([0.0, 0.0, 0.0, 1.0]).double()]).expand(len(uniform_Bu), 2, 4)
    found_V = torch.zeros(4, dtype=torch.float64)
    for draft in range(4):
        drafted_Bm = torch.full((len(uniform_Bu), 1), draft)
        accepted_B, next_B = accept(drafted_Bm, q_V.expand(len(uniform_Bu), 1, 4), probabilities_BpV, uniform_Bu)
        assert (next_B[accepted_B == 1] == 3).all(), "one more is drawn from what follows"
        written_B = torch.where(accepted_B == 1, draft, next_B)
        found_V += q_V[draft] * written_B.bincount(minlength=4) / len(written_B)
    torch.testing.assert_close(found_V, p_V, rtol=0, atol=5e-4 + 5e-3 * near)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("knowing", [False, True])
def test_sampling_keeps_the_distribution(speculative: bool, top_p: float, knowing: bool) -> None:
    """Pearson's chi-squared test over all sequences of three tokens; fixed seeds, so no run fails by chance."""
    from scipy.stats import chi2

    policy = policy_of(3, seed=2, vocabulary=5, scale=0.5)
    if knowing:
        with_knowing_heads(policy)
    sampling = Sampling(temperature=0.9, top_p=top_p, seed=1)
    count, prompt = 4000, [3, 2]
    expected = distribution(policy, prompt, sampling, 3) * count
    found = torch.zeros_like(expected)
    limits = Limits(3, frozenset())
    for completion in generate(policy, [prompt] * count, limits, sampling, speculative=speculative, batch_size=2000):
        first, second, third = completion.tokens
        found[first * 25 + second * 5 + third] += 1
    assert found[expected == 0].sum() == 0
    big, small = expected >= 5, (expected < 5) & (expected > 0)
    cells = [*zip(found[big].tolist(), expected[big].tolist(), strict=True)]
    if small.any():
        cells.append((float(found[small].sum()), float(expected[small].sum())))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    assert len(cells) > 20
    assert chi2.sf(statistic, len(cells) - 1) > 1e-3, statistic


def test_no_extra_heads_to_draft_with() -> None:
    with pytest.raises(ValueError, match="the model has none"):
        generate(policy_of(1), [[2]], LIMITS, speculative=True)
    assert generate(policy_of(1), [[2]], LIMITS)


def test_a_prompt_without_tokens() -> None:
    with pytest.raises(ValueError, match="must have a token"):
        generate(policy_of(1), [[2], []], LIMITS)


@pytest.mark.parametrize("keywords", [{"temperature": -1.0}, {"temperature": math.inf}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_ways_of_sampling(keywords: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Sampling(**keywords)
