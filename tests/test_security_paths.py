"""Names in artifacts, checkpoints and data that would climb out of their folder."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from in_process import command

from wmtp_ds.checkpoint_files import MANIFEST, read_manifest, verify_manifest, write_manifest
from wmtp_ds.errors import UserError
from wmtp_ds.models.fingerprint import shards_of
from wmtp_ds.resume import find_checkpoint
from wmtp_ds.tracking_state import STATE_FILE, TrackingState
from wmtp_ds.tracking_sync import sync_run

CLIMBING = ["../outside", "../../outside", "/etc/passwd", "a/../../outside", "..", "a\0b", "./../outside"]


def forged(folder: Path, **changes: Any) -> None:
    """A manifest that says something else, with a checksum that fits."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    manifest.pop("checksum", None)
    checksum = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest | {"checksum": checksum}))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "step_00000004"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("[training]\nbatch_size = 2\n")
    (folder / "a.pt").write_bytes(b"shard")
    (tmp_path / "outside").write_bytes(b"shard")
    write_manifest(folder, step=4, world_size=1, global_batch=2)
    return folder


@pytest.mark.parametrize("name", CLIMBING)
def test_manifests(checkpoint: Path, name: str) -> None:
    entry = read_manifest(checkpoint)["files"]["a.pt"]
    forged(checkpoint, files={name: entry})
    assert "outside" in (verify_manifest(checkpoint) or "")
    done = command("checkpoint", "verify", checkpoint)
    assert done.code == 1
    assert "damaged" in done.out
    with pytest.raises(UserError, match="damaged"):
        find_checkpoint(checkpoint.parent, str(checkpoint))


@pytest.mark.parametrize("target", ["../../outside", "/etc/passwd", "/dev/zero"])
def test_links_in_checkpoints(checkpoint: Path, target: str) -> None:
    (checkpoint / "a.pt").unlink()
    (checkpoint / "a.pt").symlink_to(target)
    assert verify_manifest(checkpoint) in ("a.pt is a link that leads out of the checkpoint", "a.pt is missing")
    assert command("checkpoint", "verify", checkpoint, seconds=5).code == 1


WRONG = [
    *({"world_size": value} for value in (0, -1, True, "2", 1.5, None, [], 10**30)),
    *({"global_batch": value} for value in (0, "x", [1], 1e999, True)),
    *({"step": value} for value in (-1, "x", {})),
    *({"files": value} for value in ({}, [], None, {"a.pt": 1}, {"a.pt": {"size": "5", "sha256": "x"}})),
]


@pytest.mark.parametrize("changes", WRONG, ids=str)
def test_manifests_of_wrong_types(checkpoint: Path, changes: dict[str, Any]) -> None:
    forged(checkpoint, **changes)
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        read_manifest(checkpoint)
    assert command("checkpoint", "list", checkpoint.parent).code == 0
    assert command("checkpoint", "verify", checkpoint.parent).code == 1
    with pytest.raises(UserError, match="damaged"):
        find_checkpoint(checkpoint.parent, str(checkpoint))


@pytest.mark.parametrize("kind", ["pipe", "zero", "deep", "digits", "bytes", "folder", "loop"])
@pytest.mark.parametrize("name", [MANIFEST, "latest", "config.toml"])
def test_odd_files_of_checkpoints(checkpoint: Path, kind: str, name: str) -> None:
    """None of these is read without end."""
    place = checkpoint.parent / name if name == "latest" else checkpoint / name
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind in ("zero", "loop"):
        place.symlink_to("/dev/zero" if kind == "zero" else name)
    else:
        place.write_bytes({"deep": b"[" * 100_000, "digits": b"1" + b"0" * 1_000_000, "bytes": b"\xff\0"}[kind])
    done = command("checkpoint", "verify", checkpoint, seconds=5)
    assert done.code == (0 if name == "latest" else 1), done
    assert command("checkpoint", "list", checkpoint.parent, seconds=5).code == 0


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "", "..", "a\0b", 3, None, ["a"]]
)
def test_shards_of_models(tmp_path: Path, name: Any) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="is damaged"):
        shards_of(index)


def state_of(run: Path, **changes: Any) -> None:
    run.mkdir(exist_ok=True)
    TrackingState(experiment="e", run_name="r", tracking_uri="").save(run)
    record = json.loads((run / STATE_FILE).read_text()) | changes
    (run / STATE_FILE).write_text(json.dumps(record))


def test_a_runs_folder_from_somebody_else_sends_no_other_files(tmp_path: Path) -> None:
    """tracking.json names what `track sync` sends, to a server that it names, too."""
    run = tmp_path / "run"
    (tmp_path / "secret.txt").write_text("my own")
    inner = {"sent": False, "done": {}, "artifact_path": ""}
    climbing = ["../secret.txt", str(tmp_path / "secret.txt"), "link", "folder/inner", "folder/../../secret.txt"]
    state_of(run, artifacts=[{"path": path, **inner} for path in (*climbing, "plot.png", "folder")])
    (run / "plot.png").write_text("picture")
    (run / "metrics.jsonl").write_text("")
    (run / "link").symlink_to("../secret.txt")
    (run / "folder").mkdir()
    (run / "folder/inner").symlink_to(tmp_path)
    report = sync_run(run, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert report.artifact_files == 1
    assert [text.partition(": ")[0] for text in report.rejected] == climbing
    assert all("lies outside" in text for text in report.rejected)


@pytest.mark.parametrize(
    "changes",
    [
        {"sent_bytes": "x"},
        {"artifacts": [1]},
        {"artifacts": [{"path": 1}]},
        {"params": {"a": 1}},
        {"status": None},
        {"run_id": 5},
        {"unknown": 1},
        {"rejected": "x"},
    ],
    ids=str,
)
def test_tracking_states_of_wrong_types(tmp_path: Path, changes: dict[str, Any]) -> None:
    state_of(tmp_path / "run", **changes)
    done = command("track", "sync", tmp_path / "run")
    assert done.code == 2, done
    assert "tracking.json is damaged" in done.err


@pytest.mark.parametrize("kind", ["pipe", "zero", "deep", "digits", "bytes", "folder", "cut"])
def test_odd_tracking_states(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "run" / STATE_FILE
    state_of(tmp_path / "run")
    good = place.read_bytes()
    place.unlink()
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "zero":
        place.symlink_to("/dev/zero")
    else:
        bad = {
            "deep": b"[" * 100_000,
            "digits": b'{"version": 1' + b"0" * 1_000_000,
            "bytes": b"\xff\0",
            "cut": good[:-9],
        }
        place.write_bytes(bad[kind])
    done = command("track", "sync", tmp_path / "run", seconds=5)
    assert done.code == 2, done
    assert STATE_FILE in done.err


@pytest.mark.parametrize("own_id", ["../../climbed", "/tmp/climbed", "a/b", "..", "~/climbed", "$(touch climbed)"])
def test_problem_ids_are_no_names_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_id: str) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    row = {"problem_id": own_id, "instruction": "add", "output": "x = 1", "is_correct": True}
    (folder / "in.jsonl").write_text(json.dumps(row) + "\n")
    before = set(tmp_path.rglob("*"))
    options = ("--input", "in.jsonl", "--output", "out", "--validation-fraction", "0")
    assert command("data", "import", "jsonl", *options).code == 0
    assert command("data", "stats", "out/train.jsonl").code == 0
    new = {path.relative_to(folder).parts[0] for path in set(tmp_path.rglob("*")) - before}
    assert new <= {"out", ".in.jsonl.index.npz"}
    assert not Path("/tmp/climbed").exists()


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "/x", ".hidden", "a\n", "a b", "\u202ea", "", "~", "-x"])
def test_names_of_experiments_are_names_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """``checkpoint.save_dir`` is made of it by default."""
    from wmtp_ds.config import ConfigError, load_config

    file = Path(__file__).resolve().parents[1] / "stage_configs/baseline.toml"
    text = file.read_text().replace('name = "baseline-7b"', f"name = {json.dumps(name)}")
    assert text != file.read_text()
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError) as found:
        load_config(tmp_path / "run.toml", environ={}, checks=False)
    assert [problem.key for problem in found.value.problems] == ["experiment.name"]
