"""``wmtp-ds data label``: labels, counts, options, restarts, and bad input."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wmtp_ds.cli.main import main
from wmtp_ds.data import label_file as module
from wmtp_ds.data.label_file import LabelOptions, label_file, run_row
from wmtp_ds.data.label_file_journal import Journal
from wmtp_ds.data.label_file_tests import Problem
from wmtp_ds.data.labels import FunctionTests, Label, StdioTests, Verdict
from wmtp_ds.data.output_file import report_path
from wmtp_ds.data.sandbox import Limits
from wmtp_ds.errors import RunError, UserError

DOUBLE = "def f(x): return 2 * x"
SAME = "def f(x): return x"
ASSERTS = ["assert f(1) == 2", "assert f(2) == 4"]


def row(problem: str = "p", output: str = DOUBLE, is_correct: bool = True, **metadata: Any) -> dict[str, Any]:
    found = {"problem_id": problem, "instruction": "Double.", "output": output, "is_correct": is_correct}
    return found | ({"metadata": metadata} if metadata else {})


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def problem(name: str, tests: dict[str, Any] | None, **rest: Any) -> dict[str, Any]:
    return {"problem_id": name, "instruction": "Double.", "tests": tests, "language": "python", **rest}


FUNCTION = {"kind": "function", "asserts": ASSERTS, "setup": ""}
STDIO = {"kind": "stdio", "cases": [["3\n", "6\n"], ["4\n", "8\n"]]}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Rows of every sort, beside their problems."""
    write(
        tmp_path / "problems.jsonl",
        problem("function", FUNCTION),
        problem("stdio", STDIO),
        problem("bare", None),
        problem("cpp", STDIO, language="cpp"),
        problem("broken", {"kind": "function", "asserts": ASSERTS, "setup": "1 / 0"}),
        problem("disputed", FUNCTION),
    )
    return write(
        tmp_path / "in.jsonl",
        row("function"),
        row("function", SAME, is_correct=True, note="kept"),
        row("function", "def f(x): return x +", is_correct=False),
        row("function", "def f(x):\n    while True: pass", is_correct=False),
        row("function", "def f(x): return bytearray(10**10)", is_correct=False),
        row("function", "def f(x): return x + x", is_correct=False),
        row("stdio", "print(2 * int(input()))"),
        row("stdio", "print(6)", is_correct=False),
        row("bare"),
        row("cpp", "int main() {}", is_correct=False),
        row("broken"),
        row("disputed", SAME),
        row("disputed", "def f(x): return 0", is_correct=False),
        row("own", SAME, tests=["assert f(3) == 3"], source_label=False),
    )


LIMITS = ["--limit-seconds", "0.5"]


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as left:
        main(["data", "label", *map(str, arguments), *LIMITS])
    return int(left.value.code or 0)


def test_rows_are_labelled_and_counted(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "deep" / "out.jsonl"
    assert run("--input", mixed, "--output", output, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    rows = read(output)
    assert [(one["problem_id"], one["is_correct"], one.get("metadata", {}).get("verdict")) for one in rows] == [
        ("function", True, "passed"),
        ("function", False, "wrong"),
        ("function", False, "error"),
        ("function", False, "timeout"),
        ("function", False, "memory"),
        ("function", True, "passed"),
        ("stdio", True, "passed"),
        ("stdio", False, "wrong"),
        ("bare", True, None),
        ("cpp", False, None),
        ("own", True, "passed"),
    ]
    assert rows[1]["metadata"] == {
        "note": "kept",
        "verdict": "wrong",
        "evidence": "test 1 of 2: f(1) gave 1, not 2",
        "source_label": True,
    }
    assert rows[5]["metadata"]["source_label"] is rows[10]["metadata"]["source_label"] is False
    assert rows[8] == row("bare")
    assert (told["rows_read"], told["rows_written"], told["labelled"]) == (14, 11, 9)
    assert (told["correct"], told["incorrect"], told["disagreements"]) == (4, 5, 3)
    assert told["source_and_run"] == {
        "source_correct": {"correct": 2, "incorrect": 1},
        "source_incorrect": {"correct": 2, "incorrect": 4},
        "source_silent": {"correct": 0, "incorrect": 0},
    }
    assert told["verdicts"]["wrong"] == {"source_correct": 1, "source_incorrect": 1, "source_silent": 0}
    assert [(one["line"], one["source_label"], one["verdict"]) for one in told["disagreements_first"]] == [
        (2, True, "wrong"),
        (6, False, "passed"),
        (14, False, "passed"),
    ]
    assert told["untested"] == {"language cpp": 1, "no tests": 1}
    assert (told["suspicious_rows"], told["suspicious_problems"]) == (3, 2)
    first = told["suspicious_problems_first"]
    assert first["broken"] == "the setup code fails without a solution: ZeroDivisionError: division by zero"
    assert first["disputed"].startswith("none of the problem's solutions")
    assert json.loads(report_path(output).read_text())["report"]["labelled"] == 9
    assert sorted(entry.name for entry in output.parent.iterdir()) == ["out.jsonl", "out.jsonl.report.json"]


def test_the_summary_is_for_reading(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.jsonl"
    assert run("--input", mixed, "--output", output) == 0
    told = capsys.readouterr()
    assert "rows: 14 read, 11 written; 9 labelled by running: 4 correct, 5 incorrect" in told.out
    assert "code ran in the sandbox '" in told.out
    lines = [line.split() for line in told.out.splitlines()]
    assert ["run", "says", "source", "correct", "source", "incorrect"] in lines
    assert ["correct", "2", "2"] in lines
    assert ["incorrect", "1", "4"] in lines
    assert ["timeout", "0", "1"] in lines
    assert "disagreements with the source: 3" in told.out
    assert "line 2 (function): said to be correct; wrong: test 1 of 2: f(1) gave 1, not 2" in told.out
    assert "not run (no tests): 1 rows, which keep the source's label" in told.out
    assert "suspicious tests: 2 problems with 3 rows, which were dropped" in told.out
    assert "running solutions: 14 of 14 rows" in told.err
    before = output.read_bytes()
    assert run("--input", mixed, "--output", output) == 0
    assert "holds these labels already" in capsys.readouterr().out
    assert output.read_bytes() == before


def test_what_is_not_tested_or_not_believed_can_be_dropped_or_kept(mixed: Path, tmp_path: Path) -> None:
    options = {"limit_seconds": 0.5}
    kept = tmp_path / "kept.jsonl"
    label_file(mixed, kept, LabelOptions(**options, suspicious="keep"))  # type: ignore[arg-type]
    rows = [one for one in read(kept) if "suspicious_tests" in one.get("metadata", {})]
    assert [(one["problem_id"], one["is_correct"]) for one in rows] == [
        ("broken", True),
        ("disputed", True),
        ("disputed", False),
    ]
    assert all("verdict" not in one["metadata"] for one in rows)
    believed = tmp_path / "believed.jsonl"
    told = label_file(mixed, believed, LabelOptions(**options, suspicious="label", untested="drop"))  # type: ignore[arg-type]
    found = {one["problem_id"]: one["metadata"]["verdict"] for one in read(believed)}
    assert found["disputed"] == "wrong"
    assert "broken" not in found
    assert "bare" not in found
    assert told["rows_written"] == 11
    assert told["untested"] == {"language cpp": 1, "no tests": 1}


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        (["assert f(1) =="], "test 1 is not Python"),
        (["f(1) == 2"], "test 1 asserts nothing"),
        (["assert True"], "they pass without a solution"),
        (["assert f(1) == 2", "assert 1 == 2"], "test 2 fails without calling a solution"),
        (["assert f(1) == 2", "assert [][0] == f(1)"], "test 2 fails without a solution: IndexError"),
        (["while True: pass\nassert f(1) == 2"], "test 1 does not come to an end even without a solution"),
        (["import numpy_is_not_here\nassert f(1) == 2"], "test 1 fails without a solution: ModuleNotFoundError"),
        ({"kind": "stdio", "cases": [["1", ""], ["2", " \n"]]}, "a program that does nothing passes them"),
        ({"kind": "stdio", "cases": [["1"]]}, "they are neither"),
        ({"kind": "other"}, "they are neither"),
        ("assert f(1) == 2", "they are neither"),
        ([1], "they are neither"),
    ],
)
def test_tests_that_prove_nothing_are_found(tests: Any, reason: str) -> None:
    found = run_row(row(tests=tests), None, LabelOptions(limit_seconds=0.3))
    assert found.keys() == {"suspicious"}
    assert found["suspicious"].startswith(reason)


def test_a_rows_own_tests_come_before_its_problems(tmp_path: Path) -> None:
    write(tmp_path / "other.jsonl", problem("p", {"kind": "function", "asserts": ["assert f(1) == 1"]}))
    write(tmp_path / "problems.jsonl", problem("p", FUNCTION))
    own = row("p", SAME, tests=["assert f(a) == 3"], test_setup="a = 3")
    source = write(tmp_path / "in.jsonl", own, row("p", SAME, is_correct=False))
    label_file(source, tmp_path / "a.jsonl")
    assert [one["is_correct"] for one in read(tmp_path / "a.jsonl")] == [True, False]
    label_file(source, tmp_path / "b.jsonl", problems=tmp_path / "other.jsonl")
    assert [one["is_correct"] for one in read(tmp_path / "b.jsonl")] == [True, True]


def test_a_source_that_says_nothing_is_not_disagreed_with(tmp_path: Path) -> None:
    rows = [row(str(n), SAME, is_correct=bool(n % 2), source="jsonl", tests=ASSERTS) for n in range(2)]
    told = label_file(write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl")
    assert told["disagreements"] == 0
    assert told["source_and_run"]["source_silent"] == {"correct": 0, "incorrect": 2}
    assert all("source_label" not in one["metadata"] for one in read(tmp_path / "out.jsonl"))


def test_labelling_again_compares_with_the_first_source(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", row("p", SAME, tests=ASSERTS), row("p", DOUBLE, tests=ASSERTS))
    first = label_file(source, tmp_path / "a.jsonl")
    again = label_file(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert first["disagreements"] == again["disagreements"] == 1
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_problem_for_evaluation_only_marks_its_rows(tmp_path: Path) -> None:
    write(tmp_path / "problems.jsonl", problem("p", FUNCTION, evaluation_only=True))
    label_file(write(tmp_path / "in.jsonl", row("p")), tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl")[0]["metadata"]["evaluation_only"] is True


def test_limits_are_the_problems_own_where_it_has_some() -> None:
    default = Limits(cpu_seconds=2.0, memory_bytes=512 << 20)
    tests = FunctionTests(("assert f(1) == 2",))
    assert Problem(tests).limits(default, 3.0).cpu_seconds == 2.0
    assert Problem(tests).limits(default, 3.0).memory_bytes == 512 << 20
    own = Problem(tests, seconds=1.5, memory_mb=64.0).limits(default, 3.0)
    assert (own.cpu_seconds, own.wall_seconds) == (4.5, 5 + 4 * 4.5)
    assert own.memory_bytes == 64_000_000 + (128 << 20)
    large = Problem(StdioTests((("", "x" * (3 << 20)),))).limits(default, 3.0)
    assert large.output_bytes == 6 << 20
    assert large.file_bytes >= large.output_bytes


def test_limits_and_comparison_reach_the_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Limits]] = []

    def keep(solution: str, tests: Any, limits: Limits) -> Label:
        seen.append((tests, limits))
        return Label(Verdict.PASSED, 1, 1)

    monkeypatch.setattr(module, "label", keep)
    write(
        tmp_path / "problems.jsonl", problem("p", STDIO, limits={"seconds": 1, "memory_mb": 100}), problem("q", STDIO)
    )
    source = write(tmp_path / "in.jsonl", row("p"), row("q"))
    options = ["--limit-memory", 99, "--limit-factor", 3, "--white-space", "tokens", "--float-tolerance", 0.01]
    assert run("--input", source, "--output", tmp_path / "out.jsonl", "--workers", 1, *options) == 0
    assert [limits.cpu_seconds for _, limits in seen] == [3.0, 0.5]
    assert [limits.memory_bytes for _, limits in seen] == [100_000_000 + (128 << 20), 99 << 20]
    assert {(tests.comparison.white_space, tests.comparison.tolerance) for tests, _ in seen} == {("tokens", 0.01)}


def _counted(monkeypatch: pytest.MonkeyPatch, stop_at: int) -> list[str]:
    """Labels without a sandbox, that end in an interruption once so many have run."""
    ran: list[str] = []

    def fake(solution: str, tests: Any, limits: Limits) -> Label:
        if len(ran) == stop_at:
            raise KeyboardInterrupt
        ran.append(solution)
        return Label(Verdict.PASSED if len(solution) % 2 else Verdict.WRONG, 1, 1, "" if len(solution) % 2 else "no")

    monkeypatch.setattr(module, "label", fake)
    monkeypatch.setattr(module, "check_tests", lambda *args: None)
    return ran


@pytest.fixture
def many(tmp_path: Path) -> Path:
    return write(
        tmp_path / "in.jsonl", *(row(f"p{n % 7}", DOUBLE + "#" * n, n % 3 > 0, tests=ASSERTS) for n in range(60))
    )


def test_an_interrupted_run_goes_on(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = _counted(monkeypatch, 10**6)
    label_file(many, tmp_path / "whole.jsonl", workers=2)
    assert len(ran) == 60
    ran = _counted(monkeypatch, 25)
    with pytest.raises(KeyboardInterrupt):
        label_file(many, tmp_path / "out.jsonl", workers=1)
    assert not (tmp_path / "out.jsonl").exists()
    journal = tmp_path / ".partial-out.jsonl.journal"
    with journal.open("ab") as file:
        file.write(b'{"verdict": "pas')  # a line that was cut off
    done: list[int] = []
    ran = _counted(monkeypatch, 10**6)
    label_file(many, tmp_path / "out.jsonl", workers=3, on_done=done.append)
    assert len(ran) == 60 - 25
    assert (done[0], sum(done)) == (25, 60)
    for name in ("out.jsonl", "out.jsonl.report.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / name.replace("out", "whole")).read_bytes()
    assert list(tmp_path.glob(".partial*")) == []


@pytest.mark.parametrize("change", ["options", "input", "problems"])
def test_what_was_begun_otherwise_is_not_gone_on_with(
    change: str, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _counted(monkeypatch, 25)
    with pytest.raises(KeyboardInterrupt):
        label_file(many, tmp_path / "out.jsonl", workers=1)
    if change == "input":
        many.write_text(many.read_text().replace("Double.", "Twice."))
    if change == "problems":
        write(tmp_path / "problems.jsonl", problem("p", FUNCTION))
    ran = _counted(monkeypatch, 10**6)
    label_file(many, tmp_path / "out.jsonl", LabelOptions(limit_seconds=1.0 if change == "options" else 2.0))
    assert len(ran) == 60


def test_a_kill_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    """The real command, killed with SIGKILL; started again it ends with the same bytes as one that was not."""
    outputs = [DOUBLE, SAME, "def f(x): return x +", "import time\ntime.sleep(0.05)\n" + DOUBLE]
    rows = [row(f"p{n}", outputs[n % 4] + f"  # {n}", n % 3 > 0, tests=ASSERTS) for n in range(24)]
    source = write(tmp_path / "in.jsonl", *rows)
    label_file(source, tmp_path / "whole.jsonl", LabelOptions(suspicious="label"))
    command = [sys.executable, "-m", "wmtp_ds", "data", "label", "--input", source, "--output", tmp_path / "out.jsonl"]
    command += ["--workers", "1", "--suspicious", "label"]
    journal = tmp_path / ".partial-out.jsonl.journal"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (not journal.exists() or journal.read_bytes().count(b"\n") < 6):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out.jsonl").exists()
    entries = journal.read_bytes().count(b"\n") - 1
    assert 5 <= entries < 24
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["rows_written"] == 24
    for name in ("out.jsonl", "out.jsonl.report.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / name.replace("out", "whole")).read_bytes()
    assert list(tmp_path.glob(".partial*")) == []


def test_two_processes_do_not_write_one_file(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meddle(total: int) -> None:
        with pytest.raises(UserError, match="another process is writing it"):
            label_file(many, tmp_path / "out.jsonl")

    _counted(monkeypatch, 10**6)
    label_file(many, tmp_path / "out.jsonl", on_start=meddle)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "label", lambda *args: Label(Verdict.WRONG, 0, 1, "no"))
    monkeypatch.setattr(module, "check_tests", lambda *args: None)

    def peak(count: int) -> int:
        source = tmp_path / f"in{count}.jsonl"
        with source.open("w") as file:
            for n in range(count):
                file.write(json.dumps(row("p", DOUBLE + "#" * 5000 + str(n), tests=ASSERTS)) + "\n")
        tracemalloc.start()
        label_file(source, tmp_path / f"out{count}.jsonl", workers=2)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)
    # Seven megabytes more to label; how many rows are on their way at once depends on the threads.
    assert peak(1600) < peak(200) + 1_000_000


def test_slow_rows_do_not_hold_up_the_others(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All workers stay busy behind a slow row, and the order stays."""
    began: list[float] = []

    def fake(solution: str, tests: Any, limits: Limits) -> Label:
        began.append(time.monotonic())
        time.sleep(0.3 if len(began) == 1 else 0.0)
        return Label(Verdict.WRONG, 0, 1, str(solution.count("#")))

    monkeypatch.setattr(module, "label", fake)
    monkeypatch.setattr(module, "check_tests", lambda *args: None)
    label_file(many, tmp_path / "out.jsonl", LabelOptions(suspicious="label"), workers=2)
    assert sorted(began)[40] - began[0] < 0.3
    assert [one["metadata"]["evidence"] for one in read(tmp_path / "out.jsonl")] == [str(n) for n in range(60)]


def _other_file(tmp_path: Path, source: Path) -> list[Any]:
    return ["--input", source, "--output", write(tmp_path / "out.jsonl", row())]


BAD: dict[str, tuple[Callable[[Path, Path], list[Any]], str]] = {
    "no input": (lambda tmp, source: ["--input", tmp / "none", "--output", tmp / "o"], "none: cannot be read"),
    "a folder": (lambda tmp, source: ["--input", tmp, "--output", tmp / "o"], "is a folder: give --input"),
    "an empty file": (lambda tmp, source: ["--input", write(tmp / "e"), "--output", tmp / "o"], "has no rows"),
    "no row": (lambda tmp, source: ["--input", write(tmp / "e", {}), "--output", tmp / "o"], 'e:1: "problem_id"'),
    "not UTF-8": (
        lambda tmp, source: ["--input", (tmp / "b").write_bytes(b"\xff\n") and tmp / "b", "--output", tmp / "o"],
        "b:1: not UTF-8",
    ),
    "itself": (lambda tmp, source: ["--input", source, "--output", source], "is the input"),
    "its tests": (
        lambda tmp, source: ["--input", source, "--problems", write(tmp / "t"), "--output", tmp / "t", "--force"],
        "is the input, or its tests",
    ),
    "output is a folder": (lambda tmp, source: ["--input", source, "--output", tmp], "is a folder: give --output"),
    "another file": (_other_file, "exists, and was not made by this command"),
    "no problems": (
        lambda tmp, source: ["--input", source, "--output", tmp / "o", "--problems", tmp / "none"],
        "none: cannot be read",
    ),
    "a problem twice": (
        lambda tmp, source: [
            *("--input", source, "--output", tmp / "o", "--problems"),
            write(tmp / "q", problem("p", None), problem("p", None)),
        ],
        "q:2: problem p is already on line 1",
    ),
    "a problem without id": (
        lambda tmp, source: ["--input", source, "--output", tmp / "o", "--problems", write(tmp / "q", {"tests": []})],
        'q:1: "problem_id" must be a text',
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", row(tests=ASSERTS))
    arguments, message = BAD[case]
    assert run(*arguments(tmp_path, source)) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("error:") == 1
    assert list(tmp_path.glob(".partial*")) == []


def test_a_finished_file_is_replaced_only_on_demand(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", row(tests=ASSERTS))
    output = tmp_path / "out.jsonl"
    label_file(source, output)
    with pytest.raises(UserError, match="made with other options"):
        label_file(source, output, LabelOptions(limit_seconds=3.0))
    with output.open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="changed since it was made"):
        label_file(source, output)
    assert label_file(source, output, force=True)["reused"] is False
    assert label_file(source, output)["reused"] is True


def test_a_full_disk_is_one_clear_error(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _counted(monkeypatch, 10**6)

    def full(*args: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module, "replace_file", full)
    with pytest.raises(RunError, match=r"No space left on device; what has run is kept in .*partial-out"):
        label_file(many, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("room", [10, 60])
def test_no_room_for_the_journal(tmp_path: Path, room: int) -> None:
    """Neither for its first line nor for an entry; a buffer that cannot be emptied is no error of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with (
            pytest.raises((RunError, OSError), match="File too large") as error,
            Journal(tmp_path / "out.jsonl", {"command": "label"}) as journal,
        ):
            journal.append({"verdict": "passed", "evidence": "e" * 80})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(error.value, RunError) == (room == 10)
    with Journal(tmp_path / "out.jsonl", {"command": "label"}) as journal:
        assert journal.entries == 0
        journal.append({"verdict": "passed"})
        assert list(journal) == [{"verdict": "passed"}]
