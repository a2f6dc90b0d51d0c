"""The curriculum: phases, bins, exact counts."""

from collections import Counter
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_ds.data.curriculum import cut_phases
from wmtp_ds.data.groups import exact, round_to_total
from wmtp_ds.data.pool import bin_of_each
from wmtp_ds.data.sampling import epoch_size, sample_plan
from wmtp_ds.errors import UserError

BINS = {"low": (1, 3), "medium": (4, 7), "high": (8, 11)}
PRODUCTION = (
    ((0.0, 0.3), {"low": 0.7, "medium": 0.3, "high": 0.0}),
    ((0.3, 0.7), {"low": 0.3, "medium": 0.6, "high": 0.1}),
    ((0.7, 1.0), {"low": 0.1, "medium": 0.5, "high": 0.4}),
)


def schedule(*phases: Any) -> tuple[Any, ...]:
    return tuple(SimpleNamespace(epoch_range=r, difficulty_weights=w) for r, w in phases)


def sampling(*phases: Any, **changes: Any) -> Any:
    table = {
        "n_samples": None,
        "correct_ratio": 0.5,
        "balance_correct": True,
        "difficulty_range": None,
        "seed": 42,
        "curriculum_learning": True,
        "difficulty_bins": BINS,
        "curriculum_schedule": schedule(*(phases or PRODUCTION)),
    }
    return SimpleNamespace(**table | changes)


def data(correct: dict[int, int], incorrect: dict[int, int]) -> Any:
    """So many correct and incorrect rows of each difficulty."""
    rows = [(True, d) for d, n in correct.items() for _ in range(n)]
    rows += [(False, d) for d, n in incorrect.items() for _ in range(n)]
    return SimpleNamespace(
        path=Path("train.jsonl"),
        is_correct=np.array([c for c, _ in rows], np.bool_),
        difficulty=np.array([d for _, d in rows], np.int32),
    )


EVEN = data(dict.fromkeys(range(12), 20), dict.fromkeys(range(12), 20))


def bin_counts(index: Any, rows: np.ndarray) -> dict[str, int]:
    of_row = bin_of_each(index.difficulty[rows], BINS)
    return {name: int((of_row == b).sum()) for b, name in enumerate(BINS)}


def test_production_schedule():
    plan = sample_plan(EVEN, sampling(), total_steps=100, global_batch=10)
    assert plan.phases == ((0, 300), (300, 700), (700, 1000))
    assert [bin_counts(EVEN, plan.draws[slice(*span)]) for span in plan.phases] == [
        {"low": 210, "medium": 90, "high": 0},
        {"low": 120, "medium": 240, "high": 40},
        {"low": 30, "medium": 150, "high": 120},
    ]
    for span in plan.phases:
        part = plan.draws[slice(*span)]
        for low, high in BINS.values():
            inside = part[(EVEN.difficulty[part] >= low) & (EVEN.difficulty[part] <= high)]
            assert EVEN.is_correct[inside].sum() * 2 == len(inside)
    assert [plan.phase(step) for step in (0, 29, 30, 69, 70, 99)] == [0, 0, 1, 1, 2, 2]
    assert [phase["draws"] for phase in plan.summary()["phases"]] == [300, 400, 300]
    assert 8 not in plan.summary()["phases"][0]["difficulty"]


def test_unknown_difficulties_lie_in_no_bin():
    plan = sample_plan(EVEN, sampling(), total_steps=100, global_batch=10)
    assert (EVEN.difficulty[plan.draws] > 0).all()
    assert "40 rows lie in none of data_sampling.difficulty_bins (40 of unknown difficulty)" in plan.warnings[0]
    assert plan.epoch_rows == epoch_size(EVEN, sampling()) == 440


def test_phases_may_be_listed_in_any_order():
    plan = sample_plan(EVEN, sampling(*reversed(PRODUCTION)), total_steps=100, global_batch=10)
    assert plan.phases == ((700, 1000), (300, 700), (0, 300))
    assert plan.phase(0) == 2
    assert bin_counts(EVEN, plan.draws[:300]) == {"low": 210, "medium": 90, "high": 0}


@pytest.mark.parametrize(
    ("ranges", "spans"),
    [
        ([(0, 0.5), (0.4, 1)], [(0, 50), (50, 100)]),
        ([(0.4, 1), (0, 0.5)], [(50, 100), (0, 50)]),
        ([(0, 1), (0.2, 0.3)], [(0, 100), (100, 100)]),
        ([(0, 0.6), (0.2, 0.5), (0.5, 1)], [(0, 60), (60, 60), (60, 100)]),
        ([(0, 0.5), (0, 0.2), (0.5, 1)], [(20, 50), (0, 20), (50, 100)]),
        ([(0, 0.005), (0.005, 1)], [(0, 1), (1, 100)]),
        ([(0, 0.4949999), (0.495, 0.9999999)], [(0, 49), (49, 100)]),
        ([(0.0, 0.15), (0.15, 0.29), (0.29, 1.0)], [(0, 15), (15, 29), (29, 100)]),
    ],
)
def test_overlapping_phases_go_to_the_earlier(ranges, spans):
    assert cut_phases(schedule(*((r, {}) for r in ranges)), 100) == spans


@pytest.mark.parametrize(
    ("ranges", "start"), [([(0, 0.4), (0.5, 1)], "0.4"), ([(0.1, 1)], "0"), ([(0, 0.9)], "0.9"), ([], "0")]
)
def test_a_gap_is_an_error(ranges, start):
    with pytest.raises(UserError, match=rf"curriculum_schedule: no phase covers the run from {start} on"):
        cut_phases(schedule(*((r, {}) for r in ranges)), 100)


def test_a_phase_without_draws_is_a_warning():
    plan = sample_plan(EVEN, sampling(), total_steps=1, global_batch=1)
    assert plan.phases == ((0, 0), (0, 1), (1, 1))
    assert plan.phase(0) == 1
    assert any("curriculum_schedule[0] has no draws" in warning for warning in plan.warnings)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), st.integers(0, 500))
def test_largest_remainder(weights, total):
    shares = [exact(weight) / sum(weights) * total for weight in weights]
    rounded = round_to_total(shares, total)
    assert sum(rounded) == total
    assert all(abs(n - share) < 1 for n, share in zip(rounded, shares, strict=True))
    # No other rounding is nearer: whoever was rounded up has at least the remainder of whoever was not.
    up = [share % 1 for n, share in zip(rounded, shares, strict=True) if n > share]
    down = [share % 1 for n, share in zip(rounded, shares, strict=True) if n <= share]
    assert not up or not down or min(up) >= max(down)


@settings(deadline=None)
@given(
    weights=st.lists(
        st.tuples(*[st.sampled_from([0, 0.1, 0.25, 0.3, 1 / 3, 2])] * 3).filter(any), min_size=1, max_size=3
    ),
    percent=st.integers(1, 99),
    steps=st.integers(1, 60),
    global_batch=st.integers(1, 8),
    sizes=st.lists(st.integers(1, 9), min_size=6, max_size=6),
    seed=st.integers(0, 999),
)
def test_counts_are_exact_and_repeats_even(weights, percent, steps, global_batch, sizes, seed):
    index = data(dict(zip((1, 5, 8), sizes[:3], strict=True)), dict(zip((2, 4, 11), sizes[3:], strict=True)))
    borders = [Decimal(i) / len(weights) for i in range(len(weights) + 1)]
    table = sampling(
        *(((float(borders[i]), float(borders[i + 1])), dict(zip(BINS, w, strict=True))) for i, w in enumerate(weights)),
        correct_ratio=percent / 100,
        seed=seed,
    )
    plan = sample_plan(index, table, total_steps=steps, global_batch=global_batch)
    assert (
        plan.draws.tobytes() == sample_plan(index, table, total_steps=steps, global_batch=global_batch).draws.tobytes()
    )
    for w, (start, end) in zip(weights, plan.phases, strict=True):
        part = plan.draws[start:end]
        for name, weight in zip(BINS, w, strict=True):
            count = bin_counts(index, part)[name]
            share = exact(weight) / sum(map(exact, w)) * len(part)
            assert abs(count - share) < 1
            assert count == share or share.denominator > 1
            inside = part[bin_of_each(index.difficulty[part], BINS) == list(BINS).index(name)]
            assert abs(int(index.is_correct[inside].sum()) - exact(percent / 100) * count) < 1
        exactly = Decimal(percent) * len(part) / 100
        assert abs(Decimal(int(index.is_correct[part].sum())) - exactly) <= Decimal("0.5")
    uses = Counter(plan.draws.tolist())
    kinds = list(zip(index.difficulty.tolist(), index.is_correct.tolist(), strict=True))
    for kind in set(kinds):
        of_kind = [uses[i] for i, other in enumerate(kinds) if other == kind]
        assert max(of_kind) - min(of_kind) <= 1


def test_an_empty_bin_gives_its_weight_to_the_others():
    index = data({1: 5, 5: 5}, {2: 5, 6: 5})
    weights = {"low": 0.1, "medium": 0.3, "high": 0.6}
    plan = sample_plan(index, sampling(((0, 1), weights), n_samples=20), total_steps=1, global_batch=20)
    assert bin_counts(index, plan.draws) == {"low": 5, "medium": 15, "high": 0}
    assert (
        "train.jsonl: data_sampling.curriculum_schedule[0]: no rows to draw in difficulty bin high" in plan.warnings[0]
    )


def test_without_balance_the_bins_alone_are_exact():
    index = data({1: 90, 9: 10}, {2: 10, 10: 90})
    weights = {"low": 1, "high": 1}
    plan = sample_plan(index, sampling(((0, 1), weights), balance_correct=False), total_steps=20, global_batch=10)
    assert sorted(plan.draws.tolist()) == list(range(200))
    assert plan.warnings == ()


def test_ratio_one_makes_a_bin_without_correct_rows_empty():
    index = data({1: 5}, {2: 5, 9: 5})
    plan = sample_plan(
        index, sampling(((0, 1), {"low": 1, "high": 1}), correct_ratio=1.0), total_steps=1, global_batch=5
    )
    assert sorted(plan.draws.tolist()) == [0, 1, 2, 3, 4]
    assert "difficulty bin high" in plan.warnings[-1]


def test_repeats_in_a_bin_are_a_warning():
    index = data({1: 50, 9: 2}, {2: 50, 10: 50})
    weights = {"low": 1, "high": 1}
    plan = sample_plan(index, sampling(((0, 1), weights), n_samples=100), total_steps=10, global_batch=10)
    assert plan.warnings == (
        "train.jsonl: an epoch of 100 rows draws 25 correct rows of difficulty bin high and only 2 are there, so rows "
        "repeat: lower data_sampling.n_samples, or change the ratio or the weights, to avoid it",
    )
    assert sorted(n for row, n in Counter(plan.draws.tolist()).items() if row in (50, 51)) == [12, 13]


def test_repeats_of_later_epochs_are_none_to_warn_of():
    index = data({1: 50}, {2: 50})
    plan = sample_plan(index, sampling(((0, 1), {"low": 1})), total_steps=30, global_batch=10)
    assert plan.warnings == ()
    assert set(Counter(plan.draws.tolist()).values()) == {3}


def test_a_run_too_short_to_repeat_does_not_warn():
    index = data({1: 50, 9: 2}, {2: 50, 10: 50})
    weights = {"low": 1, "high": 1}
    plan = sample_plan(index, sampling(((0, 1), weights), n_samples=100), total_steps=1, global_batch=8)
    assert plan.warnings == ()
    assert len(set(plan.draws.tolist())) == 8


def test_rows_come_back_in_another_order():
    quarters = [((i / 4, (i + 1) / 4), {"low": 1}) for i in range(4)]
    index = data({1: 20}, {})
    plan = sample_plan(index, sampling(*quarters, correct_ratio=1.0), total_steps=4, global_batch=10)
    parts = plan.draws.reshape(4, 10).tolist()
    assert [sorted(part) for part in parts[:2]] == [sorted(part) for part in parts[2:]]
    assert parts[:2] != parts[2:]
    assert parts[0] != parts[2]


def test_difficulty_range_holds_in_the_curriculum_too():
    plan = sample_plan(EVEN, sampling(difficulty_range=(2, 9)), total_steps=100, global_batch=10)
    assert set(EVEN.difficulty[plan.draws].tolist()) == set(range(2, 10))


@pytest.mark.parametrize(
    ("index", "table", "parts"),
    [
        (
            data({1: 5}, {1: 5, 9: 5}),
            sampling(((0, 1), {"low": 0.5, "high": 0.5})),
            ["there are no correct rows of difficulty bin high to draw", "data_sampling.correct_ratio = 0.5"],
        ),
        (
            data({1: 5}, {1: 5}),
            sampling(((0, 1), {"medium": 0.5, "high": 0.5})),
            ["data_sampling.curriculum_schedule[0]", "(medium, high)", "data_sampling.difficulty_bins"],
        ),
        (
            data({0: 5}, {0: 5}),
            sampling(),
            ["data_sampling.difficulty_bins", "curriculum_learning = false", "states no difficulties"],
        ),
        (data({1: 5}, {1: 5}), sampling(((0, 1), {"low": 0.0})), ["(none has)"]),
        (data({}, {1: 5}), sampling(((0, 1), {"low": 1}), correct_ratio=1.0), ["there are no correct rows to draw"]),
    ],
)
def test_rows_that_are_needed_and_not_there(index, table, parts):
    with pytest.raises(UserError) as caught:
        sample_plan(index, table, total_steps=2, global_batch=10)
    said = str(caught.value)
    assert said.startswith("train.jsonl: ")
    for part in parts:
        assert part in said


def test_rows_in_two_bins_belong_to_the_earlier_and_unknown_ones_to_none():
    found = bin_of_each(np.array([0, 1, 3, 4, 5], np.int32), {"a": (0, 3), "b": (3, 4)})
    assert found.tolist() == [-1, 0, 0, 1, -1]
