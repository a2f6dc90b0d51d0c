"""Statistics over decisions: by hand, against Python's statistics module, and cut into pieces."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wmtp_ds.weighting import compute_td_stats, compute_weight_stats
from wmtp_ds.weighting.statistics import describe, entropy_sums, merge_moments, moments


@st.composite
def masked(draw: st.DrawFn, low: float = -100) -> tuple[Tensor, Tensor]:
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    n = batch * length
    x = draw(st.lists(st.floats(low, 100, width=32), min_size=n, max_size=n))
    mask = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return torch.tensor(x).view(batch, length), torch.tensor(mask).view(batch, length)


def kept_rows(x: Tensor, mask: Tensor) -> list[list[float]]:
    return [row[keep].tolist() for row, keep in zip(x, mask, strict=True)]


def entropy_oracle(x: Tensor, mask: Tensor) -> float:
    entropies = []
    for row in kept_rows(x, mask):
        total = math.fsum(row)
        shares = [w / total for w in row if w > 0]
        if row:
            entropies.append(-math.fsum(p * math.log(p) for p in shares))
    return statistics.fmean(entropies) if entropies else 0.0


def test_td_statistics_by_hand():
    deltas = torch.tensor([[0.5, -0.5, 9.0], [0.25, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = {"td_mean": 0.25 / 3, "td_std": math.sqrt((0.5625 - 0.0625 / 3) / 3), "td_min": -0.5, "td_max": 0.5}
    assert compute_td_stats(deltas, mask) == pytest.approx(expected)
    assert all(type(value) is float for value in compute_td_stats(deltas, mask).values())


def test_weight_statistics_by_hand():
    weights = torch.tensor([[1.0, 3.0, 7.0], [2.0, 2.0, 2.0], [5.0, 5.0, 5.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    found = compute_weight_stats(weights, mask)
    first = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert found["weight_entropy"] == pytest.approx((first + math.log(3)) / 2)
    assert found["weight_mean"] == pytest.approx(2.0)
    assert found["weight_std"] == pytest.approx(math.sqrt(2 / 5))
    assert (found["weight_min"], found["weight_max"]) == (1.0, 3.0)
    assert set(found) == {"weight_mean", "weight_std", "weight_min", "weight_max", "weight_entropy"}


def test_without_a_mask_everything_counts():
    assert compute_td_stats(torch.tensor([[1.0, 3.0]])) == {
        "td_mean": 2.0,
        "td_std": 1.0,
        "td_min": 1.0,
        "td_max": 3.0,
    }
    assert compute_weight_stats(torch.ones(2, 8))["weight_entropy"] == pytest.approx(math.log(8))


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_without_decisions_all_are_zero(shape):
    nothing = torch.zeros(shape, dtype=torch.bool)
    assert set(compute_td_stats(torch.full(shape, math.nan), nothing).values()) == {0.0}
    assert set(compute_weight_stats(torch.full(shape, math.nan), nothing).values()) == {0.0}


@settings(deadline=None, max_examples=80)
@given(masked())
def test_moments_match_the_statistics_module(case):
    x, mask = case
    kept = x[mask].tolist()
    found = compute_td_stats(x, mask)
    if not kept:
        assert set(found.values()) == {0.0}
        return
    assert found["td_mean"] == pytest.approx(statistics.fmean(kept), abs=1e-9)
    assert found["td_std"] == pytest.approx(statistics.pstdev(kept), abs=1e-5)
    assert (found["td_min"], found["td_max"]) == (min(kept), max(kept))


@settings(deadline=None, max_examples=80)
@given(masked(low=0))
def test_entropy_matches_the_loop_and_lies_between_its_bounds(case):
    weights, mask = case
    found = compute_weight_stats(weights, mask)["weight_entropy"]
    assert found == pytest.approx(entropy_oracle(weights, mask), abs=1e-9)
    for row, keep in zip(weights, mask, strict=True):
        single = compute_weight_stats(row[None], keep[None])["weight_entropy"]
        assert -1e-12 <= single <= math.log(max(1, int(keep.sum()))) + 1e-12


@settings(deadline=None, max_examples=40)
@given(masked(low=0), st.integers(1, 3), st.sampled_from([math.nan, math.inf, -5.0]))
def test_padding_never_matters(case, extra, rubbish):
    x, mask = case
    dirty = torch.nn.functional.pad(torch.where(mask, x, rubbish), (0, extra), value=rubbish)
    longer = torch.nn.functional.pad(mask, (0, extra))
    assert compute_td_stats(dirty, longer) == pytest.approx(compute_td_stats(x, mask), abs=1e-12)
    assert compute_weight_stats(dirty, longer) == pytest.approx(compute_weight_stats(x, mask), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(masked(), st.integers(0, 4))
def test_moments_of_parts_merge_into_those_of_the_union(case, cut):
    x, mask = case
    merged = merge_moments(moments(x[:cut], mask[:cut]), moments(x[cut:], mask[cut:]))
    torch.testing.assert_close(merged, moments(x, mask), rtol=1e-12, atol=1e-9)
    assert merged[0] == mask.sum()
    sums = entropy_sums(x.abs()[:cut], mask[:cut]) + entropy_sums(x.abs()[cut:], mask[cut:])
    torch.testing.assert_close(sums, entropy_sums(x.abs(), mask), rtol=1e-12, atol=1e-12)


def test_moments_of_nothing_are_neutral():
    some = moments(torch.tensor([1.0, -2.0]))
    assert some.tolist() == [2.0, -1.0, 5.0, 2.0, 1.0]
    for nothing in (moments(torch.zeros(0)), moments(torch.ones(3), torch.zeros(3))):
        assert nothing.tolist() == [0.0, 0.0, 0.0, -math.inf, -math.inf]
        assert torch.equal(merge_moments(some, nothing), some)
        assert describe(nothing, "x") == {"x_mean": 0.0, "x_std": 0.0, "x_min": 0.0, "x_max": 0.0}


def test_small_spread_around_a_large_mean_in_low_precision_inputs():
    x = torch.tensor([3.0, 3.0078125, 3.015625], dtype=torch.bfloat16)
    assert compute_td_stats(x[None])["td_std"] == pytest.approx(statistics.pstdev(x.tolist()), rel=1e-6)


def test_statistics_detach():
    weights = torch.ones(1, 2, requires_grad=True)
    assert not moments(weights).requires_grad
    assert not entropy_sums(weights).requires_grad


def test_weights_that_are_all_zero_have_no_entropy():
    found = compute_weight_stats(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert found["weight_entropy"] == pytest.approx(math.log(2) / 2)
