"""Runs Python code that is not trusted, in a separate process under limits, and reports what came of it.

Each job gets a process of its own in its own process group, with an empty environment (but for the interpreter's
hash seed), an empty private working directory that is gone afterwards, and limits on time, memory, processes,
file size and output; the group is killed as a whole when the job ends or the clock does. The first kind of
``isolation.KINDS`` that works on this machine is used; ``sandbox_kind()`` says which. Verdicts cannot be had by
the easy tricks: what a solution computes is sent out as data and compared out here with expected results that the
process with the solution never sees, so leaving early (``os._exit(0)``), printing a verdict, or an object that
equals everything earns nothing.

`docs/sandbox.md` says what each kind does and does not protect against.
"""

import functools
import secrets
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from importlib import resources
from typing import Any

from wmtp_ds.data.frames import FrameReader, RunReport
from wmtp_ds.data.harness_values import encode
from wmtp_ds.data.isolation import KINDS, UnavailableError, interpreters, start_of
from wmtp_ds.data.processes import run_process
from wmtp_ds.data.seccomp import filter_program
from wmtp_ds.errors import RunError

START_SECONDS = 20.0  # for the sandbox itself to start, on a busy machine
_GRACE_SECONDS = 2.0  # of a job, on top of the time of its runs, which the harness sees to
_NONCE_CHARACTERS = 32


class Verdict(StrEnum):
    """What running a solution against its tests showed."""

    PASSED = "passed"
    WRONG = "wrong"
    ERROR = "error"
    TIMEOUT = "timeout"
    MEMORY = "memory"


@dataclass(frozen=True)
class Limits:
    """What one run may use: seconds, bytes, numbers. ``cpu_seconds`` is what labels should rest on: unlike the
    wall clock it does not depend on what else the machine does."""

    cpu_seconds: float = 2.0
    wall_seconds: float = 10.0
    memory_bytes: int = 512 << 20
    processes: int = 16  # processes and threads of the run together, itself included
    file_bytes: int = 4 << 20
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class FunctionRun:
    """A solution and the steps of its tests.

    ("value", expression) is evaluated in the solution's namespace and compared out here. ("truth", expression,
    MODULES, LENT) and ("pair", left, right, MODULES, LENT) are evaluated in the tests' own namespace, with the
    standard modules that the test names and the built-in names that mean the solution's (both separated by
    spaces). ("exec", code, WHERE) runs in the namespace of the "solution", the "tests", or "both".
    """

    source: str
    steps: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ProgramRun:
    """A program and what it reads from standard input."""

    source: str
    stdin: bytes = b""


@dataclass(frozen=True)
class Completed:
    """What a program did: ``stopped`` is the limit that ended it (timeout, memory, or error for anything else
    that is no normal exit), None after an exit with ``exit_code``."""

    stdout: bytes
    stderr: bytes
    exit_code: int | None
    stopped: Verdict | None
    truncated: bool


# What the interpreter is started with: it reads the harness, compiled, from standard input, and the job after it.
# To compile it anew each time would take half as long as all the rest.
_BOOT = """
import marshal, os
def read(size):
    data = b""
    while len(data) < size:
        data += os.read(0, size - len(data)) or os._exit(1)
    return data
exec(marshal.loads(read(int(read(8), 16))), {"__name__": "__main__", "__builtins__": __builtins__})
"""
_COMPILE = (
    "import marshal, sys; sys.stdout.buffer.write(marshal.dumps(compile(sys.stdin.buffer.read(), '<harness>', 'exec')))"
)


@functools.cache
def _program(interpreter: str) -> bytes:
    """What runs inside, one program out of the files that it is written in, as the interpreter compiles it."""
    folder = resources.files("wmtp_ds.data")
    names = ("harness_values", "harness_lock", "harness_calls", "harness")
    text = "\n".join(folder.joinpath(f"{name}.py").read_text(encoding="utf-8") for name in names)
    future = "from __future__ import annotations\n"  # has to come first
    source = (future + text.replace(future, "")).encode()
    done = subprocess.run([interpreter, "-I", "-S", "-c", _COMPILE], input=source, capture_output=True, env={})
    if done.returncode:
        raise UnavailableError("the interpreter does not run")
    return done.stdout


def _message(value: Any) -> bytes:
    """As ``harness.read_message`` reads it: the length in eight hexadecimal digits, then the encoded value."""
    text = encode(value).encode("ascii")
    return b"%08x" % len(text) + text


def _run_messages(run: FunctionRun | ProgramRun, nonce: str) -> bytes:
    if isinstance(run, ProgramRun):
        return _message((run.source, run.stdin))
    return _message((run.source, None)) + _message((run.steps, nonce))


def _run_in(
    kind: str,
    interpreter: str,
    runs: Sequence[FunctionRun | ProgramRun],
    limits: Limits,
    preload: Sequence[str] = (),
    go_on: Callable[[RunReport], bool] | None = None,
) -> tuple[list[RunReport], bool]:
    """The reports, and whether files outside are out of reach."""
    nonces = [secrets.token_hex(_NONCE_CHARACTERS // 2) for _ in runs]
    program = _program(interpreter)
    start = start_of(kind, interpreter, _BOOT)
    if kind == "plain" and start.uid is None:
        limits = replace(limits, processes=0)
    job = {
        "runs": len(runs),
        "limits": asdict(limits),
        "alone": kind != "plain" or start.uid is not None,
        "own_files": kind == "bubblewrap",
        "preload": list(preload),
        "filter": filter_program(keep_group=limits.processes == 0) or b"",
    }
    messages = [_run_messages(run, nonce) for run, nonce in zip(runs, nonces, strict=True)]
    reader = FrameReader(nonces)

    def follow(output: bytes) -> bytes | None:
        """Send a run when the one before it has ended, where that decides whether there is another."""
        ended = reader.ended
        reader.feed(output)
        if go_on is None or reader.ended == ended or reader.ended == len(runs):
            return b""
        return messages[reader.ended] if go_on(reader.reports[reader.ended - 1]) else None

    payload = b"%08x" % len(program) + program + _message(job) + b"".join(messages if go_on is None else messages[:1])
    most = (4 * limits.output_bytes + (1 << 16)) * len(runs)
    seconds = _GRACE_SECONDS + limits.wall_seconds * len(runs)
    told = run_process(start, payload, follow, start_seconds=START_SECONDS, seconds=seconds, most=most)
    if reader.ready is None or reader.ready[0] != "r":
        lines = told.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise UnavailableError(lines[-1][:300])
    lost = next((report for report in reader.reports if not report.ended), None)
    if told.outlived and lost is not None:
        lost.ended = "wall"
    return reader.reports, reader.ready[1] == "1"


# It uses the library, and finds out whether the limit on processes holds, which it does not for root.
_TRIAL = """
import math
import os
import re

def f():
    return math.gcd(6, 4)

def forks():
    for made in range(8):
        try:
            if os.fork() == 0:
                os._exit(0)
        except OSError:
            return made
    return 8
"""
_CHOICE_LOCK = threading.Lock()


@functools.cache
def _choose(kinds: tuple[str, ...]) -> tuple[str, str, bool]:
    """The first kind and interpreter that run a small job here, and whether files outside are out of reach."""
    trial = FunctionRun(_TRIAL, (("value", "f()"), ("value", "forks()")))
    limits = Limits(cpu_seconds=10.0, processes=6)
    reasons = []
    for kind in kinds:
        for interpreter in interpreters():
            try:
                [report], files_are_safe = _run_in(kind, interpreter, [trial], limits)
            except (UnavailableError, OSError) as error:
                reasons.append(f"{kind} with {interpreter}: {error}")
                continue
            if report.complete and report.steps[0].values == (2,) and report.steps[1].values:
                [forks] = report.steps[1].values
                if type(forks) is int and forks < limits.processes:
                    return kind, interpreter, files_are_safe
                reasons.append(f"{kind}: the limit on processes does not bind the user that the code would run as")
                continue
            reasons.append(f"{kind} with {interpreter}: {report.steps or report.ended or 'it did not start'}")
    raise RunError(
        "no sandbox works on this machine, and code is not run without one. Install bubblewrap "
        "(Debian, Ubuntu: apt-get install bubblewrap), or run as a user other than root.\n  " + "\n  ".join(reasons)
    )


def sandbox_kind(kinds: tuple[str, ...] = KINDS) -> str:
    """The kind of sandbox that is used on this machine: "bubblewrap", "namespaces" or "plain".

    Args:
        kinds: those to choose from, the best first.

    Raises:
        RunError: none of them works here.
    """
    with _CHOICE_LOCK:
        return _choose(kinds)[0]


def files_are_out_of_reach(kinds: tuple[str, ...] = KINDS) -> bool:
    """Whether the sandbox that is used here keeps this machine's files from the code in it.

    Raises:
        RunError: none of the kinds works here.
    """
    with _CHOICE_LOCK:
        return _choose(kinds)[2]


def what_is_missing(kinds: tuple[str, ...] = KINDS) -> str:
    """What the sandbox that is used here does not keep from the code in it; "" if nothing that another would.

    Raises:
        RunError: none of the kinds works here.
    """
    open_doors = []
    if sandbox_kind(kinds) == "plain":
        open_doors += ["see this machine's processes"]
        open_doors += [] if filter_program() else ["reach the network"]
    if not files_are_out_of_reach(kinds):
        open_doors += ["read and write this machine's files, as far as its user may"]
    return f"the code can {' and '.join(open_doors)}" if open_doors else ""


def run_job(
    runs: Sequence[FunctionRun | ProgramRun],
    limits: Limits | None = None,
    *,
    preload: Sequence[str] = (),
    go_on: Callable[[RunReport], bool] | None = None,
    kinds: tuple[str, ...] = KINDS,
) -> list[RunReport]:
    """Run several runs one after another in one sandbox, each in a child process of its own.

    Runs of one job share a uid, so they belong together only if one hand wrote them (a solution and its
    mutants, or one program and its inputs). A report without ``ended`` says that the sandbox ended before it.

    Args:
        runs: what to run; the limits hold for each.
        limits: default ``Limits()``.
        preload: standard modules to import once, before the runs.
        go_on: asked after each run whether to go on to the next; the reports of the others stay empty.
        kinds: kinds of sandbox to choose from, the best first.

    Raises:
        RunError: no sandbox works here.
    """
    with _CHOICE_LOCK:
        kind, interpreter, _ = _choose(kinds)
    try:
        return _run_in(kind, interpreter, runs, limits or Limits(), preload, go_on)[0]
    except (UnavailableError, OSError) as error:
        raise RunError(f"the sandbox ({kind}) failed to start: {error}") from None


def stopped_by(report: RunReport) -> Verdict | None:
    """The verdict that the way a run ended is by itself: None after a normal exit."""
    if report.ended == "exit":
        return None
    if report.ended == "wall" or (report.ended == "signal" and report.code in (signal.SIGPROF, signal.SIGXCPU)):
        return Verdict.TIMEOUT
    if report.ended == "signal" and report.code == signal.SIGKILL:
        return Verdict.MEMORY  # the kernel's out-of-memory killer
    return Verdict.ERROR


def run_python(
    source: str, stdin: str | bytes = b"", limits: Limits | None = None, *, kinds: tuple[str, ...] = KINDS
) -> Completed:
    """Run a Python program in the sandbox.

    Args:
        source: the program's text.
        stdin: what it reads; a str is sent as UTF-8.
        limits: default ``Limits()``.
        kinds: kinds of sandbox to choose from, the best first.

    Returns:
        Its outputs (standard output up to ``limits.output_bytes``, the end of standard error) and how it ended.

    Raises:
        RunError: no sandbox works here.
    """
    data = stdin.encode("utf-8", "surrogatepass") if isinstance(stdin, str) else stdin
    [report] = run_job([ProgramRun(source, data)], limits, kinds=kinds)
    stopped = stopped_by(report)
    raised = report.steps.get(0)
    if raised is not None and raised.error == "MemoryError":
        stopped = Verdict.MEMORY
    exit_code = report.code if report.ended == "exit" else None
    return Completed(report.stdout, report.stderr, exit_code, stopped, report.truncated)
