"""Two machines: the same losses as one with as many ranks; a link that goes silent; a disk that one rank finds full."""

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
from test_launch_runs import STEPS, job, overrides

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
    """With a critic that two machines have exported."""
    critic = 'experiment.critic_checkpoint="checkpoints/critic-of-two/checkpoint_final"'
    several = [
        job("critic", "critic-of-two", UNTRACKED, "training.max_steps=2", "checkpoint.save_best=false"),
        job("verifiable", "two-machines", UNTRACKED, critic, stop_after=3),
        job("verifiable", "two-machines", UNTRACKED, critic, resume="auto"),
    ]
    with Nodes(DRIVER, [str(start(workspace, several, "two"))], [workspace, workspace]) as nodes:
        assert (nodes.wait(0), nodes.wait(1)) == ([0], [0]), nodes.said(0) + nodes.said(1)
        assert "resumed from checkpoints/two-machines/step_00000003" in nodes.said(0)
    straight = [job("verifiable", "one-machine", UNTRACKED, critic)]
    one = run_ranks(DRIVER, [str(start(workspace, straight, "one"))], 2, workspace)
    assert one.returncode == 0, one.stdout

    expected = losses(workspace, "one-machine")
    assert len(expected) == STEPS
    assert losses(workspace, "two-machines") == expected, "to the bit"
    folders = [workspace / f"checkpoints/{name}/checkpoint_final" for name in ("one-machine", "two-machines")]
    files = sorted(path.name for path in folders[0].glob("*.safetensors"))
    assert files == ["model.safetensors", "value_head.safetensors"]
    for file in files:
        a, b = (load_file(folder / file) for folder in folders)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    *_, saved = complete_checkpoints(workspace / "checkpoints/two-machines")
    assert json.loads((saved / "manifest.json").read_text())["world_size"] == 2
    assert verify_manifest(saved) is None


def test_a_full_disk_ends_an_export_on_all_ranks(tmp_path: Path) -> None:
    """And no rank waits for one that has given up: a hung collective would time out in 20 seconds."""
    done = run_ranks(Path(__file__).with_name("full_disk_exports.py"), [str(tmp_path)], 2, tmp_path, timeout=100)
    assert done.returncode == 0, done.stdout
    here, there = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(2))
    assert here == there
    assert (here.pop("step"), here.pop("shards")) == (1, 4)
    assert list(here) == ["weights", "tokenizer", "config", "fingerprint", "head", "folder", "elsewhere"]
    for name, (said, everywhere, left) in here.items():
        assert said.startswith(f"export {tmp_path / 'checkpoint_best'} could not be written: ")
        assert f"rank {int(name == 'elsewhere')}: " in said
        assert "No space left on device" in said
        assert everywhere
        assert [path for path in left if not path.endswith(".log")] == ["checkpoint_best"], "the older one alone"


def start_options(folder: str, *more: str) -> list[str]:
    settings = [*overrides(folder, UNTRACKED), "training.max_steps=100000", "training.n_epochs=10000.0", *more]
    options = [part for text in settings for part in ("--override", text)]
    return ["--stage", "baseline", "--config", "stage_configs/local/baseline.toml", *options]


def test_a_link_that_goes_silent_ends_the_run_within_the_timeout(workspace: Path) -> None:
    """Stopped processes keep their connections and say nothing: so do machines without power."""
    with Nodes(TRAIN, start_options("silent", "runtime.peer_timeout=6"), [workspace, workspace]) as nodes:
        nodes.wait_for(0, "step      3/100000")
        nodes.signal(0, signal.SIGSTOP)
        began = time.monotonic()
        assert nodes.wait(1, 60) == [1]
        assert 5 < time.monotonic() - began < 40
        said = nodes.said(1)
        assert said.count("error: ") == 1
        assert "error: rank 0 (node 0, " in said
        assert "Traceback" not in said
