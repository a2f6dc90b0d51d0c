"""Two machines: the same losses as one with as many ranks, and what happens when one is lost."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from nodes import Nodes
from ranks import run_ranks
from safetensors.torch import load_file
from test_launch_runs import job, overrides

from wmtp_ds.checkpoint_files import complete_checkpoints, verify_manifest

pytestmark = pytest.mark.launch

DRIVER = Path(__file__).with_name("driver.py")
TRAIN = REPOSITORY / "bin" / "train_stage.py"
UNTRACKED = 'mlflow.tracking_uri=""'


def losses(root: Path, folder: str) -> dict[int, float]:
    lines = (root / "checkpoints" / folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["metrics"]["train/loss"] for row in rows if "train/loss" in row.get("metrics", {})}


def start(workspace: Path, jobs: list[dict], name: str) -> Path:
    file = workspace / f"{name}.json"
    file.write_text(json.dumps(jobs))
    return file


def test_two_machines_train_as_one_does_also_after_a_stop(workspace: Path) -> None:
    straight = [job("critic", "one-machine", UNTRACKED), job("verifiable", "one-machine-v", UNTRACKED)]
    straight[1]["override"].append('experiment.critic_checkpoint="checkpoints/one-machine/checkpoint_final"')
    one = run_ranks(DRIVER, [str(start(workspace, straight, "one"))], 2, workspace)
    assert one.returncode == 0, one.stdout

    several = [
        job("critic", "two-machines", UNTRACKED, stop_after=3),
        job("critic", "two-machines", UNTRACKED, resume="auto"),
        job("verifiable", "two-machines-v", UNTRACKED),
    ]
    several[2]["override"].append('experiment.critic_checkpoint="checkpoints/two-machines/checkpoint_final"')
    with Nodes(DRIVER, [str(start(workspace, several, "two"))], [workspace, workspace]) as nodes:
        assert (nodes.wait(0), nodes.wait(1)) == ([0], [0]), nodes.said(0) + nodes.said(1)
        assert "resumed from checkpoints/two-machines/step_00000003" in nodes.said(0)
    for suffix in ("", "-v"):
        expected = losses(workspace, f"one-machine{suffix}")
        assert len(expected) == 8
        assert losses(workspace, f"two-machines{suffix}") == expected, "to the bit"
        folders = [
            workspace / f"checkpoints/{name}{suffix}/checkpoint_final" for name in ("one-machine", "two-machines")
        ]
        files = sorted(path.name for path in folders[0].glob("*.safetensors"))
        assert files == sorted(path.name for path in folders[1].glob("*.safetensors"))
        for file in files:
            a, b = (load_file(folder / file) for folder in folders)
            assert all(torch.equal(a[key], b[key]) for key in a)
    *_, saved = complete_checkpoints(workspace / "checkpoints/two-machines")
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert verify_manifest(saved) is None


def arguments(folder: str, *more: str) -> list[str]:
    settings = [*overrides(folder, UNTRACKED), "training.max_steps=100000", "training.n_epochs=10000.0", *more]
    options = [part for text in settings for part in ("--override", text)]
    return ["--stage", "baseline", "--config", "stage_configs/local/baseline.toml", *options]


def test_a_machine_that_is_killed_ends_the_run_on_the_other(workspace: Path) -> None:
    """As the patience of half an hour has no part in it: the kernel tells."""
    with Nodes(TRAIN, arguments("killed-machine"), [workspace, workspace]) as nodes:
        nodes.wait_for(0, "step      3/100000")
        nodes.signal(1, signal.SIGKILL)
        began = time.monotonic()
        assert nodes.wait(0, 60) == [1]
        assert time.monotonic() - began < 30
        said = nodes.said(0)
        assert said.count("error: ") == 1
        last = said.splitlines()[-1]
        assert last.startswith("error: rank 1 (node 1, ")
        assert "no sign of life for " in last
        assert last.endswith("Go on with --resume auto once all machines are back.")
        assert "Traceback" not in said


def test_a_link_that_goes_silent_ends_the_run_within_the_timeout(workspace: Path) -> None:
    """Stopped processes keep their connections and say nothing: so do machines without power."""
    with Nodes(TRAIN, arguments("silent", "runtime.peer_timeout=6"), [workspace, workspace]) as nodes:
        nodes.wait_for(0, "step      3/100000")
        nodes.signal(0, signal.SIGSTOP)
        began = time.monotonic()
        assert nodes.wait(1, 60) == [1]
        assert 5 < time.monotonic() - began < 40
        said = nodes.said(1)
        assert said.count("error: ") == 1
        assert "error: rank 0 (node 0, " in said
        assert "Traceback" not in said


def test_folders_that_are_not_shared_are_refused(workspace: Path, tmp_path: Path) -> None:
    """At once, before a step is taken: half a checkpoint on each machine is none."""
    for name in ("stage_configs", "ds_configs", "bin", "storage"):
        (tmp_path / name).symlink_to(workspace / name)
    with Nodes(TRAIN, arguments("not-shared", "runtime.peer_timeout=10"), [workspace, tmp_path]) as nodes:
        assert (nodes.wait(0), nodes.wait(1)) == ([2], [2]), nodes.said(0) + nodes.said(1)
        assert "error: checkpoint.save_dir: " in nodes.said(0)
        assert "choose a folder on a file system that all machines share" in nodes.said(0)
        assert "Traceback" not in nodes.said(0) + nodes.said(1)
        assert not (workspace / "checkpoints/not-shared/metrics.jsonl").exists()
