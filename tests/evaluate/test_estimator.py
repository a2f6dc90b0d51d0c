"""pass@k against all subsets there are, and intervals against what they promise."""

import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, bootstrap

from wmtp_ds.evaluate.estimator import bootstrap_interval, difference_interval, pass_at_k


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


# --- differences, paired by problem ---


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_differences_of_0_and_1_against_the_binomial_distribution(share: float) -> None:
    """The mean of P resampled differences that are 0 or 1 is binomial: its quantiles are known."""
    problems = 200
    better = (np.arange(problems) < share * problems).astype(float)
    found = difference_interval(np.zeros((1, problems)), better[None])
    expected = binom.ppf([0.025, 0.975], problems, share) / problems
    assert found == pytest.approx(expected, abs=1.01 / problems)


def test_differences_against_scipy() -> None:
    rng = np.random.default_rng(5)
    first = rng.random(80)
    second = np.clip(first + rng.normal(0.1, 0.2, 80), 0, 1)
    theirs = bootstrap(
        (first, second),
        lambda a, b, axis: (b - a).mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert difference_interval(first[None], second[None]) == pytest.approx(tuple(theirs), abs=0.003)


def test_pairs_that_all_differ_alike_are_certain() -> None:
    first = np.random.default_rng(1).random((1, 30))
    assert difference_interval(first, first + 0.25) == pytest.approx((0.25, 0.25))


def test_seeds_are_resampled_too_against_plain_loops() -> None:
    rng, plain = np.random.default_rng(8), random.Random(4)
    first = rng.random((3, 40)) + np.array([[0.0], [0.1], [-0.2]])
    second = rng.random((4, 40)) + 0.2
    means = []
    for _ in range(2000):
        arms = [[plain.choice(list(arm)) for _ in arm] for arm in (first, second)]
        problems = plain.choices(range(40), k=40)
        a, b = (sum(run[p] for run in arm for p in problems) / (40 * len(arm)) for arm in arms)
        means.append(b - a)
    means.sort()
    found = difference_interval(first, second)
    assert found == pytest.approx((means[50], means[-51]), abs=0.02)
    one_seed = difference_interval(first.mean(0)[None], second.mean(0)[None])
    assert found[1] - found[0] > 1.2 * (one_seed[1] - one_seed[0]), "seeds differ, which one mean does not show"


def test_runs_that_are_alike_are_one_run() -> None:
    rng = np.random.default_rng(8)
    first, second = rng.random((1, 50)), rng.random((1, 50))
    several = difference_interval(np.repeat(first, 3, 0), np.repeat(second, 2, 0))
    assert several == pytest.approx(difference_interval(first, second), abs=0.01)


@pytest.mark.parametrize("shapes", [((1, 3), (1, 4)), ((1, 0), (1, 0)), ((0, 3), (1, 3))])
def test_what_is_no_pair(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="are no pairs"):
        difference_interval(np.zeros(shapes[0]), np.zeros(shapes[1]))
