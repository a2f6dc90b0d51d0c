"""`wmtp-ds data dedup`: what it writes, refuses, and says of the rows that go."""

import errno
import hashlib
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from duplicate_rows import long_text, planted, row, write

from wmtp_ds.cli.main import main


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return planted(tmp_path / "rows.jsonl")


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["data", "dedup", *map(str, args)])
    assert isinstance(end.value.code, int)
    return end.value.code


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if not entry.name.endswith(".index.npz")}


def test_it_drops(train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "clean.jsonl"
    assert run(train, "--drop", "--output", output, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows_kept"] == 6
    assert report["output"] == str(output)
    assert names(output.parent) == {"clean.jsonl", "clean.jsonl.report.json"}
    lines = train.read_text().splitlines(keepends=True)
    assert output.read_text() == "".join(lines[i] for i in (0, 1, 5, 6, 7, 8))
    assert run(train, "--drop", "--output", output) == 2
    assert "is there already" in capsys.readouterr().err
    assert run(train, "--drop", "--output", output, "--force", "--what", "problems") == 0
    assert len(output.read_text().splitlines()) == 9


def test_each_line_stays_as_it_is(tmp_path: Path) -> None:
    lines = [json.dumps(row("p", text)).encode() for text in ("one way", "x = 1", "one way", "another of them")]
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"\n" + lines[0] + b"  \r\n \n" + lines[1] + b"\n\n" + lines[2] + b"\n" + lines[3])
    assert run(source, "--drop", "--output", tmp_path / "out.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == lines[0] + b"  \n" + lines[1] + b"\n" + lines[3] + b"\n"


def test_the_report_names_every_dropped_row(train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = write(tmp_path / "evaluation.jsonl", [{"prompt": long_text(9), "canonical_solution": long_text(3)}])
    split = write(tmp_path / "held.jsonl", [row("other", "x", text="p asks for it")])
    with train.open("a") as file:
        file.writelines(json.dumps(row("z", f"repeated {n // 2}")) + "\n" for n in range(240))
    output = tmp_path / "clean.jsonl"
    args = [train, "--drop", "--output", output, "--against", evaluation, "--split", split, "--conflicts", "drop"]
    assert run(*args, "--threshold", "0.9") == 0
    assert f"{output}.report.json names every dropped row, and why" in capsys.readouterr().out
    record = json.loads((tmp_path / "clean.jsonl.report.json").read_text())
    assert record["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert record["made_from"]["input"] == hashlib.sha256(train.read_bytes()).hexdigest()
    assert record["made_from"]["against"] == [str(evaluation)]
    assert record["made_from"]["threshold"] == 0.9
    kept = set(output.read_text().splitlines())
    dropped = [number for number, line in enumerate(train.read_text().splitlines(), 1) if line not in kept]
    assert [one["line"] for one in record["dropped"] if one["line"] <= 11] == [n for n in dropped if n <= 11]
    assert [one["line"] for one in record["dropped"] if one["line"] > 11] == list(range(13, 252, 2))
    assert record["dropped"][:5] == [
        {"line": n, "problem_id": "p", "step": "split", "rule": "exact", "of": f"{split}:1", "similarity": 1.0}
        for n in range(1, 6)
    ]
    by_line = {one["line"]: one for one in record["dropped"]}
    assert by_line[7] == {"line": 7, "problem_id": "q", "step": "conflicts", "rule": "exact", "of": f"{train}:8",
                          "similarity": 1.0}  # fmt: skip
    assert by_line[8]["of"] == f"{train}:7"
    assert (by_line[9]["step"], by_line[9]["rule"], by_line[9]["of"]) == (
        "contamination", "problem_exact", f"{evaluation}:1"
    )  # fmt: skip
    assert by_line[13] == {"line": 13, "problem_id": "z", "step": "repeated_solutions", "rule": "exact",
                           "of": f"{train}:12", "similarity": 1.0}  # fmt: skip


def test_the_report_says_which_problem_is_repeated(train: Path, tmp_path: Path) -> None:
    output = tmp_path / "clean.jsonl"
    assert run(train, "--drop", "--output", output) == 0
    dropped = json.loads((tmp_path / "clean.jsonl.report.json").read_text())["dropped"]
    assert [(one["line"], one["step"], one["of"]) for one in dropped] == [
        (3, "repeated_solutions", f"{train}:1"),
        (4, "repeated_solutions", f"{train}:1"),
        (5, "repeated_solutions", f"{train}:2"),
        (10, "repeated_problems", f"{train}:9"),
        (11, "repeated_problems", f"{train}:9"),
    ]


def test_check_exits_with_1_if_anything_was_found(train: Path, tmp_path: Path) -> None:
    assert run(train) == 0
    assert run(train, "--check") == 1
    assert run(write(tmp_path / "clean.jsonl", [row("p", "a b c"), row("p", "d e f")]), "--check") == 0
    conflict = write(tmp_path / "conflict.jsonl", [row("p", "a b c"), row("p", "a b c", False)])
    assert run(conflict, "--check") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["FILE", "--drop"], "--drop and --output FILE go together"),
        (["FILE", "--output", "x.jsonl"], "--drop and --output FILE go together"),
        (["FILE", "--drop", "--output", "FILE", "--force"], "is the input"),
        (["FILE", "--drop", "--output", "link.jsonl", "--force"], "is the input"),
        (["FILE", "--drop", "--output", "other.jsonl", "--force", "--against", "other.jsonl"], "is the input"),
        (["FILE", "--drop", "--output", "other.jsonl", "--force", "--split", "other.jsonl"], "is the input"),
        (["FILE", "--drop", "--output", "set/evaluation.jsonl", "--force", "--against", "set"], "is the input"),
        (["FILE", "--drop", "--output", "x", "--against", "x.report.json"], "x.report.json: is the input"),
        (["FILE", "--drop", "--output", "FOLDER"], "is a folder"),
        (["FILE", "--drop", "--output", "other.jsonl"], "is there already"),
        (["FILE", "--drop", "--output", "other.jsonl/x.jsonl"], "its folder is a file"),
        (["FILE", "--drop", "--output", "/proc/wmtp/x.jsonl"], "cannot be written: No such file or directory"),
        (["FILE", "--drop", "--output", "n" * 240 + ".jsonl"], "cannot be written: File name too long"),
        (["FILE", "--drop", "--output", "pipe", "--force"], "is a device or a pipe"),
        (["none.jsonl"], "none.jsonl: no such data file"),
        (["FILE", "--split", "FILE"], "is the data file itself"),
        (["FILE", "--against", "FILE"], "is the data file itself"),
        (["FILE", "--threshold", "0.1"], "--threshold"),
        (["FILE", "--threshold", "nan"], "nan is not a number"),
        (["FILE", "--overlap", "nan"], "nan is not a number"),
    ],
)
def test_errors_are_one_message_before_any_work(
    train: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    for name in ("other.jsonl", "set/evaluation.jsonl", "x.report.json"):
        write(tmp_path / name, [row("e", "x")])
    (tmp_path / "link.jsonl").symlink_to(train)
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    assert run(*(str(train) if a == "FILE" else str(tmp_path) if a == "FOLDER" else a for a in args)) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, "of 11 rows" in err) == ("", False)
    assert names(tmp_path) == before


def test_nothing_is_written_where_no_row_would_be_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "rows.jsonl", [row("p", "a b"), row("p", "a b", False)])
    assert run(source, "--drop", "--output", tmp_path / "out.jsonl", "--conflicts", "drop") == 2
    assert "no row would be left" in capsys.readouterr().err
    assert names(tmp_path) == {"rows.jsonl"}


def _no_room_for_files() -> Callable[[], None]:
    """Files end at 2,000 bytes: the rows that stay are more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_may_not_grow(train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = _no_room_for_files()
    try:
        code = run(train, "--drop", "--output", tmp_path / "out.jsonl")
    finally:
        again()
    assert code == 1
    assert f"error: {tmp_path}/out.jsonl: writing failed: File too large; it was not written" in capsys.readouterr().err
    assert names(tmp_path) == {"rows.jsonl"}
    assert run(train, "--drop", "--output", tmp_path / "out.jsonl") == 0


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_full_disk(
    train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], which: int
) -> None:
    """At the report, at its folder, at the rows: what was there before stays, and nothing is taken for done."""
    output = tmp_path / "out.jsonl"
    output.write_text("before")
    calls = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == which:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    assert run(train, "--drop", "--output", output, "--force") == 1
    assert "writing failed: No space left on device" in capsys.readouterr().err
    assert output.read_text() == "before"
    assert names(tmp_path) - {"out.jsonl.report.json"} == {"rows.jsonl", "out.jsonl"}
    if (tmp_path / "out.jsonl.report.json").exists():
        told = json.loads((tmp_path / "out.jsonl.report.json").read_text())
        assert told["sha256"] != hashlib.sha256(output.read_bytes()).hexdigest()


def test_what_a_kill_has_left_is_replaced(train: Path, tmp_path: Path) -> None:
    for name in (".partial-out.jsonl", ".partial-out.jsonl.report.json"):
        (tmp_path / name).write_text("half a li")
    assert run(train, "--drop", "--output", tmp_path / "out.jsonl") == 0
    assert names(tmp_path) == {"rows.jsonl", "out.jsonl", "out.jsonl.report.json"}
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 6


def test_a_data_file_that_is_replaced_meanwhile(train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compared is what is written."""
    lines = train.read_text().splitlines(keepends=True)
    from wmtp_ds.data import duplicates_files

    genuine = duplicates_files.write_kept

    def late(*args: object) -> None:
        os.replace(write(tmp_path / "new.jsonl", [row("n", "new")] * 20), train)
        genuine(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(duplicates_files, "write_kept", late)
    assert run(train, "--drop", "--output", tmp_path / "out.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_text() == "".join(lines[i] for i in (0, 1, 5, 6, 7, 8))
