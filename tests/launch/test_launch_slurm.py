"""The scripts for clusters, as they stand in docs/examples, under commands that stand in for a cluster's."""

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, environment
from test_launch_runs import overrides

FAKES = Path(__file__).with_name("fake_cluster")
SCRIPT = REPOSITORY / "docs/examples/slurm.sh"
JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "local[host,box]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2"}


class Batch:
    """What `sbatch` does with the script, on two machines of this one."""

    def __init__(self, cwd: Path, *arguments: str, path: str = ""):
        self.log = cwd / f"batch-{time.monotonic_ns()}.log"
        variables = environment() | JOB
        variables["PATH"] = os.pathsep.join(part for part in (path, str(FAKES), variables["PATH"]) if part)
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                [str(SCRIPT), *arguments], cwd=cwd, env=variables, stdout=stream, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.said():
            assert time.monotonic() < deadline, self.said()
            assert self.process.poll() is None, self.said()
            time.sleep(0.05)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        """Whatever is left of it."""
        if self.process.poll() is None:
            for process in [*self.descendants(), psutil.Process(self.process.pid)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()


@pytest.mark.parametrize("script", sorted((REPOSITORY / "docs/examples").glob("*.sh")), ids=lambda path: path.name)
def test_the_scripts_are_sound(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck", path=environment()["PATH"]) is None:
        pytest.skip("there is no shellcheck")
    done = subprocess.run(["shellcheck", str(script)], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# A stand-in for `wmtp-ds train`: notes what it was told, and ends as the file `ends` says, waiting for USR1 for 143.
STUB = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>told-"$SLURM_NODEID"
end=$(cat ends)
if [ "$end" = 143 ]; then
  trap 'exit 143' USR1 TERM
  echo waiting-"$SLURM_NODEID"
  while :; do sleep 0.05; done
fi
exit "$end"
"""


def test_a_job_whose_time_is_up_goes_back_into_the_queue(tmp_path: Path) -> None:
    stub = tmp_path / "stub/wmtp-ds"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    ends = tmp_path / "ends"

    def batch(end: int) -> Batch:
        ends.write_text(f"{end}\n")
        (tmp_path / "requeued").unlink(missing_ok=True)
        return Batch(tmp_path, "--stage", "rho1", "--override", 'experiment.name="a b"', path=str(stub.parent))

    # Time is up: the signal comes to the script alone.
    job = batch(143)
    try:
        job.wait_for("waiting-0")
        job.wait_for("waiting-1")
        job.process.send_signal(signal.SIGUSR1)
        assert job.process.wait(20) == 143
        assert (tmp_path / "requeued").read_text() == "77\n"
        told = [(tmp_path / f"told-{node}").read_text().splitlines()[-1] for node in range(2)]
        for node, line in enumerate(told):
            expected = 'train --stage rho1 --override experiment.name="a b" --resume auto --nnodes 2 '
            assert re.fullmatch(
                re.escape(expected) + rf"--node_rank {node} --master_addr localhost --master_port \d+", line
            ), line
        assert told[0].split()[-1] == told[1].split()[-1], "they meet at one port"

        # Cancelled: all processes are signalled, and it stays out of the queue.
        job = batch(143)
        job.wait_for("waiting-0")
        job.wait_for("waiting-1")
        for process in job.descendants():
            # The stub's `sleep` comes and goes.
            with suppress(psutil.NoSuchProcess):
                if "wmtp-ds" in " ".join(process.cmdline()) and "srun" not in " ".join(process.cmdline()):
                    process.send_signal(signal.SIGTERM)
        job.process.send_signal(signal.SIGTERM)
        assert job.process.wait(20) == 143
        assert not (tmp_path / "requeued").exists()
    finally:
        job.kill()

    for end in (0, 1, 2):
        job = batch(end)
        try:
            assert job.process.wait(20) == end
        finally:
            job.kill()
        assert not (tmp_path / "requeued").exists()


@pytest.mark.launch
def test_a_machine_that_is_killed_ends_the_run_on_the_other(workspace: Path) -> None:
    """The real `wmtp-ds train` on each, and DeepSpeed's real launcher; half an hour's patience is not needed."""
    settings = [*overrides("slurm", 'mlflow.tracking_uri=""'), "training.max_steps=9000", "training.n_epochs=900.0"]
    options = [part for text in settings for part in ("--override", text)]
    job = Batch(workspace, "--stage", "baseline", "--config", "stage_configs/local/baseline.toml", *options)
    try:
        job.wait_for("step      3/9000")
        assert "2 ranks on cpu" in job.said()
        machines = machines_of(job)
        ranks = [process for processes in machines for process in processes if "RANK" in process.environ()]
        assert sorted(process.environ()["RANK"] for process in ranks) == ["0", "1"]
        assert {process.environ()["LOCAL_SIZE"] for process in ranks} == {"1"}
        # Shared memory outlives processes that are killed: so there must be none.
        port = ranks[0].environ()["MASTER_PORT"]
        assert list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*")) == []
        began = time.monotonic()
        for process in machines[1]:
            process.kill()
        _, alive = psutil.wait_procs(machines[0], timeout=60)
        assert alive == [], job.said()
        assert time.monotonic() - began < 40
        assert job.process.wait(30) == 137, "the highest code: machine 1's, which SIGKILL has ended"
    finally:
        job.kill()
    said = job.said()
    assert said.count("error: ") == 1, said
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert line.startswith("error: rank 1 (node 1, ")
    assert "no sign of life for " in line
    assert line.endswith("Go on with --resume auto once all machines are back.")
    assert "Traceback" not in said
    assert not (workspace / "requeued").exists()


def machines_of(job: Batch) -> list[list[psutil.Process]]:
    """All processes of each machine: what `srun` has started there, and what that has."""
    found: dict[str, list[psutil.Process]] = {}
    for process in job.descendants():
        with suppress(psutil.NoSuchProcess):
            if (node := process.environ().get("SLURM_NODEID")) is not None:
                found.setdefault(node, []).append(process)
    return [found[node] for node in sorted(found)]
