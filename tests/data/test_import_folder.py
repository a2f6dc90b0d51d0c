"""The folder of an import while it is written: full disks, interruptions, and what may be replaced."""

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_ds.data import import_folder
from wmtp_ds.data.dataset_files import finished
from wmtp_ds.data.import_folder import ImportFolder, finished_import
from wmtp_ds.errors import RunError, UserError

MADE_FROM = {"command": "data import test", "source": "abc", "option": 1}


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "problem_id": str(number),
        "instruction": "Add.",
        "output": f"x = {number}",
        "is_correct": number % 3 > 0,
        "difficulty": 1 + number % 11,
        **changes,
    }


def write(folder: ImportFolder, numbers: range) -> None:
    for number in numbers:
        split = "validation" if number % 4 == 3 else "train"
        folder.add_problem(split, {"problem_id": str(number)})
        folder.add_row(split, row(number))
        folder.note(str(number).encode())
        if number % 5 == 0:
            folder.skip("fives", f"number {number}")


def whole(output: Path, count: int = 20) -> dict[str, Any]:
    with ImportFolder(output, MADE_FROM) as folder:
        write(folder, range(count))
        return folder.publish({"skipped": folder.skipped})


def interrupted(output: Path, ending: BaseException, committed: int, more: int) -> None:
    """Write and commit some, write more, and fail."""
    with ImportFolder(output, MADE_FROM) as folder:
        write(folder, range(committed))
        if committed:
            folder.commit({"at": committed})
        write(folder, range(committed, min(20, committed + more)))
        raise ending


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def test_the_folder_and_its_manifest(tmp_path: Path) -> None:
    summary = whole(tmp_path / "a" / "out")
    rows = {
        name: [json.loads(line) for line in (tmp_path / "a" / "out" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation", "problems")
    }
    assert [found["problem_id"] for found in rows["problems"]] == [str(n) for n in range(20)]
    assert rows["validation"] == [row(n) for n in (3, 7, 11, 15, 19)]
    assert list(summary) == ["train", "validation", "skipped", "reused"]
    assert summary["train"] == {
        "rows": 15,
        "problems": 15,
        "correct": sum(found["is_correct"] for found in rows["train"]),
        "incorrect": sum(not found["is_correct"] for found in rows["train"]),
        "by_difficulty": {
            str(d): n for d in range(1, 12) if (n := sum(found["difficulty"] == d for found in rows["train"]))
        },
    }
    assert list(summary["train"]["by_difficulty"]) == sorted(summary["train"]["by_difficulty"], key=int)
    assert summary["skipped"] == {"fives": {"count": 4, "first": [f"number {n}" for n in (0, 5, 10, 15)]}}
    assert {entry.name for entry in (tmp_path / "a").iterdir()} == {"out"}
    assert {entry.name for entry in (tmp_path / "a" / "out").iterdir()} == {
        "train.jsonl",
        "validation.jsonl",
        "problems.jsonl",
        "manifest.json",
    }
    assert finished(tmp_path / "a" / "out", MADE_FROM) is not None


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 19), st.integers(0, 6), st.sampled_from([KeyboardInterrupt, RunError, MemoryError]))
def test_wherever_it_is_interrupted_the_result_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, committed: int, more: int, ending: type[BaseException]
) -> None:
    root = tmp_path_factory.mktemp("folder")
    whole(root / "whole")
    with pytest.raises(ending):
        interrupted(root / "out", ending("enough"), committed, more)
    assert not (root / "out").exists()
    with ImportFolder(root / "out", MADE_FROM) as folder:
        assert folder.state == {"at": committed}
        assert list(folder.notes()) == [str(n).encode() for n in range(committed)]
        write(folder, range(committed, 20))
        folder.publish({"skipped": folder.skipped})
    assert contents(root / "out") == contents(root / "whole")


def test_an_error_of_the_input_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bad line"):
        interrupted(tmp_path / "out", UserError("bad line"), 3, 2)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_before_the_first_commit_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out", KeyboardInterrupt(), 0, 3)
    assert list(tmp_path.iterdir()) == []


def test_only_so_many_skips_are_named(tmp_path: Path) -> None:
    with ImportFolder(tmp_path / "out", MADE_FROM) as folder:
        for number in range(250):
            folder.skip("odd", f"line {number}")
        folder.skip("even", count=7)
        folder.add_row("train", row(1))
        folder.publish({})
    assert folder.skipped["odd"]["count"] == 250
    assert folder.skipped["odd"]["first"] == [f"line {n}" for n in range(100)]
    assert folder.skipped["even"] == {"count": 7, "first": []}


# --- a full disk ---


class FullDisk(io.RawIOBase):
    """A file on a disk that has no room."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("committed", [False, True])
def test_a_full_disk_while_rows_are_written(committed: bool, tmp_path: Path) -> None:
    whole(tmp_path / "whole")

    def fill() -> None:
        with ImportFolder(tmp_path / "out", MADE_FROM) as folder:
            write(folder, range(7))
            if committed:
                folder.commit({"at": 7})
            folder._files["train.jsonl"] = io.BufferedWriter(FullDisk())
            for _ in range(1000):
                folder.add_row("train", row(1))

    with pytest.raises(RunError, match="the disk is full") as error:
        fill()
    assert str(error.value).startswith(
        f"{tmp_path / 'out'}: writing failed: the disk is full; nothing there counts as finished: free space, and run "
        "the same command again"
    )
    assert error.value.exit_code == 1
    assert ("the work so far is kept in" in str(error.value)) is committed
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".partial-out").exists() is committed
    with ImportFolder(tmp_path / "out", MADE_FROM) as folder:
        write(folder, range(7 if committed else 0, 20))
        folder.publish({"skipped": folder.skipped})
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _fails_at(call: int) -> Callable[[int], None]:
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fsync


def test_a_full_disk_at_any_step_of_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever call finds the disk full, there is either nothing or the finished folder, and a rerun mends it."""
    whole(tmp_path / "whole")
    wanted = contents(tmp_path / "whole")
    failures = 0
    for call in range(1, 40):
        out = tmp_path / f"out-{call}"
        with monkeypatch.context() as patched:
            patched.setattr(import_folder.os, "fsync", _fails_at(call))
            try:
                with ImportFolder(out, MADE_FROM) as folder:
                    write(folder, range(8))
                    folder.commit({"at": 8})
                    write(folder, range(8, 20))
                    folder.publish({"skipped": folder.skipped})
            except RunError as error:
                failures += "the disk is full" in str(error)
        if finished_import(out, MADE_FROM, force=False) is None:
            assert not out.exists()
            with ImportFolder(out, MADE_FROM) as folder:
                write(folder, range((folder.state or {"at": 0})["at"], 20))
                folder.publish({"skipped": folder.skipped})
        found = {name: data for name, data in contents(out).items() if not name.startswith(".")}
        assert found == wanted, call
    assert failures >= 10
    assert list(tmp_path.glob(".partial-*")) == []


# --- what is there already ---


def test_only_an_imports_own_files_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole(out)
    other = {**MADE_FROM, "option": 2}
    with pytest.raises(UserError, match=r"made with other options \(option was 1, not 2\)"):
        finished_import(out, other, force=False)
    assert finished_import(out, other, force=True) is None
    (out / "labelled.jsonl").write_text("hours of work")
    with pytest.raises(UserError, match=r"labelled\.jsonl in it is no file of the import"):
        finished_import(out, other, force=True)
    assert finished_import(out, MADE_FROM, force=False) is not None


def test_files_changed_since_are_not_taken_for_the_import(tmp_path: Path) -> None:
    whole(tmp_path / "out")
    (tmp_path / "out" / "train.jsonl").write_text("")
    with pytest.raises(UserError, match="its files have changed since"):
        finished_import(tmp_path / "out", MADE_FROM, force=False)
    assert finished_import(tmp_path / "out", MADE_FROM, force=True) is None


def test_another_version_of_the_code_makes_it_again(tmp_path: Path) -> None:
    made_from = {**MADE_FROM, "code": "new"}
    with ImportFolder(tmp_path / "out", {**MADE_FROM, "code": "old"}) as folder:
        write(folder, range(3))
        folder.publish({})
    assert finished_import(tmp_path / "out", made_from, force=False) is None
    with pytest.raises(UserError, match="option was 1, not 3"):
        finished_import(tmp_path / "out", {**made_from, "option": 3}, force=False)


def test_another_command_is_named(tmp_path: Path) -> None:
    whole(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds data of another command \(data import test\)"):
        finished_import(tmp_path / "out", {**MADE_FROM, "command": "data import other"}, force=False)


@pytest.mark.parametrize("force", [False, True])
def test_folders_of_others_are_never_replaced(force: bool, tmp_path: Path) -> None:
    for number, manifest in enumerate(["", "{", "[]", '{"made_from": {}}']):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "thesis.tex").write_text("years of work")
        if manifest:
            (folder / "manifest.json").write_text(manifest)
        with pytest.raises(UserError, match="has files in it that no import made"):
            finished_import(folder, MADE_FROM, force=force)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        finished_import(file, MADE_FROM, force=force)
    (tmp_path / "empty").mkdir()
    assert finished_import(tmp_path / "empty", MADE_FROM, force=force) is None
    assert finished_import(tmp_path / "none", MADE_FROM, force=force) is None


def test_a_symbolic_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk" / "data").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "data")
    whole(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "data" / "manifest.json").is_file()


def test_a_place_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be made: Not a directory"),
        ImportFolder(tmp_path / "file" / "out", MADE_FROM),
    ):
        pytest.fail("it was entered")
