"""Signals through the real launchers: what they end, what is saved, who says what, and how long it takes."""

import itertools
import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

import psutil
import pytest
from conftest import environment
from mlflow import MlflowClient
from test_launch_runs import overrides

from wmtp_ds.meeting import free_port

pytestmark = pytest.mark.launch


class Session:
    """A command in a session of its own, as in a terminal, and what it says."""

    numbers = itertools.count()

    def __init__(self, command: list[str], cwd: Path):
        # A file of its own: a launcher of the session before may still have a last line to write.
        self.log = cwd / f"session-{next(self.numbers)}.log"
        with self.log.open("w") as stream:
            self.front = subprocess.Popen(
                command, cwd=cwd, env=environment(), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_for(self, text: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def ranks(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.front.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "--local_rank" in str(process.cmdline()):
                    found.append((int(process.environ()["RANK"]), process))
        return [process for _, process in sorted(found, key=itemgetter(0))]

    def wait_for_the_end(self, processes: list[psutil.Process], seconds: float) -> int:
        """Of all processes; the front's exit code."""
        _, alive = psutil.wait_procs(processes, timeout=seconds)
        assert alive == [], self.log.read_text()
        return self.front.wait(seconds)


def test_signals_save_and_a_dead_rank_ends_the_others(workspace: Path) -> None:
    """SIGTERM to one rank; Ctrl-C to a whole terminal; SIGKILL to one rank; each run goes on where the last ended."""
    more = [part for text in overrides("signalled") for part in ("--override", text)]
    more += ["--override", "training.max_steps=4000", "--override", "training.n_epochs=400.0"]
    arguments = ["--stage", "baseline", "--config", "stage_configs/local/baseline.toml", "--num_gpus", "2", *more]

    session = Session(["wmtp-ds", "train", *arguments], workspace)
    session.wait_for("step      3/4000")
    ranks = session.ranks()
    ranks[1].send_signal(signal.SIGTERM)
    assert session.wait_for_the_end(ranks, 30) == 143
    stopped = int(re.search(r"stopped by signal 15 at step (\d+)", session.log.read_text()).group(1))
    assert (workspace / f"checkpoints/signalled/step_{stopped:08d}/manifest.json").exists()

    # With a rank too many: it leaves, and the other two go on. A terminal signals all processes, and launchers their
    # children once more.
    command = ["deepspeed", "--num_accelerators", "3", "--master_port", str(free_port()), "bin/train_stage.py"]
    session = Session([*command, *arguments, "--resume", "auto"], workspace)
    session.wait_for(f"step_{stopped:08d} at step {stopped} of 4000")
    session.wait_for(f"step {stopped + 2:>6}/4000")
    ranks = session.ranks()
    assert len(ranks) == 2
    os.killpg(session.front.pid, signal.SIGINT)
    session.wait_for_the_end(ranks, 30)
    said = session.log.read_text()
    found = re.search(r"stopped by signal 2 at step (\d+)", said)
    assert found, said
    again = int(found.group(1))
    manifest = json.loads((workspace / f"checkpoints/signalled/step_{again:08d}/manifest.json").read_text())
    assert manifest["world_size"] == 2

    session = Session(["wmtp-ds", "train", *arguments, "--resume", "auto"], workspace)
    session.wait_for(f"step {again + 2:>6}/4000")
    ranks = session.ranks()
    ranks[1].send_signal(signal.SIGKILL)
    assert session.wait_for_the_end(ranks, 30) == 1
    said = session.log.read_text()
    assert said.count("error: ") == 1
    assert "error: a rank was ended by SIGKILL" in said.splitlines()[-1]
    assert "Traceback" not in said, "the other rank has nothing to say of its own"
    run_id = json.loads((workspace / "checkpoints/signalled/tracking.json").read_text())["run_id"]
    assert MlflowClient(f"sqlite:///{workspace / 'mlflow.db'}").get_run(run_id).info.status == "FAILED"
