"""`wmtp-ds checkpoint`: what it shows, what it finds damaged, and what it removes and never removes."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from wmtp_ds.checkpoint_files import (
    MANIFEST,
    put_back,
    remove_checkpoint,
    replace_folder,
    verify_manifest,
    write_manifest,
)
from wmtp_ds.cli.main import main


def add(root: Path, step: int, *, ranks: int = 2) -> Path:
    folder = root / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "shard.pt").write_bytes(b"weights" * 100 * step)
    (folder / "config.toml").write_text(f"# {step}\n")
    write_manifest(folder, step=step, world_size=ranks, global_batch=8)
    (root / "latest").write_text(f"{folder.name}\n")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 10, 20 and 30."""
    root = tmp_path / "checkpoints" / "run"
    for step in (10, 20, 30):
        add(root, step)
    return root


def flip(file: Path) -> None:
    """Change a bit in the middle: neither the size nor the time tells."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["checkpoint", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(str(ended.value.code)), captured.out, captured.err

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- list ---


def test_list(root: Path, call) -> None:
    (root / "step_00000020" / "shard.pt").unlink()
    partial = root / ".partial-step_00000040"
    partial.mkdir()
    (partial / "shard.pt").write_bytes(b"half")
    code, out, _ = call("list", root, "--json")
    assert code == 0
    [run] = json.loads(out)
    assert run["folder"] == str(root)
    shown = [(item["step"], item["world_size"], item["state"], item["latest"]) for item in run["checkpoints"]]
    assert shown == [
        (10, 2, "complete", False),
        (20, 2, "damaged", False),
        (30, 2, "complete", True),
        (40, None, "partial", False),
    ]
    sizes = {item["step"]: item["size"] for item in run["checkpoints"]}
    assert sizes[30] == sum(file.stat().st_size for file in (root / "step_00000030").iterdir()) > 21000
    assert sizes[40] == 4
    problems = {item["step"]: item["problem"] for item in run["checkpoints"]}
    assert problems[20] == "shard.pt is missing"
    assert problems[10] is problems[30] is None
    saved = json.loads((root / "step_00000030" / MANIFEST).read_text())["saved"]
    assert run["checkpoints"][2]["saved"] == saved

    code, out, _ = call("list", root)
    lines = out.splitlines()
    assert (code, lines[0]) == (0, f"{root}:")
    assert "damaged: shard.pt is missing" in lines[2]
    assert lines[3].endswith("2 ranks  complete  latest")
    assert "partial" in lines[4]


def test_list_of_several_runs(root: Path, call) -> None:
    add(root.parent / "other", 5, ranks=4)
    (root.parent / "notes").mkdir()
    code, out, _ = call("list", root.parent, "--json")
    runs = json.loads(out)
    assert code == 0
    assert [Path(run["folder"]).name for run in runs] == ["other", "run"]
    assert [len(run["checkpoints"]) for run in runs] == [1, 3]
    code, _, err = call("list", root.parent / "notes")
    assert (code, "holds no run. Name a run's folder" in err) == (2, True)
    code, _, err = call("list", root.parent / "nowhere")
    assert (code, "does not exist" in err) == (2, True)


# --- verify ---


def test_verify(root: Path, call) -> None:
    for path in (root, root / "step_00000020", f"{root}/step_00000020/"):
        code, out, _ = call("verify", path)
        assert (code, "step_00000020: sound" in out) == (0, True)
    flip(root / "step_00000020" / "shard.pt")
    for path in (root, root / "step_00000020"):
        code, out, _ = call("verify", path)
        assert code == 1
        assert f"{root / 'step_00000020'}: damaged: shard.pt has changed: its SHA-256 differs" in out
    assert call("verify", root / "step_00000030")[0] == 0
    code, out, _ = call("verify", root, "--json")
    assert code == 1
    found = {item["step"]: item["problem"] for item in json.loads(out)}
    assert found == {10: None, 20: "shard.pt has changed: its SHA-256 differs", 30: None}


def test_verify_an_incomplete_one(root: Path, call) -> None:
    (root / "step_00000030" / MANIFEST).unlink()
    code, out, _ = call("verify", root)
    assert (code, "step_00000030: partial: its saving was cut short" in out) == (1, True)
    (root.parent / "empty").mkdir()
    code, _, err = call("verify", root.parent / "empty")
    assert (code, "neither a checkpoint (step_…) nor a run's folder" in err) == (2, True)


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    manifest.pop("checksum")
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "..", "nul\0byte"])
def test_a_manifest_that_climbs_out_is_damaged(root: Path, call, name: str) -> None:
    (root / "secret").write_text("not yours")
    entry = {"size": 9, "sha256": "d2c2"}
    rewrite(root / "step_00000030", lambda manifest: manifest["files"].update({name: entry}))
    code, out, _ = call("verify", root / "step_00000030")
    assert (code, f"{name!r} lies outside the checkpoint" in out) == (1, True)


def test_a_link_that_leads_out_is_damaged(root: Path, call) -> None:
    shard = root / "step_00000030" / "shard.pt"
    elsewhere = root.parent / "elsewhere.pt"
    shutil.move(shard, elsewhere)
    shard.symlink_to(elsewhere)
    code, out, _ = call("verify", root / "step_00000030")
    assert (code, "shard.pt is a link that leads out of the checkpoint" in out) == (1, True)
    # The folder of a run may be reached through one.
    (root.parent / "link").symlink_to(root)
    assert call("verify", root.parent / "link" / "step_00000020")[0] == 0


def test_a_changed_manifest_is_damaged(root: Path, call) -> None:
    file = root / "step_00000030" / MANIFEST
    text = file.read_text()
    file.write_text(text.replace('"world_size": 2', '"world_size": 3'))
    code, out, _ = call("verify", root / "step_00000030")
    assert (code, "it has changed: its checksum differs" in out) == (1, True)
    file.write_text('{"world_size": 2, "files": {}}')
    code, out, _ = call("verify", root / "step_00000030")
    assert (code, "it lists no file" in out) == (1, True)


# --- prune ---


def test_prune(root: Path, call) -> None:
    (root / ".universal" / "step_00000010").mkdir(parents=True)
    (root / ".universal" / "step_00000010" / "x").write_bytes(b"1" * 50)
    (root / "checkpoint_best").mkdir()
    before = {step: sum(f.stat().st_size for f in (root / f"step_000000{step}").iterdir()) for step in (10, 20, 30)}
    code, out, _ = call("prune", root, "--keep", 2, "--dry-run")
    assert (code, f"would remove {root / 'step_00000010'}" in out) == (0, True)
    assert {"step_00000010", "step_00000020", "step_00000030"} <= set(names(root))
    code, out, _ = call("prune", root, "--keep", 2, "--json")
    report = json.loads(out)
    assert ([item["step"] for item in report["removed"]], [item["step"] for item in report["kept"]]) == ([10], [30, 20])
    assert report["freed"] == before[10]
    assert code == 0
    assert names(root) == [".lock", ".universal", "checkpoint_best", "latest", "step_00000020", "step_00000030"]
    assert names(root / ".universal") == []


def test_prune_counts_sound_ones_alone(root: Path, call) -> None:
    flip(root / "step_00000030" / "shard.pt")
    code, out, _ = call("prune", root, "--keep", 1)
    assert code == 0
    assert f"removed {root / 'step_00000030'} (damaged: shard.pt has changed: its SHA-256 differs)" in out
    assert f"kept {root / 'step_00000020'}" in out
    assert [name for name in names(root) if name.startswith("step_")] == ["step_00000020"]


def test_prune_removes_nothing_while_none_is_sound(root: Path, call) -> None:
    for step in (10, 20, 30):
        flip(root / f"step_000000{step}" / "shard.pt")
    code, _, err = call("prune", root, "--keep", 1)
    assert (code, "no checkpoint is sound, so none is removed" in err) == (0, True)
    assert [name for name in names(root) if name.startswith("step_")] == [f"step_000000{step}" for step in (10, 20, 30)]


def test_prune_goes_by_what_was_saved_last(root: Path, call) -> None:
    """A run that went back to step 10 and has saved step 15: 20 and 30 are of another course of it."""
    add(root, 15)
    assert call("prune", root, "--keep", 1)[0] == 0
    assert [name for name in names(root) if name.startswith("step_")] == ["step_00000015"]


def test_prune_clears_up_after_crashes(root: Path, call) -> None:
    for name in (".partial-step_00000040", ".partial-checkpoint_best", ".removed-step_00000001", ".old-step_00000030"):
        (root / name).mkdir()
        (root / name / "shard.pt").write_bytes(b"x" * 10)
    (root / ".latest.tmp").write_text("step")
    (root / ".universal" / ".partial-step_00000030").mkdir(parents=True)
    (root / ".universal" / "step_00000007").mkdir()
    (root / "notes.txt").write_text("mine")
    (root / ".tracking.json.tmp").write_text("another thread's")
    listed = json.loads(call("list", root, "--json")[1])[0]
    assert len(listed["leftovers"]) == 6
    code, out, _ = call("prune", root, "--keep", 3, "--dry-run", "--json")
    assert (code, len(json.loads(out)["leftovers"]), (root / ".latest.tmp").exists()) == (0, 7, True)
    code, out, _ = call("prune", root, "--keep", 3)
    assert (code, out.count("(left by a crash)")) == (0, 7)
    steps = ["step_00000010", "step_00000020", "step_00000030"]
    assert names(root) == [".lock", ".tracking.json.tmp", ".universal", "latest", "notes.txt", *steps]
    assert names(root / ".universal") == []


def test_a_folder_between_two_renames_gets_its_name_back(root: Path, call) -> None:
    (root / "step_00000030").rename(root / ".old-step_00000030")
    assert call("prune", root, "--keep", 1)[0] == 0
    assert verify_manifest(root / "step_00000030") is None


def test_prune_keeps_away_from_a_run_that_is_going_on(root: Path, call) -> None:
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = call("prune", root, "--keep", 1)
    assert (code, f"a run is training in {root}" in err) == (2, True)
    assert "step_00000010" in names(root)


@pytest.mark.parametrize("arguments", [("--keep", "0"), ("--keep", "-1"), ()])
def test_at_least_one_is_kept(root: Path, call, arguments: tuple[str, ...]) -> None:
    assert call("prune", root, *arguments)[0] == 2
    assert len(names(root)) == 4


def test_prune_of_what_is_no_run(tmp_path: Path, call) -> None:
    (tmp_path / "thesis").mkdir()
    code, _, err = call("prune", tmp_path / "thesis", "--keep", 1)
    assert (code, "is no run's folder" in err) == (2, True)
    assert names(tmp_path / "thesis") == []


# --- what it stands on ---


def test_removing_goes_through_another_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process killed while it removes leaves nothing under a checkpoint's name that is not whole."""

    def stop(path: Path, **_: object) -> None:
        assert Path(path).name == ".removed-step_00000010"
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(root / "step_00000010")
    assert names(root) == [".removed-step_00000010", "latest", "step_00000020", "step_00000030"]


def test_put_back_overwrites_nothing(root: Path) -> None:
    new = root / ".partial-step_00000030"
    new.mkdir()
    (new / "file").write_text("new")
    replace_folder(new, root / "step_00000030")
    shutil.copytree(root / "step_00000010", root / ".old-step_00000030")
    put_back(root)
    assert (root / "step_00000030" / "file").read_text() == "new"


def test_no_torch_is_imported(root: Path) -> None:
    code = (
        "import sys\nfrom wmtp_ds.cli.main import cli\n"
        "cli(['checkpoint', *sys.argv[1:]], standalone_mode=False)\n"
        "assert not {'torch', 'numpy', 'deepspeed'} & set(sys.modules)\n"
    )
    for arguments in (["list", root], ["verify", root], ["prune", root, "--keep", "1"]):
        done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=os.environ, capture_output=True)
        assert done.returncode == 0, done.stderr
