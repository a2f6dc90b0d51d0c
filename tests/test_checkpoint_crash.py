"""A crash while saving: a process is killed, or its disk is full, at every moment of a save, one after another.

Each save runs in a process of its own, forked with an engine that writes its shards from Python; the same through
DeepSpeed and its launcher, at some moments, is in tests/launch and tests/soak.
"""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from crash import Moments, fill_disk, kill
from test_checkpoint import names, save

from wmtp_ds.checkpoint import Checkpoints
from wmtp_ds.checkpoint_files import leftovers, verify_manifest
from wmtp_ds.checkpoint_listing import list_runs, prune_run
from wmtp_ds.errors import RunError
from wmtp_ds.resume import find_checkpoint
from wmtp_ds.run_folder import RunFolder

FINISHED, FAILED = 0, 3


def save_and_crash(root: Path, limit: int, step: int, moment: int, how: str, said: Path) -> int:
    """Save in a fork that is struck at a moment; its exit code, or minus the signal that killed it."""
    child = os.fork()
    if not child:
        code = 9
        try:
            struck = Moments(root, moment, kill if how == "kill" else fill_disk, growing=how != "kill")
            struck.install()
            code = FINISHED
            save(Checkpoints(root, limit=limit), step)
            code = FINISHED if struck.watching else 4
        except RunError as error:
            struck.watching = False
            said.write_text(str(error))
            code = FAILED
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process has written is there without fsync; when it is called, test_checkpoint.py checks."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.parametrize(
    ("limit", "step", "how"), [(1, 2, "kill"), (3, 1, "kill"), (1, 1, "kill"), (3, 2, "full disk"), (1, 1, "full disk")]
)
def test_at_every_moment(tmp_path: Path, limit: int, step: int, how: str) -> None:
    moment, outcomes = 0, set()
    while True:
        root, said = tmp_path / f"{moment}" / "run", tmp_path / "said"
        for before in (0, 1):
            save(Checkpoints(root, limit=limit), before)
        code = save_and_crash(root, limit, step, moment, how, said)
        if code == FINISHED:
            break
        outcomes.add(code)
        where = f"moment {moment}"
        partial = root / f".partial-step_{step:08d}"
        if how == "kill":
            assert code == -signal.SIGKILL, where
        else:
            # Refused and said; nothing of it takes room. (4: in what may fail: removing an older one.)
            assert code in (FAILED, 4), where
            if code == FAILED:
                assert f"step_{step:08d} could not be written: rank 0: " in said.read_text()
                assert "No space left on device" in said.read_text()
            assert not partial.exists(), where
        was_cut_short = partial.exists()

        # Both looks at the folder, before the ranks start and after, agree on a checkpoint that is whole.
        warnings: list[str] = []
        listed = list_runs(root)[0]
        found = Checkpoints(root).newest(warnings.append)
        assert found is not None, where
        assert find_checkpoint(root, "auto") == found
        assert verify_manifest(found) is None, where
        newest = int(found.name[-8:])
        assert newest in (1, 2) if step == 2 else newest == 1 or (was_cut_short and newest == 0), where
        assert RunFolder(root, "auto").source(Checkpoints(root), lambda _: None) == found
        # What was cut short is said, and is no checkpoint.
        if was_cut_short and step > newest:
            assert warnings == [
                f"checkpoint {root / 'step_00000002'} is incomplete: its saving was cut short; it is not used"
            ], where
        states = {item.name: item.state for item in listed.checkpoints if item.folder == partial}
        assert states == ({f"step_{step:08d}": "partial"} if was_cut_short else {}), where

        # It goes on from there, and nothing of the crash is left.
        save(Checkpoints(root, limit=limit), 3)
        assert leftovers(root) == [], where
        assert [name for name in names(root) if name.startswith(".")] == [], where
        assert Checkpoints(root).newest(pytest.fail) == root / "step_00000003"
        moment += 1
    assert moment >= (25 if how == "kill" else 15), "these are all operations of a save"
    assert outcomes <= {-signal.SIGKILL, FAILED, 4}


def test_prune_at_every_moment(tmp_path: Path) -> None:
    """`wmtp-ds checkpoint prune` that is killed leaves what it keeps whole, and no half of what it removes."""
    moment = 0
    while True:
        root = tmp_path / str(moment)
        for step in (1, 2, 3):
            save(Checkpoints(root), step)
        (root / ".partial-step_00000004").mkdir()
        (root / ".partial-step_00000004" / "shard").write_bytes(b"half")
        child = os.fork()
        if not child:
            try:
                Moments(root, moment, kill).install()
                prune_run(root, keep=1, dry_run=False, say=lambda _: None)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert [verify_manifest(folder) for folder in Checkpoints(root).steps()].count(None) >= 1
        assert all(verify_manifest(folder) is None for folder in Checkpoints(root).steps()), moment
        assert Checkpoints(root).newest(lambda _: None) == root / "step_00000003"
        prune_run(root, keep=1, dry_run=False, say=lambda _: None)
        assert names(root) == [".lock", "latest", "step_00000003"]
        if status == 0:
            break
        moment += 1
    assert moment > 8


def test_a_failure_of_one_rank_is_one_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has written its part; it is told of rank 1's failure, says so, and leaves nothing behind."""
    from wmtp_ds import distributed

    root = tmp_path / "run"
    save(Checkpoints(root), 1)
    calls = 0

    def gather(value: list[str]) -> list[list[str]]:
        nonlocal calls
        calls += 1
        return [value, ["[Errno 28] No space left on device"] if calls == 2 else []]

    monkeypatch.setattr(distributed, "gather_objects", gather)
    with pytest.raises(RunError) as caught:
        save(Checkpoints(root), 2)
    assert "step_00000002 could not be written: rank 1: [Errno 28] No space left on device (" in str(caught.value)
    assert re.search(r"device \(\d+\.\d\d GiB free there\)\. The checkpoints before it", str(caught.value))
    assert (caught.value.exit_code, caught.value.everywhere) == (1, True)
    assert calls == 2
    assert names(root) == ["latest", "step_00000001"]


def test_a_rank_that_is_gone_is_no_disk_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wmtp_ds import distributed

    def gather(_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(distributed, "gather_objects", gather)
    with pytest.raises(RunError, match=r"step_00000002 was not finished, .*: another rank is gone \(Connection closed"):
        save(Checkpoints(tmp_path / "run"), 2)


def test_manifests_survive_a_round_trip_through_json(tmp_path: Path) -> None:
    folder = save(Checkpoints(tmp_path / "run"), 1)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(json.dumps(json.loads(text)))
    assert verify_manifest(folder) is None
