"""``wmtp-ds data sample``: what it writes, that every label is earned, and that it is reproducible."""

import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wmtp_ds.cli.main import main
from wmtp_ds.data.dataset_files import finished
from wmtp_ds.data.labelled_rows import Report
from wmtp_ds.data.labels import FunctionTests, Group, label_groups
from wmtp_ds.data.mutate import normalise
from wmtp_ds.data.rows import parse_row
from wmtp_ds.data.sample import make_sample
from wmtp_ds.errors import RunError, UserError

FILES = ("train.jsonl", "validation.jsonl")


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


COMMAND = ["data", "sample", "--problems", "22", "--seed", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """What the command made, and what it said on standard output and standard error."""
    output = tmp_path_factory.mktemp("data") / "sample"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main([*COMMAND, "--output", str(output), "--json"])
    assert end.value.code == 0
    return output, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def sample(made: tuple[Path, str, str]) -> Path:
    return made[0]


@pytest.fixture
def again(sample: Path, tmp_path: Path) -> Path:
    """A copy."""
    return Path(shutil.copytree(sample, tmp_path / "sample"))


@pytest.fixture(scope="module")
def rows(sample: Path) -> list[dict[str, Any]]:
    return [row for name in FILES for row in _rows(sample / name)]


def test_rows_have_the_schema(sample: Path, rows: list[dict[str, Any]]) -> None:
    for name in FILES:
        for number, line in enumerate((sample / name).read_bytes().splitlines(), 1):
            parse_row(line, name, number)
    for row in rows:
        assert 1 <= row["difficulty"] <= 11
        assert row["input"].endswith(row["metadata"]["tests"][0])
        assert row["metadata"]["tests"][1] not in row["instruction"] + row["input"]
        assert row["is_correct"] is (row["metadata"]["verdict"] == "passed")
        assert row["is_correct"] is (row["metadata"]["mutation"] is None)
        assert bool(row["metadata"]["evidence"]) is not row["is_correct"]


def test_labels_are_earned(rows: list[dict[str, Any]]) -> None:
    """Running the rows again gives the labels and the evidence that they carry."""
    by_problem: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_problem.setdefault(row["problem_id"], []).append(row)
    groups = [
        Group(tuple(row["output"] for row in found), FunctionTests(tuple(found[0]["metadata"]["tests"])))
        for found in by_problem.values()
    ]
    for found, labels in zip(by_problem.values(), label_groups(groups, groups_per_sandbox=10), strict=True):
        for row, one in zip(found, labels, strict=True):
            assert one.is_correct is row["is_correct"]
            assert one.evidence == row["metadata"]["evidence"]


def test_correct_and_incorrect_rows_balance_in_every_problem(rows: list[dict[str, Any]]) -> None:
    problems = {row["problem_id"] for row in rows}
    assert len(problems) == 22
    correct = sum(row["is_correct"] for row in rows)
    assert correct == 3 * 22
    assert 0.85 * correct <= len(rows) - correct <= correct
    assert len({(row["problem_id"], row["output"]) for row in rows}) == len(rows)


def test_formatting_does_not_tell_them_apart(rows: list[dict[str, Any]]) -> None:
    assert all(normalise(row["output"]) == row["output"] for row in rows)


def test_the_split_is_by_problem(sample: Path) -> None:
    train, validation = (_rows(sample / name) for name in FILES)
    assert {row["difficulty"] for row in validation} == set(range(1, 12))
    for key in ("problem_id", "instruction"):
        assert not {row[key] for row in train} & {row[key] for row in validation}


def test_what_is_there_is_reused(again: Path) -> None:
    written = {entry.name: entry.stat().st_mtime_ns for entry in again.iterdir()}
    assert make_sample(again, problems=22, seed=2)["reused"]
    assert {entry.name: entry.stat().st_mtime_ns for entry in again.iterdir()} == written
    made_from = json.loads((again / "manifest.json").read_text())["made_from"]
    assert finished(again, made_from) is not None
    assert finished(again, {**made_from, "seed": 3}) is None
    assert finished(again, {**made_from, "code": "other"}) is None
    (again / "manifest.json").write_text("{")
    assert finished(again, made_from) is None


def test_what_has_changed_is_made_again_and_the_same_seed_gives_the_same_bytes(sample: Path, again: Path) -> None:
    (again / "train.jsonl").write_bytes((again / "train.jsonl").read_bytes()[:-1])
    assert not make_sample(again, problems=22, seed=2)["reused"]
    for name in (*FILES, "manifest.json"):
        assert (again / name).read_bytes() == (sample / name).read_bytes()
    assert {path.name for path in again.iterdir()} == {*FILES, "manifest.json"}


def test_a_full_disk_leaves_what_was_there(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in again.iterdir()}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("wmtp_ds.data.sample.labelled_rows", lambda sources, **_: ([[] for _ in sources], Report()))
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="the disk is full; nothing there counts as finished: free space"):
        make_sample(again, problems=22)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == before
    assert [path.name for path in again.parent.iterdir()] == ["sample"]


def test_other_data_in_the_folder_stays(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "imported"
    shutil.copytree(sample, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["made_from"] = {"command": "data import mbpp"}
    (other / "manifest.json").write_text(json.dumps(manifest))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "train.jsonl").write_text("mine")
    extended = tmp_path / "extended"
    shutil.copytree(sample, extended)
    (extended / "notes.txt").write_text("mine")
    for folder, message in (
        (other, "holds data of another command (data import mbpp)"),
        (mine, "has files in it that no import made"),
        (extended, "notes.txt in it is no file of the import"),
    ):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(SystemExit) as end:
            main(["data", "sample", "--output", str(folder), "--problems", "22"])
        assert end.value.code == 2
        assert message in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_too_few_problems_and_a_bad_output_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--problems 21: at least 22"):
        make_sample(tmp_path, problems=21)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is not a folder"):
        make_sample(tmp_path / "file", problems=22)
    assert (tmp_path / "file").read_text() == "x"


def test_a_solution_that_fails_is_an_error_of_the_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wmtp_ds.data import problems

    genuine = problems._evaluate
    monkeypatch.setattr("wmtp_ds.data.sample.SOLUTIONS", 1)
    monkeypatch.setattr(
        "wmtp_ds.data.problems._evaluate", lambda steps, arguments: [genuine(steps, arguments)] if steps else None
    )
    with pytest.raises(RunError, match="a generated solution failed its own tests"):
        make_sample(tmp_path, problems=22)
    assert list(tmp_path.iterdir()) == []


def test_the_command(made: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    output, out, err = made
    summary = json.loads(out)
    assert "22 of 22 problems" in err
    assert summary["train"]["rows"] == len(_rows(output / "train.jsonl"))
    assert summary["train"]["problems"] + summary["validation"]["problems"] == 22
    assert summary["references"] == 66
    run = summary["mutants"]
    assert run == summary["mutants_failed"] + summary["mutants_survived_and_dropped"]
    assert run == sum(summary["mutant_verdicts"].values())
    kept = summary["mutants_failed"] - summary["mutants_failed_but_not_needed"]
    assert kept == summary["train"]["incorrect"] + summary["validation"]["incorrect"]

    with pytest.raises(SystemExit) as end:
        main([*COMMAND, "--output", str(output)])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "holds this data already" in out
    assert "references: 66 of 66 pass their tests" in out


def test_the_command_refuses_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["data", "sample", "--problems", "3"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: --problems 3: at least 22 are needed")


@pytest.mark.parametrize("command", [[], ["sample"], ["import"], ["import", "mbpp"]])
def test_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["data", *command, "--help"])
    assert end.value.code == 0
    assert "Example: wmtp-ds data" in capsys.readouterr().out


def test_no_torch_is_needed() -> None:
    code = (
        "import sys, wmtp_ds.cli.data, wmtp_ds.data.sample, wmtp_ds.data.mbpp\n"
        "print({'torch', 'transformers', 'numpy', 'deepspeed', 'mlflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
