"""A run's folder: one process at a time, nothing overwritten, and what may be resumed from."""

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from wmtp_ds.checkpoint import Checkpoints
from wmtp_ds.checkpoint_files import MANIFEST, write_manifest
from wmtp_ds.errors import UserError
from wmtp_ds.run_folder import RunFolder, is_main_process
from wmtp_ds.run_summary import read_summary, write_summary

HOLD = """
import sys
from pathlib import Path
from wmtp_ds.errors import UserError
from wmtp_ds.run_folder import RunFolder

folder = RunFolder(Path(sys.argv[1]), "never")
try:
    folder.lock()
except UserError as error:
    print(error)
    sys.exit(error.exit_code)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder, not made yet."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "checkpoints" / "run"


def add_checkpoint(root: Path, step: int) -> Path:
    folder = root / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "model.pt").write_bytes(b"weights" * step)
    write_manifest(folder, step=step, world_size=1)
    (root / "latest").write_text(f"{folder.name}\n")
    return folder


def write_run(root: Path, *steps: int) -> Path:
    """What an earlier run has left."""
    (root / "checkpoint_best").mkdir(parents=True)
    (root / "checkpoint_best" / "model.safetensors").write_bytes(b"best")
    for name in ("config.toml", "metrics.jsonl", ".tracking.lock"):
        (root / name).write_text(f"{name} of {root.name}")
    for step in steps:
        add_checkpoint(root, step)
    return root


def contents(folder: Path) -> dict[str, str]:
    """Every file with its checksum, but the lock."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def prepare(root: Path, resume: str) -> list[str]:
    """What rank 0 does before it reads a checkpoint; what it says."""
    folder = RunFolder(root, resume)
    folder.lock()
    said: list[str] = []
    folder.prepare(said.append)
    folder.close()
    return said


# --- one process at a time ---


def hold(root: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_another_process_is_kept_out_until_the_first_ends(root):
    process = hold(root)
    try:
        with pytest.raises(UserError, match=rf"another run is training in {root}\. .*--override checkpoint\.save_dir"):
            RunFolder(root, "never").lock()
        RunFolder(root.with_name("other"), "never").lock()
        process.send_signal(signal.SIGKILL)  # even this gives the lock back
        process.wait(10)
        folder = RunFolder(root, "never")
        folder.lock()
    finally:
        process.kill()
        process.communicate()
    # And the other way round.
    done = subprocess.run([sys.executable, "-c", HOLD, str(root)], input="", capture_output=True, text=True)
    assert (done.returncode, "another run is training" in done.stdout) == (2, True)
    folder.close()


def test_a_file_system_without_locks_keeps_nobody_from_training(root, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder = RunFolder(root, "never")
    folder.lock()
    folder.check_shared(60)


def test_a_lock_is_held_from_within_one_process_too(root):
    first = RunFolder(root, "never")
    first.lock()
    with pytest.raises(UserError, match="another run"):
        RunFolder(root, "never").lock()
    first.close()
    first.close()  # twice does no harm
    RunFolder(root, "never").lock()


def test_a_folder_that_cannot_be_made(root):
    root.parent.mkdir()
    root.write_text("a file")
    with pytest.raises(UserError, match=rf"checkpoint\.save_dir: cannot write to {root}"):
        RunFolder(root, "never").lock()
    with pytest.raises(UserError, match=r"checkpoint\.save_dir: cannot write to .*/below"):
        RunFolder(root / "below", "never").lock()


# --- an earlier run ---


def test_an_earlier_run_is_moved_aside_whole(root):
    before = contents(write_run(root, 10, 20))
    (said,) = prepare(root, "never")
    aside = root.with_name("run.1")
    assert contents(aside) == before
    assert contents(root) == {}
    assert Checkpoints(aside).newest(pytest.fail) == aside / "step_00000020"
    assert f"the earlier run in {root} was moved to {aside}." in said
    assert f"--resume {aside}" in said, "it was not finished"


def test_every_earlier_run_is_kept(root):
    kept = []
    for number in range(3):
        write_run(root, number + 1)
        (root / "run.json").write_text(json.dumps({"completed": True, "number": number}))
        kept.append(contents(root))
        (said,) = prepare(root, "never")
        assert "--resume" not in said, "it was finished"
    assert [contents(root.with_name(f"run.{number}")) for number in (1, 2, 3)] == kept


def test_an_empty_folder_needs_no_moving(root):
    for _ in range(2):
        assert prepare(root, "never") == []
        assert prepare(root, "auto") == []
    assert [path.name for path in root.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("resume", ["auto", "{root}", "{root}/step_00000010", "../checkpoints/run"])
def test_a_run_that_goes_on_here_keeps_its_files(root, resume):
    before = contents(write_run(root, 10, 20))
    assert prepare(root, resume.format(root=root)) == []
    assert contents(root) == before
    assert [path.name for path in root.parent.iterdir()] == ["run"]


def test_auto_without_a_checkpoint_starts_anew_and_overwrites_nothing(root):
    """A run that was killed before its first checkpoint: its best export must not be mixed with the next one's."""
    before = contents(write_run(root))
    (said,) = prepare(root, "auto")
    assert contents(root.with_name("run.1")) == before
    assert contents(root) == {}
    assert "--resume" not in said


def test_resuming_from_another_folder_moves_the_run_here_aside(root):
    before = contents(write_run(root, 10))
    other = write_run(root.with_name("other"), 30)
    prepare(root, str(other / "step_00000030"))
    assert contents(root) == {}
    assert contents(root.with_name("run.1")) == before
    assert (other / "step_00000030" / MANIFEST).exists()


def test_a_similar_name_is_another_folder(root):
    write_run(root, 10)
    other = write_run(root.with_name("run-2"), 30)
    prepare(root, str(other))
    assert contents(root) == {}


def test_a_folder_that_is_no_run_is_left_alone(root):
    (root / "thesis").mkdir(parents=True)
    (root / "thesis" / "text.md").write_text("years of work")
    for resume in ("never", "auto"):
        with pytest.raises(UserError, match=rf"checkpoint\.save_dir: {root} holds other files, but no run"):
            RunFolder(root, resume)
    assert [path.name for path in root.iterdir()] == ["thesis"]


def test_hidden_files_make_a_folder_no_less_empty(root):
    root.mkdir(parents=True)
    (root / ".gitkeep").write_text("")
    RunFolder(root, "never").lock()


@pytest.mark.parametrize("name", [".", "..", "{cwd}", "../here/../../."])
def test_the_current_directory_is_never_moved(root, name):
    (Path.cwd() / "config.toml").write_text("a run's sign")
    with pytest.raises(UserError, match=r"checkpoint\.save_dir: .* holds the current directory"):
        RunFolder(Path(name.format(cwd=Path.cwd())), "never")


# --- what to resume from ---


def source(root: Path, resume: str) -> tuple[Path | None, list[str]]:
    warnings: list[str] = []
    return RunFolder(root, resume).source(Checkpoints(root), warnings.append), warnings


def test_never_and_auto(root):
    assert source(root, "auto") == (None, [])
    write_run(root, 10, 20)
    assert source(root, "never") == (None, [])
    assert source(root, "auto") == (root / "step_00000020", [])


def test_auto_skips_what_is_damaged_and_never_starts_anew_in_silence(root):
    write_run(root, 10, 20)
    os.truncate(root / "step_00000020" / "model.pt", 5)
    found, (warning,) = source(root, "auto")
    assert found == root / "step_00000010"
    assert "step_00000020 is damaged (model.pt has 5 bytes instead of 140)" in warning
    os.truncate(root / "step_00000010" / "model.pt", 5)
    with pytest.raises(UserError, match=rf"--resume auto: every checkpoint in {root} is damaged\. .*--resume never"):
        source(root, "auto")


def test_a_path(root):
    other = write_run(root.with_name("other"), 30, 40)
    assert source(root, str(other / "step_00000030")) == (other / "step_00000030", [])
    assert source(root, f"{other}/step_00000030/")[0] == other / "step_00000030"
    assert source(root, str(other)) == (other / "step_00000040", [])
    os.truncate(other / "step_00000040" / "model.pt", 5)
    found, warnings = source(root, str(other))
    assert (found, len(warnings)) == (other / "step_00000030", 1)
    with pytest.raises(UserError, match=r"--resume .*step_00000040: the checkpoint is damaged: model\.pt has 5 bytes"):
        source(root, str(other / "step_00000040"))
    os.truncate(other / "step_00000030" / "model.pt", 5)
    with pytest.raises(UserError, match=r"--resume .*other: none of its checkpoints is sound"):
        source(root, str(other))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "there is no such folder. Give a checkpoint"),
        ("step_00000099", "there is no such folder. Give a checkpoint"),
        ("latest", "is a file, not a folder"),
        ("checkpoint_best", "neither a checkpoint nor a run's folder"),
        ("empty", "neither a checkpoint nor a run's folder"),
    ],
)
def test_a_path_that_is_no_checkpoint_is_said_before_training_starts(root, name, message):
    other = write_run(root.with_name("other"), 30)
    (other / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        RunFolder(root, str(other / name))
    assert f"--resume {other / name}" in str(caught.value)
    assert message in str(caught.value)
    assert not root.exists()


def test_a_checkpoint_without_manifest_is_damaged(root):
    folder = add_checkpoint(root.with_name("other"), 5)
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is complete \(step_00000005 has no manifest\.json\)"):
        source(root, str(folder))


# --- run.json ---


def test_summary(root):
    root.mkdir(parents=True)
    assert read_summary(root) == {}
    write_summary(root, completed=True, steps=40)
    write_summary(root, pipeline="x", steps=41)
    assert read_summary(root) == {"completed": True, "steps": 41, "pipeline": "x"}
    assert json.loads((root / "run.json").read_text()) == read_summary(root)
    assert [path.name for path in root.iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "7"])
def test_a_damaged_summary_is_an_empty_one(root, text):
    root.mkdir(parents=True)
    (root / "run.json").write_text(text)
    assert read_summary(root) == {}
    write_summary(root, steps=1)
    assert read_summary(root) == {"steps": 1}


@pytest.mark.parametrize(("rank", "expected"), [(None, True), ("0", True), ("1", False), ("10", False)])
def test_is_main_process(monkeypatch, rank, expected):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_main_process() == expected
