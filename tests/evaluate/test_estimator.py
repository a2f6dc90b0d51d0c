"""pass@k against all subsets there are, and intervals against what they promise."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp_ds.evaluate.estimator import bootstrap_interval, pass_at_k


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(drawn: tuple[int, int, int]) -> None:
    n, c, k = drawn
    subsets = list(combinations(range(n), k))
    share = sum(any(sample < c for sample in subset) for subset in subsets) / len(subsets)
    assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k", "expected"), [(200, 1, 100, 0.5), (10_000, 10_000, 1, 1.0), (10, 0, 10, 0.0)])
def test_pass_at_k_of_many_samples(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected)


def test_pass_at_1_is_the_share_of_correct_samples() -> None:
    assert [pass_at_k(200, c, 1) for c in (0, 7, 200)] == pytest.approx([0.0, 0.035, 1.0])


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_pass_at_k_needs_k_samples(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} needs"):
        pass_at_k(n, c, k)


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    """200 experiments of 60 problems, each solved with probability 0.3; fixed seeds."""
    rng = np.random.default_rng(3)
    hits = 0
    for experiment in range(200):
        low, high = bootstrap_interval(rng.random(60) < 0.3, seed=experiment)
        assert low <= high
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 198


def test_an_interval_is_as_wide_as_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=half / 10)


def test_the_same_values_give_the_same_interval() -> None:
    values = [0.0, 1.0, 0.5, 0.25]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval([0.4] * 5) == pytest.approx((0.4, 0.4))


def test_nothing_to_resample() -> None:
    with pytest.raises(ValueError, match="nothing to resample"):
        bootstrap_interval([])
