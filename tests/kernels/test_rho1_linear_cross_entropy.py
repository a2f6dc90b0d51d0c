"""Rho-1's cross-entropy against materialised float64 logits and a selection sorted in Python."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from wmtp_kernels import IGNORE_INDEX, rho1_linear_cross_entropy, rows_torch

N_HEADS, BATCH, LENGTH, DIM, VOCABULARY = 3, 2, 7, 5, 11
Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make_case(seed: int = 0, dtype: torch.dtype = torch.float64) -> Case:
    """Hidden states, unembedding, targets (a fifth ignored), reference losses, scales of heads."""
    generator = torch.Generator().manual_seed(seed)
    shape = N_HEADS, BATCH, LENGTH
    hidden = torch.randn(*shape, DIM, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, DIM, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < 0.2] = IGNORE_INDEX
    reference = 4 * torch.rand(shape, generator=generator)
    scales = torch.rand(N_HEADS, generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets, reference, scales


SCORES: dict[str, Callable[[float, float], float]] = {
    "signed": lambda ce, r: ce - r,
    "absolute": lambda ce, r: abs(ce - r),
    "reference": lambda ce, r: r,
}


def weights_oracle(ce: Tensor, reference: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
    score = SCORES[options["excess"]]
    places = [p for p in itertools.product(*map(range, targets.shape)) if targets[p] != IGNORE_INDEX]
    scores = {p: score(ce[p].item(), reference[p].item()) for p in places}
    weights = torch.zeros(targets.shape, dtype=torch.float64)
    if options["weighting"] == "softmax":
        for p in places:
            valid = [q for q in places if q[1:] == p[1:]]
            powers = {q: math.exp(scores[q] / options["temperature"]) for q in valid}
            weights[p] = len(valid) * powers[p] / sum(powers.values())
        return weights
    width = 1 if options["scope"] == "batch" else 2
    for group in {p[:width] for p in places}:
        members = sorted((p for p in places if p[:width] == group), key=lambda p: (-scores[p], p))
        for p in members[: math.ceil(options["k_percent"] * len(members))]:
            weights[p] = 1.0
    return weights


def oracle(case: Case, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, cross-entropy, weights, gradients of hidden states and unembedding."""
    hidden, weight, targets, reference, scales = (x.double() if x.is_floating_point() else x for x in case)
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = hidden @ weight.T
    supervised = targets != IGNORE_INDEX
    at_target = logits.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    ce = torch.where(supervised, logits.logsumexp(-1) - at_target, 0.0)
    weights = weights_oracle(ce.detach(), reference, targets, options)
    loss = (scales[:, None, None] * weights * ce).sum()
    return loss.detach(), ce.detach(), weights, *torch.autograd.grad(loss, (hidden, weight))


def measured(case: Case, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, targets, reference, scales = case
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, ce, weights = rho1_linear_cross_entropy(hidden, weight, targets, reference, scales_n=scales, **options)
    assert not ce.requires_grad
    assert not weights.requires_grad
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), ce, weights, hidden.grad, weight.grad


@pytest.mark.parametrize("excess", ["signed", "absolute", "reference"])
@pytest.mark.parametrize(("weighting", "scope"), [("topk", "batch"), ("topk", "sequence"), ("softmax", "batch")])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_matches_materialised_logits(excess, weighting, scope, chunk, monkeypatch):
    monkeypatch.setattr(rows_torch, "chunk_rows", lambda *_: chunk)
    options = {"excess": excess, "weighting": weighting, "scope": scope, "k_percent": 0.5, "temperature": 0.7}
    for seed in range(3):
        case = make_case(seed)
        # Weights of heads are float32, and so are those of softmax.
        tolerance = 1e-10 if weighting == "topk" else 1e-6
        for found, expected in zip(measured(case, options), oracle(case, options), strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["topk", "softmax"])
def test_lower_precision_is_close_where_the_selection_is_the_same(dtype, weighting):
    case = make_case(1, dtype)
    # Scores by reference losses do not depend on the precision of the policy.
    options = {"excess": "reference", "weighting": weighting, "scope": "batch", "k_percent": 0.6, "temperature": 1.0}
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for found, expected in zip(measured(case, options), oracle(case, options), strict=True):
        assert ((found.double() - expected).norm() / expected.norm()) < tolerance


def test_with_everything_selected_it_is_plain_cross_entropy():
    case = make_case()
    options = {"excess": "signed", "weighting": "topk", "scope": "batch", "k_percent": 1.0}
    _, _, weights, *_ = measured(case, options)
    assert torch.equal(weights, (case[2] != IGNORE_INDEX).float())


def test_the_defaults_are_the_papers():
    """Signed excess, top-k over the batch; by default everything is kept and every scale is 1."""
    hidden, weight, targets, reference, _ = make_case()
    loss, ce, weights = rho1_linear_cross_entropy(hidden, weight, targets, reference)
    torch.testing.assert_close(loss, ce.sum())
    assert weights.sum() == (targets != IGNORE_INDEX).sum()
    half, ce, weights = rho1_linear_cross_entropy(hidden, weight, targets, reference, k_percent=0.5)
    for head in range(N_HEADS):
        kept, dropped = weights[head] == 1, (weights[head] == 0) & (targets[head] != IGNORE_INDEX)
        excess = ce[head] - reference[head]
        assert excess[kept].min() >= excess[dropped].max()
    torch.testing.assert_close(half, (weights * ce).sum())


def test_rows_that_are_not_selected_get_no_gradient():
    case = make_case()
    options = {"excess": "signed", "weighting": "topk", "scope": "sequence", "k_percent": 0.3}
    _, _, weights, grad_hidden, _ = measured(case, options)
    assert not grad_hidden[weights == 0].any()
    assert grad_hidden[weights == 1].any(-1).all()


def test_masked_rubbish_never_matters():
    options = {"excess": "signed", "weighting": "softmax", "scope": "batch", "temperature": 0.5}
    case = make_case()
    hidden, weight, targets, reference, scales = (x.clone() for x in case)
    ignored = targets == IGNORE_INDEX
    hidden[ignored], reference[ignored] = math.nan, math.nan
    for weighting in ("softmax", "topk"):
        options["weighting"] = weighting
        expected = measured(case, options)
        for found, clean in zip(measured((hidden, weight, targets, reference, scales), options), expected, strict=True):
            torch.testing.assert_close(found, clean)


def test_nothing_to_learn():
    hidden, weight, targets, reference, scales = make_case()
    for weighting in ("topk", "softmax"):
        options = {"excess": "signed", "weighting": weighting, "scope": "batch", "k_percent": 0.5}
        found = measured((hidden, weight, torch.full_like(targets, -100), reference, scales), options)
        assert not any(x.any() for x in found)


def test_a_head_of_its_own():
    """One head behaves as it would among others: each selects among its own targets."""
    hidden, weight, targets, reference, scales = make_case()
    options = {"excess": "signed", "weighting": "topk", "scope": "batch", "k_percent": 0.4}
    *_, all_weights, _, _ = measured((hidden, weight, targets, reference, scales), options)
    for k in range(N_HEADS):
        one = slice(k, k + 1)
        *_, weights, _, _ = measured((hidden[one], weight, targets[one], reference[one], scales[one]), options)
        assert torch.equal(weights, all_weights[one])


def test_wrong_arguments_are_refused():
    hidden, weight, targets, reference, _ = make_case()
    with pytest.raises(ValueError, match=r"targets \[3, 2, 6\]"):
        rho1_linear_cross_entropy(hidden, weight, targets[..., 1:], reference)
    with pytest.raises(ValueError, match=r"reference \[2, 7\]"):
        rho1_linear_cross_entropy(hidden, weight, targets, reference[0])
    with pytest.raises(ValueError, match="'threshold'"):
        rho1_linear_cross_entropy(hidden, weight, targets, reference, weighting="threshold")
    with pytest.raises(ValueError, match="'ratio'"):
        rho1_linear_cross_entropy(hidden, weight, targets, reference, excess="ratio")
    with pytest.raises(ValueError, match="'token'"):
        rho1_linear_cross_entropy(hidden, weight, targets, reference, scope="token")
    with pytest.raises(RuntimeError, match="no elements"):
        rho1_linear_cross_entropy(hidden, torch.zeros(0), targets, reference)
