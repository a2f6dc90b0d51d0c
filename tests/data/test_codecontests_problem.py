"""One problem of CodeContests becomes a problem and rows: difficulty, caps, what is dropped and what is skipped."""

import json
from typing import Any

import pyarrow as pa
import pytest
from codecontests_parquet import SCHEMA, cases, in_languages, many, problem
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_ds.data import codecontests_problem
from wmtp_ds.data.codecontests_problem import (
    Converted,
    Options,
    convert,
    difficulty_of_enum,
    difficulty_of_rating,
    sample_in_order,
    without_line_ends,
)
from wmtp_ds.data.rows import parse_row


def as_scalar(described: dict[str, Any]) -> pa.StructScalar:
    return pa.Table.from_pylist([described], SCHEMA).to_batches()[0].to_struct_array()[0]


def converted(described: dict[str, Any], **options: Any) -> Converted:
    found = convert(as_scalar(described), Options(**options))
    for number, row in enumerate(found.rows, 1):
        parse_row(json.dumps(row).encode(), "x", number)
    return found


def test_a_problem_and_its_rows_in_full() -> None:
    found = converted(problem(5))
    assert found.skipped == ""
    assert found.problem == {
        "problem_id": "codeforces/5_A. Add",
        "instruction": "Read a number and add 5 to it.\n\nInput\n\nOne number.",
        "difficulty": 7,
        "tests": {
            "kind": "stdio",
            "cases": [(f"{n}\n", f"{n + 5}\n") for n in (1, 2, 3, 10, 11, 12, 13)],
        },
        "limits": {"seconds": 2.5, "memory_mb": 256},
        "language": "python",
        "evaluation_only": False,
        "source": "codecontests",
    }
    shared = {k: found.problem[k] for k in ("problem_id", "instruction", "difficulty")}
    told = {"source": "codecontests", "language": "python"}
    assert found.rows == [
        {
            **shared,
            "output": "print(int(input()) + 5)",
            "is_correct": True,
            "metadata": {**told, "source_label": True},
        },
        {
            **shared,
            "output": "print(int(input()) - 5)",
            "is_correct": False,
            "metadata": {**told, "source_label": False},
        },
    ]
    assert not +found.dropped


# The design's table, written out: 1..5 and 7..11 as they are, above 11 as 11, 0 and 6 unknown.
ENUM = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 0, 7: 7, 8: 8, 9: 9, 10: 10, 11: 11} | dict.fromkeys(range(12, 29), 11)


@pytest.mark.parametrize(("number", "wanted"), [*ENUM.items(), (None, 0), (-1, 0)])
def test_difficulty_of_the_enum(number: int | None, wanted: int) -> None:
    assert difficulty_of_enum(number) == wanted
    found = converted(problem(1, difficulty=number))
    assert found.problem.get("difficulty", 0) == found.rows[0].get("difficulty", 0) == wanted


@pytest.mark.parametrize(
    ("rating", "wanted"),
    [
        (0, 0),
        (None, 0),
        (500, 1),
        (800, 1),
        (1049, 1),
        (1050, 2),
        (1299, 2),
        (1300, 3),
        (3299, 10),
        (3300, 11),
        (3500, 11),
    ],
)
def test_difficulty_of_the_rating(rating: int | None, wanted: int) -> None:
    assert difficulty_of_rating(rating) == wanted
    found = converted(problem(1, cf_rating=rating, difficulty=3), difficulty="rating")
    assert found.problem.get("difficulty", 0) == wanted


def test_ratings_rise_in_eleven_equal_steps() -> None:
    found = [difficulty_of_rating(rating) for rating in range(800, 3550)]
    assert found == sorted(found)
    assert all(found.count(step) == 250 for step in range(1, 12))


@pytest.mark.parametrize(
    ("language", "called", "part"),
    [
        ("python3", "python", "print(int(input()) + 5)"),
        ("python2", "python2", "print input() + 5"),
        ("cpp", "cpp", "int main() {"),
        ("java", "java", "class Main"),
    ],
)
def test_the_language_decides_the_solutions(language: str, called: str, part: str) -> None:
    found = converted(problem(5), language=language)
    assert found.rows[0]["output"].startswith(part)
    assert found.problem["language"] == found.rows[0]["metadata"]["language"] == called
    assert all(row["is_correct"] is row["metadata"]["source_label"] for row in found.rows)
    assert sum(row["is_correct"] for row in found.rows) == 1
    assert len(found.rows) == (2 if language in ("python3", "cpp") else 1)


NO_TESTS = {f"{name}_tests": cases() for name in ("public", "private", "generated")}


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({"name": " "}, {}, "problems_without_name"),
        ({"name": None}, {}, "problems_without_name"),
        ({"description": "\n \r\n"}, {}, "problems_without_description"),
        ({"description": None}, {}, "problems_without_description"),
        ({"input_file": "input.txt"}, {}, "problems_with_file_input"),
        ({"output_file": "output.txt"}, {}, "problems_with_file_input"),
        (NO_TESTS, {}, "problems_without_tests"),
        (dict.fromkeys(NO_TESTS), {}, "problems_without_tests"),
        ({}, {"min_tests": 8}, "problems_with_too_few_tests"),
        ({"public_tests": {"input": ["1", "2"], "output": ["1"]}}, {}, "problems_malformed"),
        ({"private_tests": {"input": ["1"], "output": [None]}}, {}, "problems_malformed"),
        ({"solutions": {"language": [3], "solution": ["a", "b"]}}, {}, "problems_malformed"),
        ({"solutions": {"language": None, "solution": ["a"]}}, {}, "problems_malformed"),
        ({"solutions": in_languages((2, "x")), "incorrect_solutions": None}, {}, "problems_without_solutions"),
        ({"solutions": in_languages((3, " \n")), "incorrect_solutions": None}, {}, "problems_without_solutions"),
        ({}, {"max_correct": 0, "max_incorrect": 0}, "problems_without_solutions"),
    ],
)
def test_why_a_problem_is_skipped(changes: dict[str, Any], options: dict[str, Any], reason: str) -> None:
    found = converted(problem(5, **changes), **options)
    assert (found.skipped, found.rows, found.problem) == (reason, [], {})


def test_exactly_enough_tests_are_enough() -> None:
    assert converted(problem(5), min_tests=7).skipped == ""


@pytest.mark.parametrize(
    ("time", "memory", "wanted"),
    [
        (None, 0, None),
        ({"seconds": 0, "nanos": 0}, None, None),
        ({"seconds": 0, "nanos": 500_000_000}, 0, {"seconds": 0.5}),
        ({"seconds": 3, "nanos": None}, 268_435_456, {"seconds": 3.0, "memory_mb": 269}),
        (None, 64_000_000, {"memory_mb": 64}),
    ],
)
def test_limits(time: dict[str, int] | None, memory: int | None, wanted: dict[str, float] | None) -> None:
    assert converted(problem(5, time_limit=time, memory_limit_bytes=memory)).problem.get("limits") == wanted


def test_repeated_solutions_are_dropped() -> None:
    """But for white space at line ends they are the same; leading white space counts."""
    texts = ["a\nb", "a  \r\nb\t\n\n", "a\rb", "\ufeffa\nb", " a\nb", "a\n b", ""]
    found = converted(problem(5, solutions=in_languages(*((3, text) for text in texts))))
    assert [row["output"] for row in found.rows if row["is_correct"]] == ["a\nb", " a\nb", "a\n b"]
    assert found.dropped["solutions_repeated"] == 3
    assert found.dropped["solutions_empty"] == 1


def test_what_the_source_calls_correct_and_incorrect_is_neither() -> None:
    found = converted(
        problem(5, solutions=in_languages((3, "a"), (3, "b")), incorrect_solutions=in_languages((3, "b \n"), (3, "c")))
    )
    assert [(row["output"], row["is_correct"]) for row in found.rows] == [("a", True), ("c", False)]
    assert found.dropped["solutions_labelled_both_ways"] == 2


def test_caps_draw_by_seed() -> None:
    described = many(1, 50, 30)
    drawn = [
        [row["output"] for row in converted(described, max_correct=5, max_incorrect=3, seed=seed).rows]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    found = converted(described, max_correct=5, max_incorrect=3)
    assert sum(row["is_correct"] for row in found.rows) == 5
    assert len(found.rows) == 8
    assert found.dropped["solutions_over_the_cap"] == 45 + 27
    first = [f"print(int(input()) + 1)  # {n}" for n in range(5)]
    assert [row["output"] for row in found.rows[:5]] != first


def test_every_solution_may_be_drawn() -> None:
    described = many(1, 10, 0)
    drawn = {
        row["output"]
        for seed in range(60)
        for row in converted(described, max_correct=1, seed=seed).rows
        if row["is_correct"]
    }
    assert len(drawn) == 10


def test_tests_are_kept_public_first_and_none_twice() -> None:
    described = problem(
        5,
        public_tests=cases(("1", "a"), ("1", "a")),
        private_tests=cases(("1", "a"), ("2", "b")),
        generated_tests=cases(*((str(n), "c") for n in range(100))),
    )
    found = converted(described, max_tests=12)
    kept = found.problem["tests"]["cases"]
    assert kept[:2] == [("1", "a"), ("2", "b")]
    assert len(set(kept)) == len(kept) == 12
    assert found.dropped["tests_over_the_cap"] == 90
    assert [int(given) for given, _ in kept[2:]] == sorted(int(given) for given, _ in kept[2:])
    assert kept != converted(described, max_tests=12, seed=1).problem["tests"]["cases"]


def test_tests_that_are_too_large_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecontests_problem, "MAX_TEST_BYTES", 60)
    described = problem(5, public_tests=cases(("x" * 100, "a"), ("1", "b")), private_tests=None, generated_tests=None)
    found = converted(described)
    assert found.problem["tests"]["cases"] == [("1", "b")]
    assert found.dropped["tests_too_large"] == 1


def test_a_text_that_is_not_utf8() -> None:
    array = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    batch = pa.Table.from_pylist([problem(5)], SCHEMA)
    batch = batch.set_column(SCHEMA.names.index("description"), "description", array).to_batches()[0]
    with pytest.raises(UnicodeDecodeError):
        convert(batch.to_struct_array()[0], Options())


@given(st.lists(st.integers(), max_size=30, unique=True), st.integers(0, 40), st.text(max_size=5))
def test_a_sample_keeps_the_order(items: list[int], most: int, key: str) -> None:
    found = sample_in_order(items, most, key)
    assert len(found) == min(most, len(items))
    places = [items.index(item) for item in found]
    assert places == sorted(set(places))
    assert found == sample_in_order(items, most, key)


@given(st.text(alphabet="ab \t\n", max_size=20), st.text(alphabet=" \t", max_size=3))
def test_white_space_at_line_ends_does_not_count(text: str, more: str) -> None:
    assert without_line_ends(text.replace("\n", more + "\n")) == without_line_ends(text)
    assert [line.rstrip() for line in text.split("\n")] == without_line_ends(text).split("\n")


texts = st.text(st.characters(codec="utf-8"), max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), texts), max_size=8),
    st.lists(st.tuples(st.integers(0, 4), texts), max_size=8),
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_whatever_the_solutions_are_they_are_accounted_for(
    right: list[tuple[int, str]], wrong: list[tuple[int, str]], most_right: int, most_wrong: int
) -> None:
    found = converted(
        problem(5, solutions=in_languages(*right), incorrect_solutions=in_languages(*wrong)),
        max_correct=most_right,
        max_incorrect=most_wrong,
    )
    read = sum(language == 3 for language, _ in right + wrong)
    dropped = sum(count for reason, count in found.dropped.items() if reason.startswith("solutions"))
    assert read == len(found.rows) + dropped
    correct = [row["output"] for row in found.rows if row["is_correct"]]
    incorrect = [row["output"] for row in found.rows if not row["is_correct"]]
    assert len(correct) <= most_right
    assert len(incorrect) <= most_wrong
    assert not set(correct) & set(incorrect)
    assert (found.skipped == "") == bool(found.rows)
