"""Which steps are bad, which are spikes, and what is warned about: by hand and against a brute-force reading."""

import json
import math
from statistics import median
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp_ds.config import StabilityConfig
from wmtp_ds.stability import COLLAPSED_STEPS, CONSTANT_STEPS, Stability

NAN, INF = math.nan, math.inf
TRAINING = SimpleNamespace(weight_clip_min=0.1, weight_clip_max=5.0, beta=0.9, value_lr=1e-4)
SOUND = {"weight/mean": 1.0, "weight/std": 0.3, "weight/entropy": 3.0, "value/mean": 0.5, "value/std": 0.2}


def stability(training=TRAINING, **options) -> Stability:
    return Stability(StabilityConfig(**options), training)


# --- bad steps ---


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (-INF, 1.0), (1.0, NAN), (1.0, INF), (NAN, INF)])
def test_what_is_bad(loss, norm):
    assert stability().judge(loss, norm) == "bad"
    assert stability().judge(1.0, 1.0) == "sound"


def test_a_loss_scale_that_was_too_large_is_not_bad():
    """float16 finds its loss scale by overflows; a loss that is NaN has another cause."""
    found = stability()
    assert found.judge(1.0, INF, rescaled=True) == "sound"
    assert found.judge(NAN, INF, rescaled=True) == "bad"


@pytest.mark.parametrize(("most", "expected"), [(0, None), (1, 1), (2, 4), (3, 9), (4, None)])
def test_too_many_in_a_row_stop(most, expected):
    found = stability(max_skipped_steps=most)
    stopped = None
    for step, bad in enumerate([1, 0, 1, 1, 0, 0, 1, 1, 1, 0], start=1):
        if found.judge(NAN if bad else 1.0, 1.0) == "bad":
            found.skipped(step, [step])
        if found.must_stop and stopped is None:
            stopped = step
    assert stopped == expected


def test_the_lines_of_the_bad_steps_in_a_row_are_kept():
    found = stability(max_skipped_steps=3)
    for step in range(2, 5):
        found.judge(NAN, 1.0)
        found.skipped(step, [10 * step])
    assert found.streak == [(2, [20]), (3, [30]), (4, [40])]
    found.judge(2.0, INF, rescaled=True)
    assert found.streak, "a lowered loss scale is no sound step either"
    found.judge(2.0, 1.0)
    assert found.streak == []


def test_a_run_that_never_stops_remembers_one_step():
    found = stability(max_skipped_steps=0)
    for step in range(50):
        found.skipped(step, [step])
    assert found.streak == [(49, [49])]


# --- spikes ---


def test_a_spike_by_hand():
    found = stability(spike_factor=2.0, spike_window=4)
    assert [found.judge(loss, 1.0) for loss in [9.0, 1.0, 10.0, 11.0]] == ["sound"] * 4
    # Of 9, 1, 10, 11 the median is 9.5.
    assert found.judge(19.0, 1.0) == "sound"
    assert found.judge(21.1, 1.0) == "spike"
    assert (found.limit, found.seen) == (21.0, 4)


def test_none_is_a_spike_unless_asked_for():
    found = stability()
    assert {found.judge(loss, 1.0) for loss in [1.0] * 60 + [1e9]} == {"sound"}


@given(
    losses=st.lists(st.one_of(st.floats(0, 100), st.just(NAN), st.just(INF)), max_size=40),
    factor=st.floats(1.01, 5),
    window=st.integers(2, 9),
    cut=st.integers(0, 40),
)
def test_spikes_are_as_defined_also_after_a_resume(losses, factor, window, cut):
    found = stability(spike_factor=factor, spike_window=window)
    before: list[float] = []
    for number, loss in enumerate(losses):
        if number == cut:
            state = json.loads(json.dumps(found.state_dict()))
            found = stability(spike_factor=factor, spike_window=window)
            found.load_state_dict(state)
        last = before[-window:]
        if not math.isfinite(loss):
            expected = "bad"
        else:
            is_spike = 2 * len(last) >= window and loss > factor * median(last)
            expected = "spike" if is_spike else "sound"
            before.append(loss)
        assert found.judge(loss, 1.0) == expected


def test_a_new_level_is_no_spike_for_ever():
    found = stability(spike_factor=2.0, spike_window=10)
    verdicts = [found.judge(loss, 1.0) for loss in [1.0] * 10 + [5.0] * 10]
    assert verdicts == ["sound"] * 10 + ["spike"] * 5 + ["sound"] * 5


def test_the_step_itself_is_to_blame_and_then_the_update_before():
    found = stability()
    assert found.blame(7) == {7}
    found.passed_over = {7}
    assert found.blame(8) == {8, 6}
    found.passed_over = {6, 7, 8}
    assert found.blame(9) == {9, 5}
    assert found.blame(11) == {11}
    found.passed_over = {1, 2}
    assert found.blame(3) == {3}, "before the first step there is none"


def test_going_back_keeps_what_was_decided_since():
    found = stability(spike_factor=2.0, spike_window=2)
    found.judge(1.0, 1.0)
    state = found.state_dict()
    for loss in (1.0, 1.0, 9.0):
        found.judge(loss, 1.0)
    assert found.once("said")
    found.passed_over = {3}
    found.go_back(state, {4, 2})
    assert found.passed_over == {2, 3, 4}
    assert found.rollbacks == 1
    assert not found.once("said")
    assert found.state_dict()["losses"] == [1.0]


def test_the_state_is_plain_and_whole():
    found = stability(spike_factor=2.0, spike_window=3, max_skipped_steps=4)
    for step, loss in enumerate([1.0, 2.0, NAN, 3.0, 4.0, NAN], start=1):
        if found.judge(loss, 1.0) == "bad":
            found.skipped(step, [step, 7])
    found.warnings(SOUND | {"weight/entropy": 0.0}, rewards_differ=True)
    found.passed_over, found.rollbacks = {9, 4}, 2
    found.once("x")
    state = json.loads(json.dumps(found.state_dict()))
    other = stability(spike_factor=2.0, spike_window=3, max_skipped_steps=4)
    other.load_state_dict(state)
    assert other.state_dict() == found.state_dict()
    assert other.streak == [(6, [6, 7])]
    assert state["passed_over"] == [4, 9]
    shorter = stability(spike_factor=2.0, spike_window=2)
    shorter.load_state_dict(state)
    assert shorter.state_dict()["losses"] == [3.0, 4.0]


# --- warnings ---


def said(found: Stability, metrics: dict, steps: int, rewards_differ: bool = True) -> list[list[str]]:
    return [found.warnings(SOUND | metrics, rewards_differ=rewards_differ) for _ in range(steps)]


def test_nothing_is_said_of_sound_steps():
    assert not any(said(stability(), {}, 100))
    assert not any(stability().warnings({}, rewards_differ=True) for _ in range(100)), (
        "the baseline has no such metrics"
    )


def moments(weights: list[float]) -> dict[str, float]:
    mean = sum(weights) / len(weights)
    return {"weight/mean": mean, "weight/std": (sum((w - mean) ** 2 for w in weights) / len(weights)) ** 0.5}


@pytest.mark.parametrize("weights", [[5.0] * 9, [0.1] * 9, [0.1, 5.0, 5.0], [0.1] * 50 + [5.0]])
def test_weights_at_the_clip_bounds_are_warned_about_once(weights):
    answers = said(stability(), moments(weights), 40)
    (only,) = [(number, lines) for number, lines in enumerate(answers, start=1) if lines]
    assert only[0] == COLLAPSED_STEPS
    assert "lies at a clip bound (training.weight_clip_min = 0.1, weight_clip_max = 5)" in only[1][0]
    assert "Raise training.beta (now 0.9)" in only[1][0]


@pytest.mark.parametrize("weights", [[1.0] * 9, [0.1] * 20 + [1.0], [0.1, 5.0, 3.0], [4.9] * 5, [0.11] * 5])
def test_weights_between_the_bounds_are_fine(weights):
    assert not any(said(stability(), moments(weights), 40))


def test_bounds_are_the_verifiable_stages_alone():
    """Rho-1's weights are 0 and 1 by definition."""
    found = stability(SimpleNamespace())
    assert not any(found.warnings({"weight/mean": 0.6, "weight/std": 0.24**0.5}, rewards_differ=True) for _ in range(9))


def test_it_must_last():
    found = stability()
    at_bounds = moments([5.0])
    for _ in range(10):
        assert not any(said(found, at_bounds, COLLAPSED_STEPS - 1))
        assert not any(said(found, {}, 1))
    assert any(said(found, at_bounds, COLLAPSED_STEPS))


def test_entropy_near_zero_is_warned_about():
    answers = said(stability(), {"weight/entropy": 0.01}, 40)
    assert [bool(lines) for lines in answers].index(True) == COLLAPSED_STEPS - 1
    assert sum(map(len, answers)) == 1
    assert "training.weight_clip_max" in answers[COLLAPSED_STEPS - 1][0]


def test_a_constant_critic_is_warned_about():
    answers = said(stability(), {"value/mean": 0.523, "value/std": 1e-4}, 60)
    assert [bool(lines) for lines in answers].index(True) == CONSTANT_STEPS - 1
    assert sum(map(len, answers)) == 1
    text = answers[CONSTANT_STEPS - 1][0]
    assert "has predicted about 0.523 for every token" in text
    assert "training.value_lr (now 0.0001)" in text
    assert not any(said(stability(), {"value/std": 1e-4}, 60, rewards_differ=False)), "a constant is right then"


def test_what_was_said_is_not_said_again_after_a_resume():
    found = stability()
    said(found, {"weight/entropy": 0.01}, 10)
    other = stability()
    other.load_state_dict(found.state_dict())
    assert not any(said(other, {"weight/entropy": 0.01}, 40))
