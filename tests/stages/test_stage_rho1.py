"""Rho-1's selection and loss against sorting in Python and materialised logits."""

import math

import pytest
import torch
from torch import Tensor

from wmtp_ds.data.batches import Batch
from wmtp_ds.stages.base import StageModel

Weights = dict[tuple[int, int, int], float]


def weights_oracle(model: StageModel, batch: Batch, references: Tensor, ce: Tensor, places) -> Weights:
    """Weight of head k's target at position i of sequence b, from ``e = CE_{i,k} − r_{i+k}``."""
    cfg = model.stage.training
    scores: dict[tuple[int, int, int], float] = {}
    for k in range(1, model.n + 1):
        for b, i in places(batch, k):
            loss, r = ce[k - 1, b, i, batch.input_ids[b, i + k]].item(), references[b, i + k].item()
            scores[k, b, i] = {"signed": loss - r, "absolute": abs(loss - r), "reference": r}[cfg.excess]
    if cfg.weighting == "softmax":
        powers = {place: math.exp(score / cfg.temperature) for place, score in scores.items()}
        valid = {place: [q for q in scores if q[1:] == place[1:]] for place in scores}
        return {p: len(valid[p]) * powers[p] / sum(powers[q] for q in valid[p]) for p in scores}
    weights: Weights = {}
    width = 1 if cfg.selection_scope == "batch" else 2
    for group in {place[:width] for place in scores}:
        members = sorted((p for p in scores if p[:width] == group), key=lambda p: (-scores[p], p))
        kept = math.ceil(round(cfg.k_percent * len(members), 9))
        weights |= {p: float(rank < kept) for rank, p in enumerate(members)}
    return weights


@pytest.mark.parametrize("n", [4, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"selection_scope": "sequence", "k_percent": 0.3},
        {"excess": "absolute", "k_percent": 0.7},
        {"excess": "reference"},
        {"weighting": "softmax", "temperature": 2.0},
        {"weighting": "softmax", "excess": "absolute"},
    ],
    ids=str,
)
def test_the_selected_targets_are_learned(
    n, options, make_model, batch, references, run, policy_loss, gradients, assert_same, materialised, places
):
    model = make_model("rho1", n, **options)
    output, grads = run(model, [batch], [references])
    weights = weights_oracle(model, batch, references, materialised(model, batch), places)
    selects = model.stage.training.weighting == "topk"
    expected = policy_loss(model, batch, lambda k, b, i: weights[k, b, i], selects)
    torch.testing.assert_close(output.loss, expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same(grads, gradients(model, expected), rtol=1e-4, atol=1e-6)
    ratio = sum(w > 0 for w in weights.values()) / len(weights)
    assert output.shares["rho1/selected_ratio"].item() == pytest.approx(ratio)
    assert output.moments["weight"][:2].tolist() == pytest.approx([len(weights), sum(weights.values())], rel=1e-5)
    mean = references[batch.supervised].mean().item()
    assert output.shares["rho1/reference_loss"].item() == pytest.approx(mean)


def test_the_number_of_selected_targets_is_known_before_any_loss(make_model, batch, count):
    """Targets of head 1 by sequence: 5, 9, 0, 2; of head 2: 5, 8, 0, 2 (see the baseline's test)."""
    together = count(make_model("rho1", k_percent=0.5), [batch])
    assert together.targets_n.tolist()[:2] == [8, 8]  # ⌈16/2⌉, ⌈15/2⌉
    apart = count(make_model("rho1", k_percent=0.5, selection_scope="sequence"), [batch])
    assert apart.targets_n.tolist()[:2] == [3 + 5 + 1, 3 + 4 + 1]
    soft = count(make_model("rho1", k_percent=0.5, weighting="softmax"), [batch])
    assert soft.targets_n.tolist()[:2] == soft.supervised_n.tolist()[:2] == [16, 15]
    exact = count(make_model("rho1", k_percent=0.55), [batch])
    assert exact.targets_n.tolist()[:2] == [9, 9]  # ⌈8.8⌉, ⌈8.25⌉


def test_the_losses_of_heads_average_to_the_loss(make_model, batch, references, run):
    output, _ = run(make_model("rho1"), [batch], [references])
    heads = [output.shares[f"train/loss_head_{k}"] for k in range(1, 5)]
    torch.testing.assert_close(torch.stack(heads).mean().double(), output.loss.double(), rtol=1e-6, atol=1e-6)


def test_keeping_everything_is_the_baseline(make_model, batch, references, run, assert_same):
    everything, grads = run(make_model("rho1", k_percent=1.0), [batch], [references])
    baseline, expected = run(make_model("baseline"), [batch])
    torch.testing.assert_close(everything.loss, baseline.loss)
    assert_same(grads, expected)


def test_nothing_to_learn(make_model, make_batch, run):
    batch = make_batch([(4, 0)], [1.0])
    for weighting in ("topk", "softmax"):
        output, grads = run(make_model("rho1", weighting=weighting), [batch], [torch.zeros(1, 4)])
        assert output.loss == 0
        assert not any(grad.any() for grad in grads.values())
