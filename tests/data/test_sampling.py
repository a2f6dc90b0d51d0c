"""The plan of a run's draws: exact ratios, even repeats, purity."""

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wmtp_ds.data.sampling import count_steps, epoch_size, sample_plan
from wmtp_ds.errors import UserError


@dataclass(frozen=True)
class Sampling:
    n_samples: int | None = None
    correct_ratio: float = 0.5
    balance_correct: bool = True
    difficulty_range: tuple[int, int] | None = None
    seed: int = 42
    curriculum_learning: bool = False
    difficulty_bins: dict[str, tuple[int, int]] = field(default_factory=dict)
    curriculum_schedule: tuple[Any, ...] = ()


def columns(is_correct: list[bool], difficulty: list[int] | None = None) -> Any:
    return SimpleNamespace(
        path=Path("data/train.jsonl"),
        is_correct=np.array(is_correct, np.bool_),
        difficulty=np.array(difficulty or [0] * len(is_correct), np.int32),
    )


def mixed(correct: int, incorrect: int) -> Any:
    return columns([True] * correct + [False] * incorrect)


def half_up(ratio: float, count: int) -> int:
    return int((Decimal(str(ratio)) * count).quantize(Decimal(1), ROUND_HALF_UP))


def spread(rows: np.ndarray, among: np.ndarray) -> int:
    """By how much the uses of the most and the least used of ``among`` differ."""
    uses = Counter(rows.tolist())
    counts = [uses[row] for row in among.tolist()]
    return max(counts) - min(counts) if counts else 0


def test_an_epoch_is_a_fresh_permutation_of_all_rows():
    plan = sample_plan(mixed(6, 6), Sampling(), total_steps=9, global_batch=4)
    epochs = plan.draws.reshape(3, 12)
    assert [sorted(epoch) for epoch in epochs.tolist()] == [list(range(12))] * 3
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert plan.epoch_rows == 12
    assert plan.warnings == ()
    assert plan.phases == ((0, 36),)
    assert plan.draws.dtype == np.int64


def test_n_samples_rows_are_chosen_once():
    plan = sample_plan(mixed(50, 50), Sampling(n_samples=20), total_steps=10, global_batch=6)
    epochs = plan.draws.reshape(3, 20)
    assert len({tuple(sorted(epoch)) for epoch in epochs.tolist()}) == 1
    assert len(set(epochs[0].tolist())) == 20
    assert [int((epoch < 50).sum()) for epoch in epochs] == [10, 10, 10]
    assert plan.warnings == ()


def test_every_epoch_has_an_order_of_its_own():
    plan = sample_plan(mixed(12, 0), Sampling(correct_ratio=1.0), total_steps=9, global_batch=4)
    epochs = plan.draws.reshape(3, 12).tolist()
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_chosen_rows_are_a_random_sample():
    plans = [
        sample_plan(mixed(500, 500), Sampling(n_samples=100, seed=seed), total_steps=10, global_batch=10)
        for seed in range(2)
    ]
    for plan in plans:
        assert abs(plan.draws[plan.draws < 500].mean() - 250) < 80  # the standard deviation is 20
        assert abs(plan.draws[plan.draws >= 500].mean() - 750) < 80
    assert len(set(plans[0].draws.tolist()) & set(plans[1].draws.tolist())) < 50


def test_rows_of_a_step_are_its_part_of_the_draws():
    plan = sample_plan(mixed(5, 5), Sampling(), total_steps=4, global_batch=3)
    assert [plan.rows(step).tolist() for step in range(4)] == plan.draws.reshape(4, 3).tolist()
    assert plan.total_steps == 4
    for step in (-1, 4):
        with pytest.raises(ValueError, match="outside the plan"):
            plan.rows(step)
        with pytest.raises(ValueError, match="outside the plan"):
            plan.phase(step)


def test_a_run_of_no_draws_is_a_programmers_error():
    with pytest.raises(ValueError, match="at least one draw"):
        sample_plan(mixed(1, 1), Sampling(), total_steps=0, global_batch=4)


@given(
    correct=st.integers(1, 40),
    incorrect=st.integers(1, 40),
    n_samples=st.none() | st.integers(1, 120),
    percent=st.integers(0, 100),
    steps=st.integers(1, 40),
    global_batch=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
)
def test_ratio_is_exact_and_repeats_are_even(correct, incorrect, n_samples, percent, steps, global_batch, seed):
    index = mixed(correct, incorrect)
    sampling = Sampling(n_samples=n_samples, correct_ratio=percent / 100, seed=seed)
    plan = sample_plan(index, sampling, total_steps=steps, global_batch=global_batch)
    of_ratio = {0: incorrect, 100: correct}.get(percent, correct + incorrect)
    n = n_samples or of_ratio
    assert plan.epoch_rows == n == epoch_size(index, sampling)
    assert len(plan.draws) == steps * global_batch
    for start in range(0, len(plan.draws), n):
        epoch = plan.draws[start : start + n]
        assert index.is_correct[epoch].sum() == half_up(percent / 100, len(epoch))
    # The rows of an epoch are chosen once: every group repeats only once it is used up, and then evenly.
    quota = half_up(percent / 100, n)
    for rows, available, wanted in (
        (plan.draws[plan.draws < correct], correct, quota),
        (plan.draws[plan.draws >= correct], incorrect, n - quota),
    ):
        used = np.unique(rows)
        assert len(used) <= min(wanted, available)
        assert spread(rows, used) <= 1
        if len(rows) >= available and wanted >= available:
            assert len(used) == available
    for start in range(0, len(plan.draws), n):
        epoch = plan.draws[start : start + n]
        for rows in (epoch[epoch < correct], epoch[epoch >= correct]):
            assert spread(rows, np.unique(rows)) <= 1


@pytest.mark.parametrize(("ratio", "n", "expected"), [(0.55, 100, 55), (0.29, 100, 29), (0.5, 5, 3), (0.1, 45, 5)])
def test_the_ratio_is_decimal_and_rounds_half_up(ratio, n, expected):
    # In binary, 0.55 * 100 is 55.00000000000001 and 0.29 * 100 is 28.999999999999996.
    plan = sample_plan(mixed(100, 100), Sampling(n_samples=n, correct_ratio=ratio), total_steps=1, global_batch=n)
    assert (plan.draws < 100).sum() == expected


def test_half_an_epoch_keeps_the_ratio():
    plan = sample_plan(mixed(100, 100), Sampling(n_samples=100, correct_ratio=0.3), total_steps=5, global_batch=10)
    assert (plan.draws < 100).sum() == 15
    assert len(set(plan.draws.tolist())) == 50


@pytest.mark.parametrize("balance", [True, False])
def test_ratio_one_draws_correct_rows_only_and_zero_incorrect_ones(balance):
    index = mixed(7, 30)
    sampling = Sampling(correct_ratio=1.0, balance_correct=balance)
    plan = sample_plan(index, sampling, total_steps=7, global_batch=2)
    assert epoch_size(index, sampling) == 7
    assert sorted(plan.draws.tolist()) == sorted([*range(7)] * 2)
    plan = sample_plan(index, replace(sampling, correct_ratio=0.0), total_steps=15, global_batch=2)
    assert sorted(plan.draws.tolist()) == list(range(7, 37))


def test_without_balance_rows_come_as_they_are():
    plan = sample_plan(mixed(90, 10), Sampling(balance_correct=False), total_steps=10, global_batch=10)
    assert sorted(plan.draws.tolist()) == list(range(100))


def test_too_few_rows_for_the_ratio_repeat_with_a_warning():
    plan = sample_plan(mixed(20, 4), Sampling(), total_steps=6, global_batch=4)
    assert plan.epoch_rows == 24
    assert (plan.draws < 20).sum() == 12
    assert Counter(plan.draws[plan.draws >= 20].tolist()) == {20: 3, 21: 3, 22: 3, 23: 3}
    [warning] = plan.warnings
    assert warning.startswith("data/train.jsonl: an epoch of 24 rows draws 12 incorrect rows and only 4 are there")
    assert "data_sampling.n_samples" in warning


def test_too_few_rows_for_n_samples_repeat_with_a_warning():
    plan = sample_plan(mixed(3, 2), Sampling(n_samples=12, balance_correct=False), total_steps=2, global_batch=6)
    assert sorted(Counter(plan.draws.tolist()).values()) == [2, 2, 2, 3, 3]
    assert plan.warnings[0].startswith("data/train.jsonl: an epoch of 12 rows draws 12 rows and only 5 are there")


def test_a_run_too_short_to_repeat_does_not_warn():
    plan = sample_plan(mixed(5, 5), Sampling(n_samples=100), total_steps=1, global_batch=8)
    assert plan.warnings == ()
    assert len(set(plan.draws.tolist())) == 8


def test_repeats_are_not_close_together():
    plan = sample_plan(mixed(0, 50), Sampling(n_samples=500, correct_ratio=0.0), total_steps=50, global_batch=10)
    assert [sorted(round_) for round_ in plan.draws.reshape(10, 50).tolist()] == [list(range(50))] * 10


def test_difficulty_range_leaves_out_the_others_and_the_unknown():
    index = columns([True] * 8, [0, 1, 2, 3, 4, 5, 0, 11])
    plan = sample_plan(index, Sampling(correct_ratio=1.0, difficulty_range=(2, 4)), total_steps=3, global_batch=3)
    assert Counter(plan.draws.tolist()) == {2: 3, 3: 3, 4: 3}
    plan = sample_plan(index, Sampling(correct_ratio=1.0), total_steps=2, global_batch=4)
    assert sorted(plan.draws.tolist()) == list(range(8))


@given(
    rows=st.lists(st.tuples(st.booleans(), st.integers(0, 11), st.booleans()), min_size=1, max_size=60),
    low=st.integers(1, 11),
    width=st.integers(0, 10),
    balance=st.booleans(),
    seed=st.integers(0, 99),
)
def test_only_eligible_rows_in_the_range_are_drawn(rows, low, width, balance, seed):
    is_correct, difficulty, eligible = (list(column) for column in zip(*rows, strict=True))
    index = columns(is_correct, difficulty)
    sampling = Sampling(balance_correct=balance, difficulty_range=(low, low + width), seed=seed)
    allowed = [i for i, (_, d, e) in enumerate(rows) if e and low <= d <= low + width]
    assume(allowed and (not balance or len({is_correct[i] for i in allowed}) == 2))
    mask = np.array(eligible)
    plan = sample_plan(index, sampling, total_steps=5, global_batch=7, eligible=mask)
    assert set(plan.draws.tolist()) <= set(allowed)
    assert epoch_size(index, sampling, mask) == len(allowed)
    assert mask.tolist() == eligible  # left as it was


@given(st.integers(0, 2**63 - 1), st.integers(1, 30), st.booleans())
def test_the_plan_is_a_pure_function(seed, steps, balance):
    def make() -> np.ndarray:
        np.random.seed(steps)  # global state must not matter
        sampling = Sampling(n_samples=17, balance_correct=balance, seed=seed)
        return sample_plan(mixed(11, 9), sampling, total_steps=steps, global_batch=4).draws

    assert make().tobytes() == make().tobytes()


def test_the_seed_matters():
    plans = [sample_plan(mixed(20, 20), Sampling(seed=s), total_steps=4, global_batch=10).draws for s in range(3)]
    assert len({tuple(draws.tolist()) for draws in plans}) == 3


def test_the_global_batch_cuts_the_same_draws():
    cuts = [(8, 5), (10, 4), (20, 2), (40, 1)]
    draws = {
        tuple(sample_plan(mixed(9, 9), Sampling(), total_steps=steps, global_batch=batch).draws.tolist())
        for steps, batch in cuts
    }
    assert len(draws) == 1


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 12))
def test_a_longer_run_begins_with_the_same_full_epochs(short, more):
    sampling = Sampling(n_samples=15)
    runs = [sample_plan(mixed(20, 4), sampling, total_steps=n, global_batch=5).draws for n in (short, short + more)]
    full = short // 3 * 15
    assert runs[0][:full].tolist() == runs[1][:full].tolist()


def test_the_order_is_well_mixed():
    # Correct rows come at any place of an epoch: the mean of their positions is near the middle.
    plan = sample_plan(mixed(1000, 1000), Sampling(), total_steps=1, global_batch=2000)
    positions = np.flatnonzero(plan.draws < 1000)
    assert abs(positions.mean() - 1000) < 40  # the standard deviation is 13
    assert abs(np.corrcoef(np.arange(2000), plan.draws)[0, 1]) < 0.1


def test_summary_counts_the_run():
    index = columns([True, True, True, False], [1, 2, 0, 2])
    plan = sample_plan(index, Sampling(n_samples=6), total_steps=4, global_batch=3)
    summary = plan.summary()
    assert json.loads(json.dumps(summary))["draws"] == 12
    phases = summary.pop("phases")
    assert summary == {
        "draws": 12,
        "epoch_rows": 6,
        "epochs": 2.0,
        "distinct_rows": 4,
        "most_uses_of_a_row": 6,
        "correct": 6,
        "incorrect": 6,
        "difficulty": {0: 2, 1: 2, 2: 8},
    }
    assert phases == [{"draws": 12, "correct": 6, "incorrect": 6, "difficulty": {0: 2, 1: 2, 2: 8}}]


@pytest.mark.parametrize(
    ("index", "sampling", "parts"),
    [
        (mixed(0, 5), Sampling(), ["there are no correct rows to draw", "data_sampling.correct_ratio = 0.5"]),
        (mixed(5, 0), Sampling(), ["there are no incorrect rows to draw", "data_sampling.correct_ratio = 0.5"]),
        (mixed(0, 5), Sampling(correct_ratio=1.0), ["no correct rows", "data_sampling.correct_ratio = 1.0"]),
        (
            mixed(0, 5),
            Sampling(correct_ratio=1.0, balance_correct=False),
            ["no correct rows", "data_sampling.correct_ratio = 1.0"],
        ),
        (mixed(5, 0), Sampling(correct_ratio=0.0), ["no incorrect rows", "data_sampling.correct_ratio = 0.0"]),
        (
            columns([True, False], [0, 0]),
            Sampling(difficulty_range=(1, 11)),
            ["data_sampling.difficulty_range = [1, 11]", "the file states no difficulties"],
        ),
        (
            columns([True, False], [5, 7]),
            Sampling(difficulty_range=(8, 11)),
            ["data_sampling.difficulty_range = [8, 11]", "the file's difficulties go from 5 to 7"],
        ),
        (
            columns([True, False], [5, 7]),
            Sampling(difficulty_range=(6, 7)),
            ["no correct rows"],
        ),
    ],
)
def test_rows_that_are_needed_and_not_there(index, sampling, parts):
    with pytest.raises(UserError) as caught:
        sample_plan(index, sampling, total_steps=2, global_batch=4)
    said = str(caught.value)
    assert said.startswith("data/train.jsonl: ")
    for part in parts:
        assert part in said


def test_no_eligible_row_is_an_error():
    with pytest.raises(UserError, match=r"every solution is longer than dataset\.max_length"):
        epoch_size(mixed(2, 2), Sampling(), np.zeros(4, np.bool_))


def test_a_kind_that_no_draw_needs_may_be_missing():
    plan = sample_plan(mixed(5, 0), Sampling(n_samples=4, correct_ratio=0.9), total_steps=1, global_batch=4)
    assert (plan.draws < 5).all()


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ((2.5, 100, 10), 25),
        ((0.1, 30, 1), 3),  # 0.1 * 30 is 3.0000000000000004 in binary
        ((1, 101, 10), 11),
        ((0.001, 10, 64), 1),
        ((3, 100, 10, 7), 7),
        ((3, 100, 10, 70), 30),
    ],
)
def test_steps_of_a_run(arguments, steps):
    assert count_steps(*arguments) == steps
