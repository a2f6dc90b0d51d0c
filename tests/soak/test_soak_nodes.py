"""The scripts for clusters from beginning to end, with the real launchers: SLURM's queue, and DeepSpeed over ssh."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, environment, make_workspace
from nodes import Nodes
from test_launch_nodes import TRAIN, losses, start_options
from test_launch_runs import overrides
from test_launch_slurm import FAKES, Batch

from wmtp_ds.checkpoint_files import complete_checkpoints

pytestmark = pytest.mark.soak

LONG = ["training.max_steps=400", "training.n_epochs=40.0"]
CONFIG = ["--stage", "baseline", "--config", "stage_configs/local/baseline.toml"]


def options(folder: str, *more: str) -> list[str]:
    settings = [*overrides(folder, "mlflow.tracking_uri=''"), *more]
    return [*CONFIG, *(part for text in settings for part in ("--override", text))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("cluster"))
    straight = subprocess.run(
        ["wmtp-ds", "train", "--num_gpus", "2", *options("straight", *LONG)],
        cwd=root, env=environment(), check=False,
    )  # fmt: skip
    assert straight.returncode == 0
    return root


def test_a_job_goes_on_in_its_next_turn(place: Path) -> None:
    """Until it is done: the same losses as on one machine, to the bit."""
    arguments = options("queued", *LONG)
    for step in ("step     20/400", "step    150/400"):
        job = Batch(place, *arguments)
        try:
            job.wait_for(step)
            processes = job.descendants()
            job.process.send_signal(signal.SIGUSR1)
            assert job.process.wait(120) == 143, job.said()
            assert psutil.wait_procs(processes, timeout=10)[1] == []
        finally:
            job.kill()
        assert (place / "requeued").read_text() == "77\n"
        (place / "requeued").unlink()
        stopped = re.search(r"stopped by signal 15 at step (\d+)", job.said())
        assert stopped is not None
        assert complete_checkpoints(place / "checkpoints/queued")[-1].name == f"step_{int(stopped.group(1)):08d}"
    job = Batch(place, *arguments)
    try:
        assert job.process.wait(600) == 0, job.said()
    finally:
        job.kill()
    assert not (place / "requeued").exists()
    assert losses(place, "queued") == losses(place, "straight")


@pytest.mark.parametrize("no_ssh", [False, True], ids=["over ssh", "by hand"])
def test_deepspeeds_own_front_end_with_a_hostfile(place: Path, no_ssh: bool) -> None:
    (place / "hostfile").write_text("# two\nlocalhost slots=1\n127.0.0.1 slots=1\n")
    variables = environment() | {"HOSTFILE": "hostfile"}
    variables["PATH"] = os.pathsep.join([str(FAKES), variables["PATH"]])
    # Machines that ssh leads to have an environment of their own; DeepSpeed hands on what is in this file.
    (place / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\n")
    folder = f"hostfile-{no_ssh}"
    arguments = options(folder, *LONG)
    if no_ssh:
        from wmtp_ds.meeting import free_port

        where = ["deepspeed", "--hostfile", "hostfile", "--no_ssh", "--master_addr", "127.0.0.1"]
        where += ["--master_port", str(free_port())]
        commands = [[*where, "--node_rank", str(node), "bin/train_stage.py", *arguments] for node in range(2)]
    else:
        # No quotes: they would not survive the shell on the other machine.
        arguments = [part.replace('"', "") for part in arguments]
        commands = [[str(REPOSITORY / "docs/examples/hostfile.sh"), *arguments]]
    running = [subprocess.Popen(command, cwd=place, env=variables, start_new_session=True) for command in commands]
    try:
        assert [process.wait(600) for process in running] == [0] * len(running)
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert json.loads((place / f"checkpoints/{folder}/run.json").read_text())["world_size"] == 2
    assert losses(place, folder) == losses(place, "straight")


def test_folders_that_are_not_shared_are_refused(place: Path, tmp_path: Path) -> None:
    """At once, before a step is taken: half a checkpoint on each machine is none."""
    for name in ("stage_configs", "ds_configs", "bin", "storage"):
        (tmp_path / name).symlink_to(place / name)
    with Nodes(TRAIN, start_options("not-shared", "runtime.peer_timeout=30"), [place, tmp_path]) as nodes:
        assert (nodes.wait(0), nodes.wait(1)) == ([2], [2]), nodes.said(0) + nodes.said(1)
        assert "error: checkpoint.save_dir: " in nodes.said(0)
        assert "Traceback" not in nodes.said(0) + nodes.said(1)
    assert not (place / "checkpoints/not-shared/metrics.jsonl").exists()


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_either_machine_may_be_lost(workspace: Path, lost: int, number: signal.Signals) -> None:
    """With two ranks on each; one of them speaks."""
    arguments = start_options("lost", "runtime.peer_timeout=20")
    with Nodes(TRAIN, arguments, [workspace, workspace], ranks=2) as nodes:
        nodes.wait_for(0, "step      3/")
        nodes.signal(lost, number)
        assert nodes.wait(1 - lost, 120) == [1, -signal.SIGTERM]  # the second as its launcher asks it to
        said = nodes.said(1 - lost)
        assert said.count("error: ") == 1, said
        # What is cut short may be a save.
        first = rf"^error: (checkpoint \S+ was not finished, .*: )?rank {2 * lost} \(node {lost}, "
        assert re.search(first, said, re.MULTILINE)
        assert (f", rank {2 * lost + 1} (node {lost}, " in said) is (lost == 1)
        assert "Traceback" not in said
