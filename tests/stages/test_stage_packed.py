"""Several solutions in one row: losses, gradients, statistics and validation as if each had a row of its own."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from wmtp_ds.data.batch import Batch, PackedBatch
from wmtp_ds.evaluation import _final_values
from wmtp_ds.models.reference import ReferenceModel

STAGES = [
    ("baseline", {}),
    ("critic", {}),
    ("critic", {"gamma": 0.9}),
    ("critic", {"value_target": "gae", "loss_type": "huber", "gamma": 0.97}),
    ("verifiable", {}),
    ("verifiable", {"td_lambda": 0.9, "gamma": 0.95, "value_target": "gae"}),
    ("verifiable", {"td_normalize": "zscore", "beta": 0.5}),
    ("verifiable", {"td_normalize": "zscore", "weight_norm": "mean1", "td_lambda": 0.5}),
    ("verifiable", {"value_grad_to_trunk": False}),
    ("rho1", {"selection_scope": "sequence"}),
    ("rho1", {"selection_scope": "sequence", "excess": "absolute", "k_percent": 0.55}),
    ("rho1", {"weighting": "softmax"}),
]
# Which of the six sequences share a row, micro-batch by micro-batch.
CUTS = [
    [[[0, 1, 2, 3, 4, 5]]],
    [[[2, 4, 0], [5, 1, 3]]],
    [[[3], [1, 0]], [[5, 2, 4]]],
    [[[0, 5]], [[1, 4]], [[2], [3]]],
]
LENGTHS = [(3, 5), (1, 9), (4, 0), (2, 2), (5, 1), (2, 7)]  # of prompts and solutions
REWARDS = [1.0, 0.0, 1.0, 0.25, 0.75, 0.0]


@pytest.fixture
def batch(make_batch) -> Batch:
    return make_batch(LENGTHS, REWARDS)


@pytest.fixture
def references(batch) -> Tensor:
    return 8 * torch.rand(batch.input_ids.shape, generator=torch.Generator().manual_seed(2)) * batch.supervised


def tokens_of(batch: Batch, sequence: int) -> int:
    return int((batch.segment_ids[sequence] > 0).sum())


def in_rows(x_BS: Tensor, batch: Batch, rows: Sequence[Sequence[int]]) -> Tensor:
    """A quantity of each token, where `packed` puts the tokens."""
    lines = [torch.cat([x_BS[s, : tokens_of(batch, s)] for s in row]) for row in rows]
    width = max(map(len, lines)) + 2
    return torch.stack([torch.nn.functional.pad(line, (0, width - len(line))) for line in lines])


@pytest.mark.parametrize(("stage", "options"), STAGES, ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_losses_gradients_and_shares_are_those_of_unpacked_rows(
    stage, options, cut, make_model, batch, references, run, assert_same, packed
):
    model = make_model(stage, dtype=torch.float32, **options)
    expected, gradients = run(model, [batch], [references])
    window = [packed(batch, rows) for rows in cut]
    found, packed_gradients = run(model, window, [in_rows(references, batch, rows) for rows in cut])
    assert expected.loss > 0.01
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert_same(packed_gradients, gradients, rtol=1e-4, atol=1e-6)
    assert_same(found.shares, expected.shares, rtol=1e-5, atol=1e-6)
    if len(cut) == 1:
        assert_same(found.moments, expected.moments, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_exactly_so_in_float64(attention, make_model, batch, run, assert_same, packed):
    model = make_model("verifiable", td_lambda=0.9, weight_norm="mean1")
    model.policy.config._attn_implementation = attention
    expected, gradients = run(model, [batch])
    found, packed_gradients = run(model, [packed(batch, [[2, 4, 0], [5, 1, 3]])])
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-7, atol=1e-7)  # values are float32
    assert_same(packed_gradients, gradients, rtol=1e-5, atol=1e-7)


def test_rho1_by_batch_selects_among_the_same_targets_however_they_lie(
    make_model, batch, references, run, assert_same, packed
):
    model = make_model("rho1", selection_scope="batch")
    expected, gradients = run(model, [batch], [references])
    rows = [[2, 4, 0], [5, 1, 3]]
    found, packed_gradients = run(model, [packed(batch, rows)], [in_rows(references, batch, rows)])
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert_same(packed_gradients, gradients, rtol=1e-4, atol=1e-6)
    assert_same(found.shares, expected.shares, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_totals_count_sequences(scope, make_model, batch, packed):
    stage = make_model("rho1", selection_scope=scope, k_percent=0.3).stage
    whole, cut = stage.counts(batch, 4), stage.counts(packed(batch, [[2, 4, 0], [5, 1, 3]]), 4)
    for name in ("targets_n", "supervised_n", "decisions", "tokens", "sequences"):
        assert torch.equal(getattr(cut, name), getattr(whole, name)), name
    assert int(whole.sequences) == 5
    assert (int(whole.places), int(cut.places)) == (60, 2 * (9 + 10 + 4 + 2))


def test_no_token_sees_another_solution(make_model, batch, packed):
    """The trunk's and heads' outputs are those of the solution alone, whatever stands beside it."""
    model = make_model("baseline")
    rows = [[2, 4, 0], [5, 1, 3]]
    both = packed(batch, rows)
    with torch.no_grad():
        alone = model.head_states(model.trunk(batch), batch)
        together = model.head_states(model.trunk(both), both)
    for g, s in enumerate([s for row in rows for s in row]):
        places = both.places[g][both.places[g] >= 0]
        expected = alone[:, s, : tokens_of(batch, s)]  # rotary angles are float32
        torch.testing.assert_close(together.flatten(1, 2)[:, places], expected, rtol=1e-4, atol=1e-6)
    changed = replace(both, input_ids=torch.where(both.members == 1, 63 - both.input_ids, both.input_ids))
    with torch.no_grad():
        other = model.head_states(model.trunk(changed), changed)
    same = (both.members != 1) | (both.segment_ids == 0)
    assert torch.equal(other[:, same], together[:, same])
    assert not torch.allclose(other[:, ~same], together[:, ~same])


def test_the_reference_scores_each_solution_alone(make_model, batch, packed):
    reference = ReferenceModel(make_model("baseline", n=1).policy)
    rows = [[2, 4, 0], [5, 1, 3]]
    with torch.no_grad():
        alone, together = reference(batch), reference(packed(batch, rows))
    torch.testing.assert_close(together, in_rows(alone, batch, rows), rtol=1e-4, atol=1e-5)
    assert (alone > 0).any()


def test_validation_counts_each_solution(make_model, batch, packed):
    model = make_model("verifiable")
    both = packed(batch, [[2, 4, 0], [5, 1, 3]])
    with torch.no_grad():
        expected, found = model(batch, mode="evaluate"), model(both, mode="evaluate")
    values, packed_values = expected.pop("values_BS"), found.pop("values_BS")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
    scored = _final_values(values, batch)
    assert len(scored) == 5  # one has nothing to learn, and so no decision
    # The last token but one emits the last, and is the last decision.
    last = [values[s, tokens_of(batch, s) - 2].item() for s in (0, 1, 3, 4, 5)]
    assert scored.tolist() == [pytest.approx(pair) for pair in zip(last, [1.0, 0.0, 0.0, 1.0, 0.0], strict=True)]
    order = [4, 0, 5, 1, 3]
    expected_order = scored[[[0, 1, 3, 4, 5].index(s) for s in order]]
    torch.testing.assert_close(_final_values(packed_values, both), expected_order, rtol=1e-5, atol=1e-6)


def test_validation_is_of_correct_solutions_whatever_their_rewards(make_model, batch, packed):
    model = make_model("verifiable")
    others = replace(batch, rewards=1 - batch.rewards)
    for one, other in (
        (batch, others),
        (packed(batch, [[2, 4, 0], [5, 1, 3]]), packed(others, [[2, 4, 0], [5, 1, 3]])),
    ):
        with torch.no_grad():
            found, again = model(one, mode="evaluate"), model(other, mode="evaluate")
        assert torch.equal(found["ce_n"], again["ce_n"])
        assert torch.equal(_final_values(found["values_BS"], one), _final_values(again["values_BS"], other))
        assert found["value_loss"] != again["value_loss"]
        assert found["targets_n"][0] == batch.supervised[batch.correct].sum()


def test_there_and_back(batch, packed):
    both = packed(batch, [[2, 4, 0], [5, 1, 3]])
    x = torch.rand(both.input_ids.shape, requires_grad=True)
    apart = both.by_sequence(x)
    assert apart.shape == (6, 10)
    assert [int((row != 0).sum()) for row in apart] == [tokens_of(batch, s) for s in (2, 4, 0, 5, 1, 3)]
    torch.testing.assert_close(both.by_row(apart), x * (both.segment_ids > 0))
    apart.sum().backward()
    assert torch.equal(x.grad, (both.segment_ids > 0).float())
    rewards = both.by_row(both.rewards[:, None])
    assert sorted(set(rewards[both.segment_ids > 0].tolist())) == sorted(set(REWARDS))
    assert batch.by_sequence(x) is x is batch.by_row(x)


def test_it_stays_packed_on_another_device(batch, packed):
    both = packed(batch, [[2, 4, 0], [5, 1, 3]])
    moved = both.to("cpu")
    assert type(moved) is PackedBatch
    assert moved.host is both
    assert torch.equal(moved.places, both.places)


def test_an_attention_without_masks_is_refused(make_model, batch, packed):
    model = make_model("baseline")
    model.policy.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="takes a mask"):
        model.trunk(packed(batch, [[0, 1]]))
