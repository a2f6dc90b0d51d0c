"""Rows made of objects that call things by other names."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp_ds.data.jsonl_mapping import FALSE, TRUE, FieldMapping, UnfitError, look_up, parse_mapping, read_tests
from wmtp_ds.data.rows import parse_row
from wmtp_ds.errors import UserError

RECORD = {"problem_id": "p", "instruction": "Add.", "output": "x = 1", "is_correct": True}


def mapped(record: dict[str, Any], *options: str, id_from: tuple[str, ...] = ()) -> dict[str, Any]:
    """The row; options are "output=path" or "set output=value"."""
    maps = [option for option in options if not option.startswith("set ")]
    sets = [option.removeprefix("set ") for option in options if option.startswith("set ")]
    row = parse_mapping(maps, sets, id_from).apply(record).row
    parse_row(json.dumps(row).encode(), "x", 1)
    return row


def test_keys_of_the_same_name_need_no_mapping() -> None:
    record = {**RECORD, "input": "1", "difficulty": 3, "metadata": {"a": 1}, "else": 5}
    assert mapped(record) == {
        **RECORD,
        "input": "1",
        "difficulty": 3,
        "metadata": {"source": "jsonl", "source_label": True, "a": 1},
    }


def test_paths_and_constants() -> None:
    record = {
        "task": {"id": 17, "texts": ["no", "Add."]},
        "solution": "x = 1",
        "passed": "PASS ",
        "by": {"model": "m"},
        "a.b": "dotted",
    }
    row = mapped(
        record,
        "problem_id=task.id",
        "instruction=task.texts.1",
        "output = solution",
        "is_correct=passed",
        "metadata.model=by.model",
        "input=a.b",
        "set difficulty=3",
        "set metadata.tags=[1, 2]",
    )
    assert row == {
        "problem_id": "17",
        "instruction": "Add.",
        "input": "dotted",
        "output": "x = 1",
        "is_correct": True,
        "difficulty": 3,
        "metadata": {"source": "jsonl", "source_label": True, "model": "m", "tags": [1, 2]},
    }


def test_a_label_that_is_set_is_not_the_sources() -> None:
    row = mapped({**RECORD}, "set is_correct=no")
    assert row["is_correct"] is False
    assert "source_label" not in row["metadata"]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        *((text, True) for text in TRUE),
        *((text, False) for text in FALSE),
        (True, True),
        (False, False),
        (1, True),
        (0, False),
        (" Passed\n", True),
    ],
)
def test_what_counts_as_correct(value: Any, wanted: bool) -> None:
    assert mapped({**RECORD, "is_correct": value})["is_correct"] is wanted


@pytest.mark.parametrize("value", [None, 2, 0.5, 1.0, "", "maybe", [], {}, [True]])
def test_what_counts_as_neither(value: Any) -> None:
    with pytest.raises(UnfitError, match=r'"is_correct" (is missing|says neither)') as error:
        mapped({**RECORD, "is_correct": value})
    assert error.value.reason == "rows_unfit"
    assert "yes is true, yes, " in str(error.value)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(None, None), ("", None), (0, None), (3, 3), ("3", 3), (3.0, 3), ("3.0", 3), (" 4 ", 4)],
)
def test_difficulties(value: Any, wanted: int | None) -> None:
    assert mapped({**RECORD, "difficulty": value}).get("difficulty") == wanted


@pytest.mark.parametrize("value", [-1, 2.5, "hard", True, [1], {}, float("inf"), "nan", "1e999"])
def test_what_is_no_difficulty(value: Any) -> None:
    with pytest.raises(UnfitError, match='"difficulty" must be a whole number'):
        mapped({**RECORD, "difficulty": value})


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"output": None}, "rows_without_output", '"output" must be a text that is not empty'),
        ({"output": " \n"}, "rows_without_output", '"output" must be'),
        ({"output": 5}, "rows_without_output", '"output" must be'),
        ({"instruction": None}, "rows_unfit", '"instruction" is missing'),
        ({"instruction": ["a"]}, "rows_unfit", r'"instruction" must be a text, not \["a"\]'),
        ({"input": 5}, "rows_unfit", '"input" must be a text, not 5'),
        ({"problem_id": None}, "rows_unfit", '"problem_id" must be .*; --id-from instruction makes one'),
        ({"problem_id": True}, "rows_unfit", '"problem_id" must be'),
        ({"problem_id": " "}, "rows_unfit", '"problem_id" must be'),
        ({"metadata": 3}, "rows_unfit", '"metadata" must be an object, not 3'),
        ({"tests": 3}, "rows_unfit", '"tests" must be a list of asserts'),
        ({"tests": ["assert x"], "test_setup": 3}, "rows_unfit", '"test_setup" must be a text, not 3'),
    ],
)
def test_what_makes_no_row(changes: dict[str, Any], reason: str, message: str) -> None:
    with pytest.raises(UnfitError, match=message) as error:
        mapped({**RECORD, **changes})
    assert error.value.reason == reason


@pytest.mark.parametrize("path", ["texts.2", "texts.-1", "texts.x", "texts.0.0", "else", "texts.", ""])
def test_paths_that_lead_nowhere(path: str) -> None:
    with pytest.raises(UnfitError, match=r'"instruction" .*is missing'):
        FieldMapping({"instruction": path}).apply({**RECORD, "texts": ["a", "b"]})


def test_messages_name_the_path() -> None:
    with pytest.raises(UnfitError, match=r'"output" \(from task\.solution\) must be'):
        mapped(RECORD, "output=task.solution")


def test_ids_from_texts() -> None:
    one = mapped({**RECORD, "instruction": "Add  one.\n"}, id_from=("instruction",))["problem_id"]
    assert one == mapped({**RECORD, "instruction": "Add one.", "input": "5"}, id_from=("instruction",))["problem_id"]
    assert len(one) == 16
    both = [
        mapped({**RECORD, "instruction": a, "input": b}, id_from=("instruction", "input"))["problem_id"]
        for a, b in (("Add", "one"), ("Add one", ""), ("Add", "two"))
    ]
    assert len({*both, one}) == 4


# --- tests ---


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (["assert f(1) == 2"], {"kind": "function", "asserts": ["assert f(1) == 2"], "setup": ""}),
        ([["1", "2"], ["3", "4"]], {"kind": "stdio", "cases": [["1", "2"], ["3", "4"]]}),
        ({"input": ["1"], "output": ["2"]}, {"kind": "stdio", "cases": [["1", "2"]]}),
        ({"inputs": ["1"], "outputs": ["2"]}, {"kind": "stdio", "cases": [["1", "2"]]}),
    ],
)
def test_forms_of_tests(value: Any, wanted: dict[str, Any]) -> None:
    assert read_tests(value) == wanted
    for given_value in (value, json.dumps(value)):
        assert FieldMapping().apply({**RECORD, "tests": given_value}).tests == wanted


def test_one_assert_and_its_setup() -> None:
    record = {**RECORD, "check": "assert f(1) == 2", "test_setup": "import math"}
    found = parse_mapping(["tests=check"], [], []).apply(record)
    assert found.tests == {"kind": "function", "asserts": ["assert f(1) == 2"], "setup": "import math"}
    assert "tests" not in found.row
    assert FieldMapping().apply({**RECORD, "tests": []}).tests is None


@pytest.mark.parametrize(
    "value",
    [
        ["f(1)"],
        ["assert ("],
        [["1"]],
        [["1", 2]],
        [["1", "2"], "3"],
        {"input": ["1"], "output": []},
        {"input": "1", "output": "2"},
        {"a": 1},
        5,
    ],
)
def test_what_are_no_tests(value: Any) -> None:
    with pytest.raises(ValueError):
        read_tests(value)


# --- the options ---


@pytest.mark.parametrize(
    ("maps", "sets", "id_from", "message"),
    [
        (["output"], [], [], "--map output: write TARGET=PATH"),
        (["output="], [], [], "--map output=: write TARGET=PATH"),
        (["=x"], [], [], "--map =x: write TARGET=PATH"),
        ([], ["output"], [], "--set output: write TARGET=VALUE"),
        (["ouput=x"], [], [], "there is no target ouput: did you mean output?"),
        (["zzz=x"], [], [], "there is no target zzz: there are problem_id, "),
        (["metadata.=x"], [], [], "there is no target metadata."),
        (["output=a", "output=b"], [], [], "--map output=b: output is given twice"),
        (["output=a"], ["output=b"], [], "--set output=b: output is given twice"),
        ([], ["output=a", "output=b"], [], "--set output=b: output is given twice"),
        (["problem_id=a"], [], ["instruction"], "--id-from makes the problem_id"),
    ],
)
def test_options_that_are_wrong(maps: list[str], sets: list[str], id_from: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_mapping(maps, sets, id_from)
    assert message in str(error.value)


def test_constants_are_json_where_they_are_no_texts() -> None:
    found = parse_mapping([], ["problem_id=5", "difficulty=5", "metadata.a=true", "metadata.b=free text", "input="], [])
    assert dict(found.constants) == {
        "problem_id": "5",
        "difficulty": 5,
        "metadata.a": True,
        "metadata.b": "free text",
        "input": "",
    }


@given(
    st.recursive(
        st.integers(),
        lambda inner: (
            st.dictionaries(st.text("ab", min_size=1, max_size=2), inner, min_size=1, max_size=3)
            | st.lists(inner, min_size=1, max_size=3)
        ),
        max_leaves=12,
    ),
    st.data(),
)
def test_every_place_has_a_path(record: Any, data: st.DataObject) -> None:
    at, path = record, []
    while isinstance(at, (dict, list)):
        part = (
            data.draw(st.sampled_from(sorted(at))) if isinstance(at, dict) else data.draw(st.integers(0, len(at) - 1))
        )
        at, path = at[part], [*path, str(part)]
    if path:
        assert look_up(record, ".".join(path)) == at
        assert not isinstance(look_up(record, ".".join([*path, "0"])), int)
