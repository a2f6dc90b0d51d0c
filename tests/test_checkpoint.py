"""Checkpoints: what is written, what a crash at any moment leaves, and what is found out about damage."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wmtp_ds import checkpoint, checkpoint_files, distributed
from wmtp_ds.checkpoint import Checkpoints
from wmtp_ds.checkpoint_files import (
    MANIFEST,
    read_manifest,
    replace_folder,
    verify_manifest,
    write_manifest,
)
from wmtp_ds.errors import RunError, UserError


class FakeEngine:
    """Writes two files for an engine's shards, and gives its state back."""

    def __init__(self, error: Exception | None = None):
        self.error = error
        self.calls: list[dict[str, Any]] = []

    def save_state(self, folder: Path, tag: str, state: dict[str, Any], *, exclude_frozen: bool) -> None:
        self.calls.append({"tag": tag, "exclude_frozen": exclude_frozen})
        inner = folder / tag / "shards"
        inner.mkdir()
        (inner / "rank_0.pt").write_bytes(json.dumps(state).encode() * 50)
        if self.error is not None:
            raise self.error
        (folder / tag / "model.pt").write_bytes(b"weights" * 100)

    def load_state(self, folder: Path, tag: str, *, strict: bool) -> dict[str, Any]:
        self.calls.append({"tag": tag, "strict": strict})
        state: dict[str, Any] = json.loads((folder / tag / "shards" / "rank_0.pt").read_text().split("}")[0] + "}")
        return state


def save(checkpoints: Checkpoints, step: int, engine: FakeEngine | None = None) -> Path:
    return checkpoints.save(engine or FakeEngine(), step, {"step": step}, {"config.toml": f"# {step}\n"}, 8)  # type: ignore[arg-type]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def newest(checkpoints: Checkpoints) -> str | None:
    """The newest sound checkpoint's name; warnings are not looked at."""
    found = checkpoints.newest(lambda _: None)
    return None if found is None else found.name


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def saved(root: Path) -> Path:
    return save(Checkpoints(root), 500)


# --- what is written ---


def test_what_a_checkpoint_holds(root, saved):
    assert saved == root / "step_00000500"
    assert names(root) == ["latest", "step_00000500"]
    assert (root / "latest").read_text() == "step_00000500\n"
    assert names(saved) == ["config.toml", MANIFEST, "model.pt", "shards"]
    assert (saved / "config.toml").read_text() == "# 500\n"


def test_the_manifest_lists_every_file_with_size_and_checksum(saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    expected = {}
    for folder, _, files in os.walk(saved):
        for name in files:
            data = Path(folder, name).read_bytes()
            relative = os.path.relpath(Path(folder, name), saved)
            expected[relative] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del expected[MANIFEST]
    own = {"step": 500, "world_size": 1, "global_batch": 8, "files": expected}
    assert {name: manifest[name] for name in own} == own
    assert set(manifest) == {*own, "saved", "checksum"}
    assert abs(datetime.fromisoformat(manifest["saved"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert "shards/rank_0.pt" in expected
    assert read_manifest(saved) == manifest
    assert verify_manifest(saved) is None


def test_frozen_parameters_stay_out_where_asked(root):
    engine = FakeEngine()
    save(Checkpoints(root, exclude_frozen=True), 1, engine)
    save(Checkpoints(root), 2, engine)
    assert [call["exclude_frozen"] for call in engine.calls] == [True, False]


def test_restore(root, saved):
    engine = FakeEngine()
    assert Checkpoints(root).restore(engine, saved, pytest.fail) == {"step": 500}  # type: ignore[arg-type]
    Checkpoints(root, exclude_frozen=True).restore(engine, saved, pytest.fail)  # type: ignore[arg-type]
    assert engine.calls == [{"tag": "step_00000500", "strict": True}, {"tag": "step_00000500", "strict": False}]


def test_another_number_of_ranks_gets_a_conversion_and_random_numbers_of_its_own(root, saved, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "on_main", lambda work: work())
    monkeypatch.setattr(checkpoint, "convert", lambda folder: folder.parent / ".universal" / folder.name)
    loaded = []

    class Universal(FakeEngine):
        def load_universal(self, folder: Path, tag: str) -> dict[str, Any]:
            loaded.append((folder, tag))
            return {"step": 500, "random": "of rank 0"}

    said: list[str] = []
    assert Checkpoints(root).restore(Universal(), saved, said.append) == {"step": 500}  # type: ignore[arg-type]
    assert loaded == [(root / ".universal", "step_00000500")]
    assert said == [f"{saved} was made by 1 ranks: converting it for 4"]


def test_saving_a_step_again_replaces_it(root, saved):
    (saved / "model.pt").write_bytes(b"damaged")
    assert verify_manifest(save(Checkpoints(root), 500)) is None
    assert names(root) == ["latest", "step_00000500"]


def test_what_a_killed_save_left_is_cleared_away(root, saved):
    left = root / ".partial-step_00000700"
    (left / "shards").mkdir(parents=True)
    (left / "shards" / "rank_0.pt").write_bytes(b"half")
    save(Checkpoints(root), 600)
    assert names(root) == ["latest", "step_00000500", "step_00000600"]


# --- how many are kept ---


@pytest.mark.parametrize(
    ("limit", "kept"), [(1, [4]), (2, [3, 4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4]), (None, [1, 2, 3, 4])]
)
def test_the_newest_are_kept(root, limit, kept):
    checkpoints = Checkpoints(root, limit=limit)
    for step in (1, 2, 3, 4):
        save(checkpoints, step)
    assert [folder.name for folder in checkpoints.steps()] == [f"step_{step:08d}" for step in kept]


def test_pruning_touches_nothing_but_checkpoints(root):
    checkpoints = Checkpoints(root, limit=1)
    for name in ("checkpoint_best", "step_notes", "step_00000000"):  # none of them has a manifest
        (root / name).mkdir(parents=True)
        (root / name / "file").write_text("mine")
    for step in (1, 2):
        save(checkpoints, step)
    assert names(root) == ["checkpoint_best", "latest", "step_00000000", "step_00000002", "step_notes"]


@pytest.mark.parametrize("limit", [1, 2, None])
def test_a_run_that_went_back_keeps_what_it_saves(root, limit):
    """Steps 100 and 90 lie beyond the one that was resumed from: they are of another course of the run."""
    for step in (80, 90, 100):
        save(Checkpoints(root), step)
    # Resumed from step 80, because the others are damaged or by choice.
    again = Checkpoints(root, limit=limit)
    save(again, 85)
    assert newest(again) == "step_00000085"
    assert verify_manifest(root / "step_00000085") is None
    kept = {1: ["step_00000085"], 2: ["step_00000080", "step_00000085"], None: sorted(p.name for p in again.steps())}
    assert sorted(folder.name for folder in again.steps()) == kept[limit]
    save(again, 90)
    assert newest(again) == "step_00000090"
    assert (root / "step_00000090" / "config.toml").exists()


# --- damage ---


def damaged(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / "shards" / "rank_0.pt")


DAMAGE = {
    "missing": (damaged(Path.unlink), "shards/rank_0.pt is missing"),
    "cut short": (damaged(lambda file: os.truncate(file, 100)), "shards/rank_0.pt has 100 bytes instead of 550"),
    "empty": (damaged(lambda file: os.truncate(file, 0)), "shards/rank_0.pt has 0 bytes instead of 550"),
    "longer": (damaged(lambda file: file.write_bytes(file.read_bytes() + b"x")), "has 551 bytes instead of 550"),
    "a folder": (damaged(lambda file: (file.unlink(), file.mkdir())), "shards/rank_0.pt is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
    "manifest cut short": (lambda folder: os.truncate(folder / MANIFEST, 90), MANIFEST),
    "manifest binary": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), MANIFEST),
    "manifest a list": (lambda folder: (folder / MANIFEST).write_text("[]"), MANIFEST),
    "manifest null": (lambda folder: (folder / MANIFEST).write_text("null"), MANIFEST),
    "manifest without files": (lambda folder: (folder / MANIFEST).write_text('{"world_size": 1}'), MANIFEST),
    "manifest without ranks": (lambda folder: (folder / MANIFEST).write_text('{"files": {}}'), MANIFEST),
    "files a list": (lambda f: (f / MANIFEST).write_text('{"world_size": 1, "files": []}'), MANIFEST),
    "entries without size": (lambda f: (f / MANIFEST).write_text('{"world_size": 1, "files": {"a": {}}}'), MANIFEST),
}


@pytest.mark.parametrize(("damage", "part"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_the_one_before_is_taken(root, damage, part):
    checkpoints = Checkpoints(root)
    for step in (1, 2):
        save(checkpoints, step)
    assert newest(checkpoints) == "step_00000002"
    damage(root / "step_00000002")
    assert part in str(verify_manifest(root / "step_00000002"))
    warnings: list[str] = []
    assert checkpoints.newest(warnings.append) == root / "step_00000001"
    if (root / "step_00000002" / MANIFEST).exists():  # otherwise it never was a checkpoint
        (warning,) = warnings
        assert f"checkpoint {root / 'step_00000002'} is damaged ({verify_manifest(root / 'step_00000002')})" in warning
    damage(root / "step_00000001")
    assert newest(checkpoints) is None


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_is_found(saved, data):
    file = saved / data.draw(st.sampled_from(["config.toml", "model.pt", "shards/rank_0.pt"]))
    whole = file.read_bytes()
    place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
    try:
        assert verify_manifest(saved) == f"{file.relative_to(saved)} has changed: its SHA-256 differs"
    finally:
        file.write_bytes(whole)
    assert verify_manifest(saved) is None


def test_a_file_that_cannot_be_read(saved, monkeypatch):
    def fail(_: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint_files, "sha256_of", fail)
    assert str(verify_manifest(saved)).endswith("cannot be read: Input/output error")


def test_read_manifest_names_the_folder(root):
    with pytest.raises(UserError, match=rf"{root}/step_00000007 is not a complete checkpoint: .*{MANIFEST}"):
        read_manifest(root / "step_00000007")


def test_nothing_to_resume_from(root):
    assert newest(Checkpoints(root)) is None
    assert Checkpoints(root).steps() == []


def test_the_order_is_by_number_and_a_lost_latest_does_no_harm(root):
    checkpoints = Checkpoints(root)
    for step in (2, 10, 9, 100):
        save(checkpoints, step)
    assert [folder.name[-3:] for folder in checkpoints.steps()] == ["002", "009", "010", "100"]
    (root / "latest").unlink()
    assert newest(checkpoints) == "step_00000100"
    (root / "latest").write_bytes(b"\xff\xff")
    assert newest(checkpoints) == "step_00000100"


# --- failures and crashes ---


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_save_that_fails_is_said_and_leaves_the_one_before(root, error):
    checkpoints = Checkpoints(root, limit=1)
    save(checkpoints, 1)
    with pytest.raises(RunError, match=r"step_00000002 could not be written: .*--resume auto") as caught:
        save(checkpoints, 2, FakeEngine(error))
    assert (caught.value.exit_code, str(error) in str(caught.value)) == (1, True)
    assert newest(checkpoints) == "step_00000001"
    assert (root / "latest").read_text() == "step_00000001\n"
    save(checkpoints, 3)
    assert names(root) == ["latest", "step_00000003"]


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


class Fuse:
    """Lets a number of operations on files happen, and kills the process at the next one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: int):
        self.left = left
        for owner, name in (
            (os, "fsync"),
            (Path, "rename"),
            (Path, "replace"),
            (Path, "mkdir"),
            (Path, "write_text"),
            (shutil, "rmtree"),
        ):
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Killed
            return function(*arguments, **keywords)

        return wrapped


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("second", [1, 2], ids=["same step", "next step"])
def test_a_crash_at_any_moment_leaves_a_sound_checkpoint(tmp_path, monkeypatch, limit, second):
    finished = False
    moments = 0
    while not finished:
        root = tmp_path / str(moments)
        checkpoints = Checkpoints(root, limit=limit)
        save(checkpoints, 0)
        save(checkpoints, 1)
        with monkeypatch.context() as patched:
            fuse = Fuse(patched, moments)
            try:
                save(checkpoints, second)
                finished = True
            except Killed:
                pass
            assert fuse.left < 0 or finished
        found = newest(checkpoints)
        if second == 2:
            assert found in ("step_00000001", "step_00000002")
            assert found == "step_00000001" or verify_manifest(root / found) is None
        else:  # between two renames the folder of that very step is under neither name
            assert found in ("step_00000001", "step_00000000" if limit > 1 else None)
        named = root / (root / "latest").read_text().strip()
        assert second == 1 or verify_manifest(named) is None
        save(checkpoints, 3)  # and it goes on from there
        assert newest(checkpoints) == "step_00000003"
        moments += 1
    assert moments > 12


def test_replace_folder(tmp_path):
    new, final = tmp_path / ".partial-best", tmp_path / "best"
    for text in ("one", "two"):
        new.mkdir()
        (new / "file").write_text(text)
        replace_folder(new, final)
        assert names(tmp_path) == ["best"]
        assert (final / "file").read_text() == text


def test_replace_folder_never_leaves_neither(tmp_path, monkeypatch):
    finished, moments = False, 0
    while not finished:
        folder = tmp_path / str(moments)
        new, final = folder / ".partial-best", folder / "best"
        for path, text in ((new, "new"), (final, "old")):
            path.mkdir(parents=True)
            (path / "file").write_text(text)
        with monkeypatch.context() as patched:
            Fuse(patched, moments)
            try:
                replace_folder(new, final)
                finished = True
            except Killed:
                pass
        whole = {file.read_text() for file in folder.glob("*/file")} | {f.read_text() for f in folder.glob(".*/file")}
        assert "new" in whole, "the finished one is never lost"
        # A second try, as the next export makes it, ends well whatever the first one left.
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        (new / "file").write_text("newer")
        replace_folder(new, final)
        assert names(folder) == ["best"]
        assert (final / "file").read_text() == "newer"
        moments += 1
    assert moments > 4


def test_the_manifest_comes_after_everything_is_on_disk(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    synced: list[str] = []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_manifest(tmp_path, step=7, world_size=1)
    assert synced == ["a", "b", f".{MANIFEST}.tmp", tmp_path.name]


def test_what_other_machines_have_written_is_in_the_manifest_though_it_is_not_listed_yet(tmp_path, monkeypatch):
    """A network file system shows names late that it opens at once."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "theirs").write_text("theirs")
    monkeypatch.setattr(checkpoint_files, "file_names", lambda _: ["mine"])
    write_manifest(tmp_path, ["mine", "theirs"], step=1, world_size=2)
    assert sorted(read_manifest(tmp_path)["files"]) == ["mine", "theirs"]
    assert verify_manifest(tmp_path) is None
    (tmp_path / "theirs").write_text("other!")
    assert "theirs has changed" in verify_manifest(tmp_path)
