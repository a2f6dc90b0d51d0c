"""Runs Python code that is not trusted, in a separate process under limits, and reports what came of it.

Each job gets a process of its own in its own process group, with an empty environment (but for the interpreter's
hash seed), an empty private working directory that is gone afterwards, and limits on time, memory, processes,
file size and output; the group is killed as a whole when the job ends or the clock does. The first kind of
``isolation.KINDS`` that works on this machine is used; ``sandbox_kind()`` says which. Verdicts cannot be had by
the easy tricks: what a solution computes is sent out as data and compared out here with expected results that the
sandbox never sees, so leaving early (``os._exit(0)``), printing a verdict, or an object that equals everything
earns nothing.

What this does **not** protect against:

- The kernel is shared: a hole in it is a way out. Side channels (timing, shared caches) are open.
- A test that is no comparison with a literal is evaluated inside, where code written against this very harness
  could find the harness in its own process and forge the answer. (Tests of the form ``assert f(x) == literal``,
  and all tests by standard input and output, are not affected.)
- Memory is limited for each process: all processes of a run together may use ``processes`` times as much.
- Runs that share one job are written by the same hand (see ``run_job``): one could disturb the next.
- ``namespaces`` and ``plain``: the code sees this machine's files, with the rights of every user if root started
  it (it then has a uid of its own), and with our own rights otherwise.
- ``plain``: the network is open, too. Unless started by root, the code may start no process or thread at all,
  because what it started could outlive it.
"""

import functools
import secrets
import signal
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import resources
from typing import Any

from wmtp_ds.data.frames import RunReport, parse_frames
from wmtp_ds.data.isolation import KINDS, UnavailableError, interpreters, start_of
from wmtp_ds.data.processes import run_process
from wmtp_ds.errors import RunError

START_SECONDS = 20.0  # for the sandbox itself to start, on a busy machine
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
    """A solution and the steps to evaluate in its namespace: ("exec", code), ("value", expression),
    ("pair", left, right) or ("truth", expression)."""

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


@functools.cache
def _harness() -> str:
    return resources.files("wmtp_ds.data").joinpath("harness.py").read_text(encoding="utf-8")


def _encode_job(
    runs: Sequence[FunctionRun | ProgramRun], limits: Limits, own_pids: bool, preload: Sequence[str]
) -> bytes:
    """The job as the harness reads it: the length in eight hexadecimal digits, then a Python literal."""
    listed: list[tuple[Any, ...]] = [
        ("function", run.source, list(run.steps))
        if isinstance(run, FunctionRun)
        else ("program", run.source, run.stdin)
        for run in runs
    ]
    job = {"runs": listed, "limits": asdict(limits), "own_pids": own_pids, "preload": list(preload)}
    # ascii() escapes everything, so that a lone surrogate in a source is the run's error, not ours.
    text = ascii(job).encode()
    return b"%08x" % len(text) + text


def _run_in(
    kind: str,
    interpreter: str,
    runs: Sequence[FunctionRun | ProgramRun],
    limits: Limits,
    preload: Sequence[str] = (),
) -> list[RunReport]:
    nonces = [secrets.token_hex(_NONCE_CHARACTERS // 2) for _ in runs]
    start = start_of(kind, interpreter, _harness())
    if kind == "plain" and start.uid is None:
        limits = Limits(**{**asdict(limits), "processes": 0})
    payload = _encode_job(runs, limits, kind != "plain", preload) + "".join(nonces).encode()
    most = (4 * limits.output_bytes + (1 << 16)) * len(runs)
    told = run_process(start, payload, START_SECONDS + limits.wall_seconds * len(runs), most)
    ready, _, frames = told.stdout.partition(b"\n")
    if ready != b"r":
        lines = told.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise UnavailableError(lines[-1][:300])
    reports = parse_frames(frames, nonces)
    lost = next((report for report in reports if not report.ended), None)
    if told.outlived and lost is not None:
        lost.ended = "wall"
    return reports


_CHOICE_LOCK = threading.Lock()


@functools.cache
def _choose(kinds: tuple[str, ...]) -> tuple[str, str]:
    """The first kind and interpreter that run a small job here."""
    trial = FunctionRun("import math\nimport re\n\ndef f():\n    return math.gcd(6, 4)\n", (("value", "f()"),))
    reasons = []
    for kind in kinds:
        for interpreter in interpreters():
            try:
                [report] = _run_in(kind, interpreter, [trial], Limits(cpu_seconds=10.0))
            except (UnavailableError, OSError) as error:
                reasons.append(f"{kind} with {interpreter}: {error}")
                continue
            if report.complete and report.steps[0].values == (2,):
                return kind, interpreter
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


def run_job(
    runs: Sequence[FunctionRun | ProgramRun],
    limits: Limits | None = None,
    *,
    preload: Sequence[str] = (),
    kinds: tuple[str, ...] = KINDS,
) -> list[RunReport]:
    """Run several runs one after another in one sandbox, each in a child process of its own.

    Runs of one job share a uid, so they belong together only if one hand wrote them (a solution and its
    mutants, or one program and its inputs). A report without ``ended`` says that the sandbox ended before it.

    Args:
        runs: what to run; the limits hold for each.
        limits: default ``Limits()``.
        preload: standard modules to import once, before the runs.
        kinds: kinds of sandbox to choose from, the best first.

    Raises:
        RunError: no sandbox works here.
    """
    with _CHOICE_LOCK:
        kind, interpreter = _choose(kinds)
    try:
        return _run_in(kind, interpreter, runs, limits or Limits(), preload)
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
