"""Commands, DeepSpeed's launcher and its ranks, each forked from a process that has imported everything.

What runs is the real code of all of them, with the arguments and the environment that each hands on to the next; left
out is that a new interpreter is started for each, which takes a launch with two ranks half a minute of a core. That is
tested in test_readme.py, test_launch_signals.py and test_launch_slurm.py.
"""

import atexit
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conftest import environment
from ranks import fork

OURS = ("wmtp_ds.deepspeed_launcher", "wmtp_ds.rank", "wmtp_ds.bench.rank", "doomed_rank")


class Started:
    """A command that runs: of `subprocess.Popen` what tests ask for."""

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


def run_preloaded(
    command: Sequence[str], cwd: Path, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """As `conftest.run`."""
    out, err = (cwd / f".command-{time.monotonic_ns()}.{kind}" for kind in ("out", "err"))
    started = Started(command, cwd, environment() | variables, out, err)
    try:
        code = started.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGTERM)
        raise
    finally:
        said = [file.read_text() for file in (out, err)]
        for file in (out, err):
            file.unlink()
    return subprocess.CompletedProcess(list(command), code, *said)


class _Preloaded(subprocess.Popen):
    """`subprocess.Popen` that forks where Python is to run one of `OURS`."""

    def __new__(cls, command: Any, *_: Any, **keywords: Any) -> Any:
        if _module_of(command) is None:
            return super().__new__(cls)
        return _Forked(command, **keywords)


class _Forked:
    """A child that goes on where a new Python would begin, with what `launch_ranks` and the launcher ask for."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        stdout: Any = None,
        start_new_session: bool = False,
        preexec_fn: Callable[[], None] | None = None,
    ):
        self.args, self.returncode = command, None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        if start_new_session:
            os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if preexec_fn is not None:
            preexec_fn()
        if stdout is not None:
            os.dup2(stdout.fileno(), 1)
        _end_with(lambda: _be(command, os.environ if env is None else env))

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self) -> int | None:
        return self._reap(0)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _module_of(command: Any) -> str | None:
    """The module of ours that a command line has Python run."""
    if not isinstance(command, list) or command[0] != sys.executable:
        return None
    rest = [part for part in command[1:4] if part != "-u"]
    return rest[1] if rest[0] == "-m" and rest[1] in OURS else None


def _be_the_first(command: list[str], cwd: str, variables: dict[str, str], out: str, err: str) -> None:
    os.setsid()
    os.chdir(cwd)
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    subprocess.Popen = _Preloaded  # type: ignore[misc]
    _end_with(lambda: _be(command, variables))


def _be(command: Sequence[str], variables: Mapping[str, str]) -> None:
    """Do what a process does that is started with this command line and these variables."""
    variables = dict(variables)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, os.fdopen(descriptor, "w", buffering=1, closefd=False))
        setattr(sys, f"__{name}__", getattr(sys, name))
    module = _module_of(command)
    if module is None:
        assert command[0] == "wmtp-ds", command
        from wmtp_ds.cli.main import main

        main(list(command[1:]))
        return
    sys.argv = [module, *command[command.index(module) + 1 :]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that the module is imported already
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with(work: Callable[[], None]) -> None:
    """Do the work, and what Python does at its end; never returns."""
    atexit._clear()
    code: Any = 0
    try:
        work()
    except SystemExit as ended:
        code = ended.code or 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)
