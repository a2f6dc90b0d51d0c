"""z-scores and mean-1 weights are over the global batch, however it is cut over ranks and micro-batches."""

import math
import statistics
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wmtp_ds.weighting.normalize import Standardisation, standardisation


def alone(tensor: Tensor) -> Tensor:
    """The reduction over a world of one rank."""
    return tensor.clone()


def constants(deltas: Sequence[Tensor], decisions: Sequence[Tensor], **kwargs: object) -> Standardisation:
    options = {"beta": 0.9, "zscore": False, "mean1": False, "reduce_sum": alone, "reduce_max": alone}
    return standardisation(deltas, decisions, **(options | kwargs))


def weights_oracle(deltas: list[float], beta: float, low: float, high: float, zscore: bool, mean1: bool) -> list[float]:
    """Of the decisions of the global batch: standardise, exponentiate, rescale to mean 1, clip once."""
    if zscore:
        mean, deviation = statistics.fmean(deltas), statistics.pstdev(deltas)
        deltas = [(d - mean) / deviation if deviation > 1e-12 else 0.0 for d in deltas]
    weights = [math.exp(d / beta) for d in deltas]
    if mean1:
        mean = statistics.fmean(weights)
        weights = [w / mean for w in weights]
    return [min(max(w, low), high) for w in weights]


class Ranks:
    """Threads in place of ranks: each reduction waits for every rank, as a collective does."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.given: list[Tensor] = [torch.zeros(())] * size

    def reduce(self, tensor: Tensor, rank: int, largest: bool) -> Tensor:
        self.given[rank] = tensor
        self.barrier.wait()
        stacked = torch.stack(self.given)
        result = stacked.amax(0) if largest else stacked.sum(0)
        self.barrier.wait()  # nobody may overwrite what another has not read
        return result

    def run(self, parts: list[list[tuple[Tensor, Tensor]]], **kwargs: object) -> list[Standardisation]:
        def one(rank: int) -> Standardisation:
            reducers = {
                "reduce_sum": partial(self.reduce, rank=rank, largest=False),
                "reduce_max": partial(self.reduce, rank=rank, largest=True),
            }
            return constants(*zip(*parts[rank], strict=True), **(kwargs | reducers))

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))


@st.composite
def global_batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """δ and decisions of 8 sequences, at least one decision."""
    length = draw(st.integers(1, 5))
    n = 8 * length
    # Multiples of 1/64: sums of them are exact, so that equal ones deviate by nothing at all.
    deltas = torch.tensor(draw(st.lists(st.integers(-64, 64), min_size=n, max_size=n))).view(8, length) / 64
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n))).view(8, length)
    mask[draw(st.integers(0, 7)), 0] = True
    return deltas.double(), mask


modes = pytest.mark.parametrize(("zscore", "mean1"), [(False, False), (True, False), (False, True), (True, True)])


@modes
@settings(deadline=None, max_examples=40)
@given(global_batches(), st.floats(0.05, 3))
def test_weights_match_the_formula(zscore, mean1, case, beta):
    deltas, mask = case
    found = constants([deltas], [mask], beta=beta, zscore=zscore, mean1=mean1)
    weights = found.weights(deltas, beta, 0.1, 5.0)[mask]
    expected = weights_oracle(deltas[mask].tolist(), beta, 0.1, 5.0, zscore, mean1)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-8)


@modes
@settings(deadline=None, max_examples=15)
@given(case=global_batches(), cut=st.sampled_from([(1, 8), (2, 4), (4, 2), (2, 1), (8, 1)]))
def test_the_cut_does_not_matter(zscore, mean1, case, cut):
    """Ranks × micro-batches of any shape give the same constants on every rank."""
    deltas, mask = case
    ranks, steps = cut
    whole = constants([deltas], [mask], zscore=zscore, mean1=mean1)
    pieces = [
        list(zip(d.tensor_split(steps), m.tensor_split(steps), strict=True))
        for d, m in zip(deltas.tensor_split(ranks), mask.tensor_split(ranks), strict=True)
    ]
    for found in Ranks(ranks).run(pieces, zscore=zscore, mean1=mean1):
        torch.testing.assert_close(torch.stack(found), torch.stack(whole), rtol=1e-9, atol=1e-12)


def test_zscore_by_hand():
    deltas = torch.tensor([[0.0, 0.5, 9.0], [1.0, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = constants([deltas], [mask], zscore=True, beta=1.0)
    deviation = math.sqrt(1 / 6)
    assert [float(x) for x in found] == pytest.approx([0.5, deviation, 0.0])
    expected = [math.exp(-0.5 / deviation), 1.0, math.exp(0.5 / deviation)]
    assert found.weights(deltas, 1.0, 0.0, 100.0)[mask.bool()].tolist() == pytest.approx(expected)


def test_mean1_by_hand_rescales_before_it_clips():
    deltas = torch.tensor([[0.0, math.log(3.0), math.log(8.0)]], dtype=torch.float64)
    found = constants([deltas], [torch.ones(1, 3)], mean1=True, beta=1.0)
    assert float(found.log_mean) == pytest.approx(math.log(4.0))
    assert found.weights(deltas, 1.0, 0.0, 10.0).tolist()[0] == pytest.approx([0.25, 0.75, 2.0])
    # Clipped once, at the end, and not rescaled again.
    assert found.weights(deltas, 1.0, 0.3, 1.5).tolist()[0] == pytest.approx([0.3, 0.75, 1.5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, -0.3, 0.0, 1e-30])
def test_where_all_are_equal_the_zscore_is_zero(dtype, value):
    deltas = torch.full((1, 3), value, dtype=dtype)
    found = constants([deltas], [torch.ones(1, 3)], zscore=True)
    torch.testing.assert_close(found.weights(deltas, 0.9, 0.1, 5.0), torch.ones(1, 3, dtype=dtype))


def test_mean1_does_not_overflow():
    deltas = torch.tensor([[1.0, 0.5, -1.0]], dtype=torch.float64)
    found = constants([deltas], [torch.ones(1, 3)], mean1=True, beta=1e-4)
    weights = found.weights(deltas, 1e-4, 0.1, 5.0)
    assert weights.tolist()[0] == pytest.approx([3.0, 0.1, 0.1])


@modes
def test_a_rank_without_decisions_takes_part(zscore, mean1):
    deltas, mask = torch.tensor([[0.5, -0.25]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    empty = (torch.full((1, 3), math.nan, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.bool))
    whole = constants([deltas], [mask], zscore=zscore, mean1=mean1)
    for found in Ranks(2).run([[(deltas, mask)], [empty]], zscore=zscore, mean1=mean1):
        torch.testing.assert_close(torch.stack(found), torch.stack(whole))


@modes
def test_nothing_to_decide_gives_finite_constants(zscore, mean1):
    deltas = torch.zeros(2, 3)
    found = constants([deltas], [deltas.bool()], zscore=zscore, mean1=mean1)
    assert found.weights(deltas, 0.9, 0.1, 5.0).isfinite().all()


def test_masked_values_never_matter():
    deltas, mask = torch.tensor([[0.5, math.nan, -0.25]]), torch.tensor([[1, 0, 1]])
    clean = constants([deltas[:, ::2]], [torch.ones(1, 2)], zscore=True, mean1=True)
    torch.testing.assert_close(torch.stack(constants([deltas], [mask], zscore=True, mean1=True)), torch.stack(clean))


def test_by_default_the_weights_are_the_plain_ones():
    deltas = torch.tensor([-0.9, 0.0, 0.9])
    assert Standardisation().weights(deltas, 0.9, 0.4, 2.0).tolist() == pytest.approx([0.4, 1.0, 2.0])
    with pytest.raises(ValueError, match="beta must be positive, not -1"):
        Standardisation().weights(deltas, -1.0, 0.1, 5.0)


def test_float32_weights_stay_float32():
    deltas = torch.tensor([[0.5, -0.25]])
    found = constants([deltas], [torch.ones(1, 2)], zscore=True, mean1=True)
    assert found.weights(deltas, 0.9, 0.1, 5.0).dtype == torch.float32


def test_what_is_masked_does_not_hide_small_weights():
    """The exponentials are scaled by the largest of the decisions, not by a masked position's."""
    found = constants([torch.tensor([[0.0, -900.0]])], [torch.tensor([[False, True]])], beta=1.0, mean1=True)
    assert float(found.log_mean) == pytest.approx(-900.0)
