"""Commands, DeepSpeed's launcher and its ranks, each forked from a process that has imported everything.

What runs is the real code of all of them, with the arguments and the environment that each hands on to the next; left
out is that a new interpreter is started for each, which takes a launch with two ranks half a minute of a core. That is
tested in test_readme.py, test_launch_signals.py, test_launch_slurm.py and test_launch_tracking.py.
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from conftest import environment
from forking import ForkingPopen, be, end_with
from ranks import fork


class Started:
    """A command that runs in a session of its own: of `subprocess.Popen` what tests ask for."""

    def __init__(self, command: Sequence[str], cwd: Path, variables: Mapping[str, str], out: Path, err: Path):
        self.args = list(command)
        self._process = fork(_be_the_first, self.args, str(cwd), dict(variables), str(out), str(err))
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode


def _be_the_first(command: list[str], cwd: str, variables: dict[str, str], out: str, err: str) -> None:
    os.setsid()
    os.chdir(cwd)
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    subprocess.Popen = ForkingPopen  # type: ignore[misc]
    end_with(lambda: be(command, variables))


def run_preloaded(
    command: Sequence[str], cwd: Path, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """As `conftest.run`."""
    out, err = (cwd / f".command-{time.monotonic_ns()}.{kind}" for kind in ("out", "err"))
    started = Started(command, cwd, environment() | variables, out, err)
    try:
        code = started.wait(timeout)
        return subprocess.CompletedProcess(list(command), code, out.read_text(), err.read_text())
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGTERM)
        raise
    finally:
        for file in (out, err):
            file.unlink(missing_ok=True)
