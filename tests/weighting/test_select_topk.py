"""Rho-1's scores and weights against sorting in Python and exact fractions."""

import math
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wmtp_ds.weighting import select_topk
from wmtp_ds.weighting.rho1 import excess_loss, softmax_weights
from wmtp_kernels.rho1 import kept_count, kept_counts

shares = st.one_of(
    st.floats(1e-6, 1.0),
    st.integers(1, 1000).map(lambda x: x / 1000),
    st.integers(1, 10**9).map(lambda x: x / 10**9),
)
# Few different scores, so that ties abound.
scores = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 3.0])


def ceiling(share: float, count: int) -> int:
    return math.ceil(Fraction(Decimal(str(share))) * count)


def choose(values: list[float], share: float) -> set[int]:
    """Indices of the highest ``⌈share·len⌉``; among equals the lower index."""
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return set(ranked[: ceiling(share, len(values))])


def topk_oracle(excess: Tensor, mask: Tensor, share: float, scope: str) -> Tensor:
    """Per head of ``[B, S, n]``: collect the group's targets in order, choose among them."""
    out = torch.zeros(excess.shape)
    batch, length, n = excess.shape
    for head in range(n):
        places = [(b, i) for b in range(batch) for i in range(length) if mask[b, i, head]]
        groups = [places] if scope == "batch" else [[p for p in places if p[0] == b] for b in range(batch)]
        for group in groups:
            for chosen in choose([excess[b, i, head].item() for b, i in group], share):
                out[(*group[chosen], head)] = 1.0
    return out


@st.composite
def scored(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    size = math.prod(shape)
    excess = draw(st.lists(scores, min_size=size, max_size=size))
    mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return torch.tensor(excess).view(shape), torch.tensor(mask).view(shape)


@pytest.mark.parametrize(
    ("share", "count", "kept"),
    [
        (0.55, 100, 55),
        (0.07, 100, 7),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.6, 10, 6),
        (0.1, 10, 1),
        (0.6, 11, 7),
        (1.0, 7, 7),
        (1e-9, 1, 1),
        (0.5, 0, 0),
        (0.3333333333333333, 3, 1),
        (0.33333333333333337, 3, 2),
        (1e-300, 10**9, 1),
        (0.123456789, 10**9, 123456789),
    ],
)
def test_counts_by_hand(share, count, kept):
    assert kept_count(count, share) == kept
    assert kept_counts(torch.tensor([count, 0]), share).tolist() == [kept, 0]


@settings(deadline=None, max_examples=200)
@given(shares, st.integers(0, 2**31 - 1))
def test_counts_are_exact_decimal_arithmetic(share, count):
    assert kept_count(count, share) == ceiling(share, count)
    assert kept_counts(torch.tensor([[count]]), share).tolist() == [[ceiling(share, count)]]


@settings(deadline=None, max_examples=100)
@given(scored(), shares, st.sampled_from(["batch", "sequence"]))
def test_selection_matches_sorting(case, share, scope):
    excess, mask = case
    found = select_topk(excess, mask, share, scope)
    assert torch.equal(found, topk_oracle(excess, mask, share, scope))
    assert found.dtype == torch.float32
    # A single head may come without its dimension.
    single = select_topk(excess[..., 0], mask[..., 0], share, scope)
    assert torch.equal(single, found[..., 0])


@settings(deadline=None, max_examples=50)
@given(scored(), shares, st.sampled_from(["batch", "sequence"]), st.integers(1, 3))
def test_padding_never_matters(case, share, scope, extra):
    excess, mask = case
    expected = select_topk(excess, mask, share, scope)
    for rubbish in (math.nan, math.inf, -math.inf, 1e30):
        pad = (0, 0, 0, extra)
        longer = torch.nn.functional.pad(torch.where(mask, excess, rubbish), pad, value=rubbish)
        found = select_topk(longer, torch.nn.functional.pad(mask, pad), share, scope)
        assert torch.equal(found[:, : excess.shape[1]], expected)
        assert (found[:, excess.shape[1] :] == 0).all()


def test_selection_by_hand():
    excess = torch.tensor([[5.0, 1.0, 3.0, 3.0], [9.0, 3.0, 2.0, 4.0]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    # Of 7 the ⌈0.5·7⌉ = 4 highest: 5, 4, and of the three 3s the first two.
    assert select_topk(excess, mask, 0.5).tolist() == [[1, 0, 1, 1], [0, 0, 0, 1]]
    # Each sequence its own: 2 of 4, 2 of 3.
    assert select_topk(excess, mask, 0.5, "sequence").tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]


def test_exactly_55_of_100_equal_scores_the_first_ones():
    found = select_topk(torch.zeros(4, 25), torch.ones(4, 25), 0.55)
    assert found.flatten().tolist() == [1.0] * 55 + [0.0] * 45


def test_real_scores_rank_above_masked_ones_even_if_infinite():
    excess = torch.tensor([[-math.inf, 7.0, -math.inf, math.inf]])
    mask = torch.tensor([[1, 0, 1, 1]])
    assert select_topk(excess, mask, 1.0).tolist() == [[1, 0, 1, 1]]
    assert select_topk(excess, mask, 0.5).tolist() == [[1, 0, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    excess = torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype, requires_grad=True)
    found = select_topk(excess, torch.ones(1, 3), 0.4)
    assert found.tolist() == [[0, 1, 1]]
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_nothing_supervised_selects_nothing():
    assert select_topk(torch.full((2, 3, 4), math.nan), torch.zeros(2, 3, 4), 0.6).sum() == 0
    assert select_topk(torch.zeros(2, 0), torch.zeros(2, 0), 0.6).shape == (2, 0)


def test_wrong_arguments_are_refused():
    x = torch.zeros(2, 3)
    for share in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"k_percent must lie in \(0, 1\]"):
            select_topk(x, x, share)
    with pytest.raises(ValueError, match="not 'token'"):
        select_topk(x, x, 0.5, "token")
    with pytest.raises(ValueError, match=r"not \[2, 3\], \[2, 4\]"):
        select_topk(x, torch.zeros(2, 4), 0.5)
    with pytest.raises(ValueError, match=r"\[B, S\] or \[B, S, n\]"):
        select_topk(torch.zeros(3), torch.zeros(3), 0.5)


def test_excess_modes():
    ce, reference = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 1.5])
    assert excess_loss(ce, reference).tolist() == [-2.0, 2.5]
    assert excess_loss(ce, reference, "signed").tolist() == [-2.0, 2.5]
    assert excess_loss(ce, reference, "absolute").tolist() == [2.0, 2.5]
    assert excess_loss(ce, reference, "reference").tolist() == [3.0, 1.5]
    with pytest.raises(ValueError, match="'ratio'"):
        excess_loss(ce, reference, "ratio")


@settings(deadline=None, max_examples=80)
@given(scored(), st.floats(0.01, 50))
def test_soft_weights_match_the_formula(case, temperature):
    excess, mask = (x.permute(2, 0, 1) for x in case)
    found = softmax_weights(excess, mask, temperature)
    n, batch, length = excess.shape
    for b in range(batch):
        for i in range(length):
            valid = [k for k in range(n) if mask[k, b, i]]
            top = max((excess[k, b, i].item() for k in valid), default=0.0)
            powers = {k: math.exp((excess[k, b, i].item() - top) / temperature) for k in valid}
            for k in range(n):
                expected = len(valid) * powers[k] / sum(powers.values()) if k in valid else 0.0
                assert found[k, b, i].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(found.sum(0), mask.sum(0).float())


def test_soft_weights_of_masked_rubbish_and_small_temperatures():
    excess = torch.tensor([10.0, 11.0, math.nan, math.inf]).view(4, 1, 1)
    mask = torch.tensor([1, 1, 0, 0]).view(4, 1, 1)
    assert softmax_weights(excess, mask, 1e-38).flatten().tolist() == [0.0, 2.0, 0.0, 0.0]
    assert softmax_weights(excess, mask, 1e30).flatten().tolist() == [1.0, 1.0, 0.0, 0.0]
    assert softmax_weights(excess, torch.zeros(4, 1, 1), 1.0).flatten().tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="temperature must be positive, not 0"):
        softmax_weights(excess, mask, 0.0)


def test_soft_weights_are_detached():
    assert not softmax_weights(torch.zeros(2, 1, 1, requires_grad=True), torch.ones(2, 1, 1)).requires_grad
