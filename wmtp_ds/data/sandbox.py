"""Runs Python code that is not trusted, in a separate process under limits, and reports what came of it.

Each job gets a process of its own in its own process group, with an empty environment, an empty private working
directory that is gone afterwards, and limits on time, memory, processes, file size and output; the group is
killed as a whole when the job ends or the clock does. The first kind of ``isolation.KINDS`` that works on this
machine is used; ``sandbox_kind()`` says which. Verdicts cannot be had by the easy tricks: what a solution
computes is sent out as data and compared out here with expected results that the sandbox never sees, so leaving
early (``os._exit(0)``), printing a verdict, or an object that equals everything earns nothing.

What this does **not** protect against:

- The kernel is shared: a hole in it is a way out. Side channels (timing, shared caches) are open.
- A test that is no comparison with a literal is evaluated inside, where code written against this very harness
  could find the harness in its own process and forge the answer. (Tests of the form ``assert f(x) == literal``,
  and all tests by standard input and output, are not affected.)
- Memory is limited for each process: all processes of a run together may use ``processes`` times as much.
- Runs that share one job are written by the same hand (see ``run_job``): one could disturb the next.
- ``namespaces``: the code reads what its uid can read on this machine, and may write wherever every user may.
- ``plain``: also the network is open. Unless started by root, the code runs under our own uid, with our own
  rights to files; it may then start no process or thread at all, because what it started could outlive it.
"""

import contextlib
import functools
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any

from wmtp_ds.data.frames import RunReport, parse_frames
from wmtp_ds.data.isolation import FILTER, KINDS, Start, UnavailableError, interpreters, start_of
from wmtp_ds.errors import RunError

START_SECONDS = 20.0  # for the sandbox itself to start, on a busy machine
_NONCE_CHARACTERS = 32
_CHUNK = 1 << 16
_POLL_SECONDS = 0.5


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


def _spawn(start: Start) -> subprocess.Popen[bytes]:
    command, kept = start.command, -1
    if start.system_calls is not None:
        kept, writer = os.pipe()
        os.write(writer, start.system_calls)
        os.close(writer)
        command = [str(kept) if word == FILTER else word for word in command]
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=start.environment,
            cwd=start.directory or "/",
            pass_fds=() if kept < 0 else (kept,),
            start_new_session=True,
            user=start.uid if start.switch_user else None,
            group=start.uid if start.switch_user else None,
            extra_groups=[] if start.switch_user else None,
        )
    finally:
        if kept >= 0:
            os.close(kept)


def _exchange(process: subprocess.Popen[bytes], payload: bytes, deadline: float, most: int) -> dict[str, bytes]:
    """Feed standard input and read both outputs until their end, the deadline, or ``most`` bytes of one."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    read = {"out": bytearray(), "err": bytearray()}
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdin, selectors.EVENT_WRITE, "in")
        selector.register(process.stdout, selectors.EVENT_READ, "out")
        selector.register(process.stderr, selectors.EVENT_READ, "err")
        os.set_blocking(process.stdin.fileno(), False)
        left = memoryview(payload)
        while selector.get_map() and (remaining := deadline - time.monotonic()) > 0:
            ready = selector.select(min(remaining, _POLL_SECONDS))
            if not ready and _has_exited(process):
                break  # what still holds the pipes is a process that the run left behind
            for key, _ in ready:
                if key.data == "in":
                    try:
                        left = left[os.write(key.fd, left[:_CHUNK]) :]
                    except BlockingIOError:
                        continue
                    except BrokenPipeError:
                        left = left[:0]
                    if not left:
                        selector.unregister(key.fileobj)
                    continue
                chunk = os.read(key.fd, _CHUNK)
                read[key.data] += chunk
                if not chunk:
                    selector.unregister(key.fileobj)
                elif len(read[key.data]) > most:
                    return {name: bytes(data) for name, data in read.items()}
    return {name: bytes(data) for name, data in read.items()}


def _has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has ended; unlike ``poll()`` this leaves its id, and so its group's, to it."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill(process: subprocess.Popen[bytes], start: Start) -> None:
    """End the whole group, and whatever else runs under the run's own uid."""
    for stream in (process.stdin, process.stdout, process.stderr):
        assert stream is not None
        with contextlib.suppress(BrokenPipeError):
            stream.close()
    if not _has_exited(process):
        # The others first: the leader (bubblewrap, unshare) then reaps its child, and leaves by itself.
        for entry in Path("/proc").glob("[0-9]*"):
            if entry.name != str(process.pid) and _state_and_group(entry)[1] == process.pid:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(int(entry.name), signal.SIGKILL)
        deadline = time.monotonic() + _POLL_SECONDS
        while not _has_exited(process) and time.monotonic() < deadline:
            time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if not start.switch_user:
        return  # killing the first process of a PID namespace has killed them all
    for _ in range(100):  # until a pass finds none: a process may fork while it is being looked for
        found = [
            entry
            for entry in Path("/proc").glob("[0-9]*")
            if _owner(entry) == start.uid and _state_and_group(entry)[0] not in (b"Z", b"")
        ]
        if not found:
            break
        for entry in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(entry.name), signal.SIGKILL)


def _state_and_group(process_directory: Path) -> tuple[bytes, int]:
    """State ("Z" for a zombie) and process group of a process, as its directory in /proc tells; b"", -1 if gone."""
    try:
        # The second field, the name in brackets, may hold anything; state, parent and group follow it.
        fields = (process_directory / "stat").read_bytes().rpartition(b")")[2].split()
        return fields[0], int(fields[2])
    except (OSError, ValueError, IndexError):
        return b"", -1


def _owner(process_directory: Path) -> int | None:
    try:
        return process_directory.stat().st_uid
    except OSError:
        return None


def _remove(directory: Path) -> None:
    """Remove the private directory, also what the run has made unreadable."""
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        _unlock(directory)
        shutil.rmtree(directory, ignore_errors=True)


def _unlock(directory: Path) -> None:
    directory.chmod(0o700)
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False):
            _unlock(Path(entry.path))


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
    deadline = time.monotonic() + START_SECONDS + limits.wall_seconds * len(runs)
    try:
        process = _spawn(start)
        try:
            read = _exchange(process, payload, deadline, most)
        finally:
            _kill(process, start)
    finally:
        if start.directory is not None:
            _remove(start.directory)
    outlived = time.monotonic() >= deadline
    ready, _, frames = read["out"].partition(b"\n")
    if ready != b"r":
        lines = read["err"].decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise UnavailableError(lines[-1][:300])
    reports = parse_frames(frames, nonces)
    lost = next((report for report in reports if not report.ended), None)
    if outlived and lost is not None:
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
