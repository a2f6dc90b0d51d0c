"""The verifiable stage's weights and losses against loops, and which way gradients flow."""

import math
import statistics
from typing import Any

import pytest
import torch

from wmtp_ds.data.batches import Batch
from wmtp_ds.stages.base import StageModel
from wmtp_kernels import TDWeights, decision_weights

Rows = dict[tuple[int, int], float]


def td_errors(model: StageModel, batch: Batch) -> Rows:
    """δ (or GAE) of each decision, by sequence and position."""
    cfg = model.stage.training
    with torch.no_grad():
        values = model.value_head(model.policy.trunk(batch.input_ids)).squeeze(-1).tolist()
    out: Rows = {}
    for b, d in enumerate(batch.decisions.tolist()):
        carried = 0.0
        chosen = [i for i, yes in enumerate(d) if yes]
        for i in reversed(chosen):
            after = batch.rewards[b].item() if i == chosen[-1] else cfg.gamma * values[b][i + 1]
            carried = after - values[b][i] + cfg.gamma * cfg.td_lambda * carried
            out[b, i] = carried
    return out


def td_weights(model: StageModel, batch: Batch) -> Rows:
    cfg, deltas = model.stage.training, td_errors(model, batch)
    if cfg.td_normalize == "zscore":
        mean, deviation = statistics.fmean(deltas.values()), statistics.pstdev(deltas.values())
        deltas = {place: (delta - mean) / deviation for place, delta in deltas.items()}
    weights = {place: math.exp(delta / cfg.beta) for place, delta in deltas.items()}
    if cfg.weight_norm == "mean1":
        mean = statistics.fmean(weights.values())
        weights = {place: w / mean for place, w in weights.items()}
    return {place: min(max(w, cfg.weight_clip_min), cfg.weight_clip_max) for place, w in weights.items()}


def value_loss(model: StageModel, batch: Batch) -> torch.Tensor:
    """Mean squared error of the values against undiscounted rewards."""
    trunk = model.policy.trunk(batch.input_ids)
    values = model.value_head(trunk if model.stage.training.value_grad_to_trunk else trunk.detach())
    errors = (values.squeeze(-1) - batch.rewards[:, None]) ** 2
    return errors[batch.decisions].mean()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.2, "weight_clip_min": 0.5, "weight_clip_max": 1.5},
        {"td_lambda": 0.9, "gamma": 0.8, "value_coef": 0.0},
        {"td_normalize": "zscore"},
        {"weight_norm": "mean1"},
        {"td_normalize": "zscore", "weight_norm": "mean1", "beta": 0.5},
        {"value_grad_to_trunk": False, "value_coef": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [4, 1])
def test_the_weight_of_a_target_is_that_of_the_decision_that_emits_it(
    n: int, options: dict[str, Any], make_model, batch, run, policy_loss, gradients, assert_same
):
    model = make_model("verifiable", n, **options)
    output, grads = run(model, [batch])
    weights = td_weights(model, batch)
    cfg = model.stage.training
    policy = policy_loss(model, batch, lambda k, b, i: weights[b, i + k - 1])
    if cfg.gamma == 1:
        value = value_loss(model, batch)
        torch.testing.assert_close(output.shares["train/value_loss"], value.detach(), rtol=1e-5, atol=1e-6)
    else:
        value = torch.zeros(())
    expected = policy + cfg.value_coef * value
    torch.testing.assert_close(output.loss.double(), expected.detach().double(), rtol=1e-5, atol=1e-6)
    assert_same(grads, gradients(model, expected), rtol=1e-4, atol=1e-6)
    assert len({round(w, 6) for w in weights.values()}) > 2  # not all alike


@pytest.mark.parametrize("options", [{}, {"td_normalize": "zscore", "weight_norm": "mean1"}], ids=str)
def test_the_control_learns_as_much_from_other_tokens(
    options: dict[str, Any], make_model, batch, run, policy_loss, gradients, assert_same
):
    model = make_model("verifiable", value_coef=0.0, shuffle_weights=True, **options)
    output, grads = run(model, [batch])
    with torch.no_grad():
        dealt_BS = model.stage.look(model, batch, None)["weight"]
    own = td_weights(model, batch)
    moved = 0
    for row, decisions_S in enumerate(batch.decisions):
        places = decisions_S.nonzero().flatten().tolist()
        expected = [own[row, place] for place in places]
        assert sorted(dealt_BS[row, places].tolist()) == pytest.approx(sorted(expected), rel=1e-5)
        moved += dealt_BS[row, places].tolist() != pytest.approx(expected, rel=1e-5)
    assert moved
    policy = policy_loss(model, batch, lambda k, b, i: dealt_BS[b, i + k - 1].item())
    torch.testing.assert_close(output.loss.double(), policy.detach().double(), rtol=1e-5, atol=1e-6)
    assert_same(grads, gradients(model, policy), rtol=1e-4, atol=1e-6)


def test_weights_carry_no_gradient_to_the_value_head(make_model, batch, run):
    _, grads = run(make_model("verifiable", value_coef=0.0), [batch])
    assert not any(grad.any() for name, grad in grads.items() if name.startswith("value_head."))
    assert all(grad.any() for name, grad in grads.items() if not name.startswith("value_head."))


def test_weights_are_detached_float32_and_zero_off_decisions(make_model, batch, run, monkeypatch):
    """Already where they are made, whatever a loss may do about it."""
    model = make_model("verifiable")
    assert not model.stage.weights(model(batch, mode="values"), batch).values_BS.requires_grad
    seen: list[TDWeights] = []
    loss = type(model).weighted_cross_entropy
    monkeypatch.setattr(
        type(model), "weighted_cross_entropy", lambda self, *args: (seen.append(args[2]), loss(self, *args))[1]
    )
    run(model, [batch])
    td_BS, weights_BS = decision_weights(seen[0])
    assert weights_BS.dtype == torch.float32
    assert not weights_BS.requires_grad
    assert not td_BS.requires_grad
    assert torch.equal(weights_BS > 0, batch.decisions)


def test_the_value_loss_reaches_the_trunk_only_if_it_may(make_model, batch, run, gradients):
    runs = {
        (reaches, coefficient): run(
            make_model("verifiable", value_grad_to_trunk=reaches, value_coef=coefficient), [batch]
        )[1]
        for reaches in (True, False)
        for coefficient in (0.0, 0.5)
    }
    trunk = [name for name in runs[True, 0.5] if "layers.0" in name or "layers.1" in name or "embed" in name]
    heads = [n for n in runs[True, 0.5] if n not in trunk and not n.startswith("value_head.")]
    assert trunk
    assert heads
    for name in trunk:
        assert torch.equal(runs[False, 0.5][name], runs[False, 0.0][name])
        assert not torch.equal(runs[True, 0.5][name], runs[True, 0.0][name])
    for name in heads:  # heads 1..n, norm and unembedding never see the value loss
        torch.testing.assert_close(runs[True, 0.5][name], runs[True, 0.0][name])
    for name in (n for n in runs[True, 0.5] if n.startswith("value_head.")):
        torch.testing.assert_close(runs[True, 0.5][name], runs[False, 0.5][name])


def test_what_is_logged(make_model, batch, run):
    model = make_model("verifiable")
    output, _ = run(model, [batch])
    deltas, weights = td_errors(model, batch), td_weights(model, batch)
    for kind, expected in (("td", deltas), ("weight", weights)):
        count, total, _, negative_low, high = output.moments[kind].tolist()
        assert count == 16
        assert total == pytest.approx(sum(expected.values()), abs=1e-5)
        assert (-negative_low, high) == pytest.approx((min(expected.values()), max(expected.values())), abs=1e-6)
    entropies = []
    for b in (0, 1, 3):
        row = [w for place, w in weights.items() if place[0] == b]
        entropies.append(-sum(w / sum(row) * math.log(w / sum(row)) for w in row))
    assert output.shares["weight/entropy"].item() == pytest.approx(statistics.fmean(entropies), abs=1e-5)
    assert output.moments["value"][0] == 16
    assert not any(x.requires_grad for x in (*output.shares.values(), *output.moments.values()))


def test_only_what_is_asked_for_needs_the_window(make_model):
    assert not make_model("verifiable").stage.needs_window
    assert make_model("verifiable", td_normalize="zscore").stage.needs_window
    assert make_model("verifiable", weight_norm="mean1").stage.needs_window
    assert not make_model("baseline").stage.needs_window


def test_nothing_to_learn(make_model, make_batch, run):
    batch = make_batch([(4, 0)], [1.0])
    for options in ({}, {"td_normalize": "zscore", "weight_norm": "mean1"}):
        output, grads = run(make_model("verifiable", **options), [batch])
        assert output.loss == 0
        assert not any(grad.any() for grad in grads.values())
