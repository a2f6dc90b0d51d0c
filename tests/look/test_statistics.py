"""Figures of tokens, against plain Python."""

import math
from collections.abc import Sequence
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp_ds.data.rows import Row
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.look.columns import Solution, Token
from wmtp_ds.look.statistics import BINS, STRETCHES, check, summary

KINDS_HERE = ("keyword", "name", "operator", "end")
NUMBERS = st.floats(-10, 10, allow_nan=False)


def solution(values: Sequence[float], correct: bool, problem: str = "p") -> Solution:
    """The weight is twice the value; kinds follow each other in turn."""
    tokens = [
        Token("x", KINDS_HERE[place % 4], {"weight": 2 * value, "value": value}) for place, value in enumerate(values)
    ]
    return Solution(Row(problem, "Do it.", "x" * len(values), correct), 1, tokens)


@st.composite
def solutions(draw: st.DrawFn) -> list[Solution]:
    values = st.lists(NUMBERS, min_size=1, max_size=70)
    found = draw(st.lists(st.tuples(values, st.booleans(), st.sampled_from("abc")), min_size=1, max_size=6))
    return [solution(*one) for one in found]


def test_a_trajectory_by_hand() -> None:
    """A token in the middle of a solution of 101 stands at 0.5; two tokens are the first stretch and the last."""
    long = solution([place / 100 for place in range(101)], True)
    short = solution([-1.0, 3.0], True)
    found = summary([long, short, solution([7.0], False)])["trajectory"]
    right = found["correct"]
    assert len(right) == STRETCHES == 20
    assert right[10] == pytest.approx(fmean([0.50, 0.51, 0.52, 0.53, 0.54]))
    assert right[0] == pytest.approx((fmean([0.00, 0.01, 0.02, 0.03, 0.04]) - 1.0) / 2)
    assert right[19] == pytest.approx((fmean([0.95, 0.96, 0.97, 0.98, 0.99, 1.00]) + 3.0) / 2)
    assert found["incorrect"] == [7.0, *[None] * 19]


@given(solutions())
def test_every_solution_counts_alike_in_a_trajectory(found: list[Solution]) -> None:
    told = summary(found)["trajectory"]
    for name, is_correct in (("correct", True), ("incorrect", False)):
        for stretch in range(STRETCHES):
            means = []
            for one in found:
                last = len(one.tokens) - 1
                inside = [
                    token.columns["value"]
                    for place, token in enumerate(one.tokens)
                    # In whole numbers: the last place belongs to the last stretch.
                    if (min(place * STRETCHES // last, STRETCHES - 1) if last else 0) == stretch
                ]
                if inside and one.row.is_correct is is_correct:
                    means.append(fmean(inside))
            expected = fmean(means) if means else None
            assert told[name][stretch] == (None if expected is None else pytest.approx(expected, abs=1e-9))


@given(solutions())
def test_means_by_kind_and_by_column(found: list[Solution]) -> None:
    told = summary(found)
    tokens = [(token, one.row.is_correct) for one in found for token in one.tokens]
    assert (told["tokens"], told["solutions"]) == (len(tokens), len(found))
    assert told["problems"] == len({one.row.problem_id for one in found})
    assert told["shaded_by"] == "weight"
    for kind in KINDS_HERE:
        own = [(token.columns["weight"], is_correct) for token, is_correct in tokens if token.kind == kind]
        if not own:
            assert kind not in told["by_kind"]
            continue
        entry = told["by_kind"][kind]
        assert entry["tokens"] == len(own)
        for name, wanted in (("correct", True), ("incorrect", False)):
            values = [value for value, is_correct in own if is_correct is wanted]
            assert entry[name] == (pytest.approx(fmean(values), abs=1e-9) if values else None)
    for column in ("weight", "value"):
        values = [token.columns[column] for token, _ in tokens]
        expected = {"mean": fmean(values), "std": pstdev(values), "min": min(values), "max": max(values)}
        assert told["columns"][column] == pytest.approx(expected, abs=1e-9)


@given(solutions())
def test_every_token_is_in_one_bin(found: list[Solution]) -> None:
    told = summary(found)["distribution"]
    weights = [token.columns["weight"] for one in found for token in one.tokens]
    edges = told["edges"]
    assert len(edges) == BINS + 1
    assert edges[0] == min(weights)
    assert edges[-1] == pytest.approx(max(weights) if max(weights) > min(weights) else min(weights) + 1)
    for name, is_correct in (("correct", True), ("incorrect", False)):
        own = [token.columns["weight"] for one in found if one.row.is_correct is is_correct for token in one.tokens]
        assert sum(told[name]) == len(own)
        # Bins are open on the right, but for the last.
        assert told[name][0] == sum(edges[0] <= weight < edges[1] for weight in own)
        assert told[name][-1] == sum(weight >= edges[-2] for weight in own)


def test_a_stage_that_shows_values_alone() -> None:
    critic = [
        Solution(one.row, 1, [Token("x", "name", {"value": token.columns["value"]}) for token in one.tokens])
        for one in (solution([0.25, 0.75], True), solution([0.5], False))
    ]
    check(critic, "critic")
    assert summary(critic)["shaded_by"] == "value"
    assert summary(critic)["by_kind"] == {"name": {"tokens": 3, "correct": 0.5, "incorrect": 0.5}}


def test_what_cannot_be_shown() -> None:
    nothing = Solution(Row("p", "Do it.", "x", True), 3, [Token("x", "name", {"excess": 1.0})])
    with pytest.raises(UserError, match="the stage mine shows neither weights nor values: define its look"):
        check([nothing], "mine")
    for value in (math.nan, math.inf, -math.inf):
        spoilt = Solution(Row("p", "Do it.", "x", True), 3, [Token("x", "name", {"weight": 1.0, "td": value})])
        with pytest.raises(RunError, match=rf"line 3, token 'x': td {value}\. The model's numbers are not finite"):
            check([spoilt], "verifiable")
