"""Files that are whole under their names, and on the disk when they are said to be."""

import errno
import fcntl
import hashlib
import os
from pathlib import Path

import pytest

from wmtp_ds.checkpoint_files import step_name, step_of
from wmtp_ds.files import nearest_folder, replace_file, sha256_of, try_lock, write_atomically


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced and renamed, by name, in order."""
    seen: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        seen.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        seen.append(f"{self.name} -> {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    return seen


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path: Path, order: list[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "partial").write_text("all of it")
    replace_file(folder / "partial", folder / "final")
    assert order == ["sync partial", "partial -> final", "sync run"]
    assert (folder / "final").read_text() == "all of it"


def test_a_text_takes_the_place_of_the_old_one(tmp_path: Path, order: list[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for text in ("old", "größer"):
        write_atomically(folder / "state.json", text)
        assert (folder / "state.json").read_bytes() == text.encode("utf-8")
    assert [path.name for path in folder.iterdir()] == ["state.json"]
    assert order[3:] == ["sync .state.json.tmp", ".state.json.tmp -> state.json", "sync run"]


def test_the_old_text_stays_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.json"
    write_atomically(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"


def test_checksum(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_nearest_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nearest_folder(tmp_path) == tmp_path
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert nearest_folder(Path("not there/nor this")) == tmp_path


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step_00000012", 12),
        ("step_123456789", 123456789),
        ("step_", None),
        ("step_00000012.bak", None),
        ("step_-1", None),
        ("00000012", None),
        ("final", None),
    ],
)
def test_step_of_a_name(name: str, step: int | None) -> None:
    assert step_of(name) == step


def test_names_of_steps_sort_as_steps_do() -> None:
    names = [step_name(step) for step in (0, 9, 10, 99_999_999)]
    assert names == sorted(names)
    assert [step_of(name) for name in names] == [0, 9, 10, 99_999_999]


def test_a_lock_is_held_until_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as first, path.open("w") as second:
        assert try_lock(first)
        assert not try_lock(second)
        first.close()
        assert try_lock(second)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EBADF])
def test_without_locks_nobody_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Lustre mounted without flock knows no such call; NFS wants a file that is open for writing."""

    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (tmp_path / "lock").open("w") as file:
        assert try_lock(file)
