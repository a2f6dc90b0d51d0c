"""A `subprocess.Popen` that forks where Python is to run a module of ours: all is imported already."""

import atexit
import inspect
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

OURS = ("wmtp_ds.deepspeed_launcher", "wmtp_ds.rank", "wmtp_ds.bench.rank", "doomed_rank")
EXECUTE = subprocess.Popen._execute_child  # type: ignore[attr-defined]


class ForkingPopen(subprocess.Popen):
    """The child goes on where a new Python would begin, with the arguments, variables and streams that it is given."""

    def _execute_child(self, *arguments: Any) -> None:
        given = inspect.signature(EXECUTE).bind(self, *arguments).arguments
        if module_of(given["args"]) is None:
            EXECUTE(self, *arguments)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            end_with(lambda: _be_the_child(given))
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[end] for end in ends))  # type: ignore[attr-defined]


def _be_the_child(given: dict[str, Any]) -> None:
    if given["start_new_session"]:
        os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if given["preexec_fn"] is not None:
        given["preexec_fn"]()
    for descriptor, end in enumerate(("p2cread", "c2pwrite", "errwrite")):
        if given[end] != -1:
            os.dup2(given[end], descriptor)
    if given["cwd"] is not None:
        os.chdir(given["cwd"])
    be(given["args"], os.environ if given["env"] is None else given["env"])


def module_of(command: Any) -> str | None:
    """The module of ours that a command line has Python run."""
    if not isinstance(command, list) or command[0] != sys.executable:
        return None
    rest = [part for part in command[1:4] if part != "-u"]
    return rest[1] if rest[:1] == ["-m"] and rest[1] in OURS else None


def be(command: Sequence[str], variables: Mapping[str, str]) -> None:
    """Do what a process does that is started with this command line and these variables."""
    variables = dict(variables)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, os.fdopen(descriptor, "w", buffering=1, closefd=False))
        setattr(sys, f"__{name}__", getattr(sys, name))
    module = module_of(command)
    if module is None:
        assert command[0] == "wmtp-ds", command
        from wmtp_ds.cli.main import main

        main(list(command[1:]))
        return
    sys.argv = [module, *command[command.index(module) + 1 :]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that the module is imported already
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def end_with(work: Callable[[], None]) -> None:
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
