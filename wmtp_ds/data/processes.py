"""One sandboxed process from start to end: feeds it, reads it, and leaves nothing of it behind."""

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wmtp_ds.data.isolation import Start

_CHUNK = 1 << 16
_POLL_SECONDS = 0.5
_LEAVE_SECONDS = 0.02  # for a process whose pipes are closed to leave by itself, which spares a look at all others


@dataclass(frozen=True)
class Told:
    """What a process wrote; ``outlived``: it had not come to its end when its time was over."""

    stdout: bytes
    stderr: bytes
    outlived: bool


def run_process(
    start: Start,
    payload: bytes,
    follow: Callable[[bytes], bytes | None],
    *,
    start_seconds: float,
    seconds: float,
    most: int,
) -> Told:
    """Start a process, feed it, read its outputs, and end it with all that it has started.

    Args:
        start: how to start it.
        payload: the beginning of its standard input.
        follow: called with each piece of its standard output; gives what to send it next, None to end it.
        start_seconds: its time on the wall clock until it writes something.
        seconds: its time from then on.
        most: of bytes on one output; a process that writes more is ended.

    Raises:
        OSError: it could not be started.
    """
    clock = _Clock(time.monotonic() + start_seconds, seconds)
    try:
        process = _spawn(start)
        try:
            read = _exchange(process, payload, clock, most, follow)
        finally:
            _kill(process, start)
    finally:
        if start.directory is not None:
            _remove(start.directory)
    return Told(read["out"], read["err"], outlived=time.monotonic() >= clock.deadline)


@dataclass
class _Clock:
    """When a process's time is over, and how much it has from its first word on."""

    deadline: float
    seconds: float


def _spawn(start: Start) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        start.command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=start.environment,
        cwd=start.directory or "/",
        start_new_session=True,
        user=start.uid if start.switch_user else None,
        group=start.uid if start.switch_user else None,
        extra_groups=[] if start.switch_user else None,
    )


def _exchange(
    process: subprocess.Popen[bytes],
    payload: bytes,
    clock: _Clock,
    most: int,
    follow: Callable[[bytes], bytes | None],
) -> dict[str, bytes]:
    """Feed standard input and read both outputs until their end, the deadline, or ``most`` bytes of one."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    stdin = process.stdin.fileno()
    read = {"out": bytearray(), "err": bytearray()}
    with selectors.DefaultSelector() as selector:
        selector.register(stdin, selectors.EVENT_WRITE, "in")
        selector.register(process.stdout, selectors.EVENT_READ, "out")
        selector.register(process.stderr, selectors.EVENT_READ, "err")
        os.set_blocking(stdin, False)
        left = memoryview(payload)
        going = True
        while going and selector.get_map() and (remaining := clock.deadline - time.monotonic()) > 0:
            ready = selector.select(min(remaining, _POLL_SECONDS))
            if not ready and _has_exited(process):
                break  # what still holds the pipes is a process that the run left behind
            for key, _ in ready:
                if key.data == "in":
                    left = left[_write(stdin, left) :]
                    if not left:
                        selector.unregister(stdin)
                    continue
                chunk = os.read(key.fd, _CHUNK)
                read[key.data] += chunk
                if not chunk:
                    selector.unregister(key.fileobj)
                    continue
                if key.data == "out" and len(read["out"]) == len(chunk):
                    clock.deadline = time.monotonic() + clock.seconds
                more = follow(chunk) if key.data == "out" else b""
                if more:
                    if not left:
                        selector.register(stdin, selectors.EVENT_WRITE, "in")
                    left = memoryview(bytes(left) + more)
                going = going and more is not None and len(read[key.data]) <= most
    return {name: bytes(data) for name, data in read.items()}


def _write(handle: int, data: memoryview) -> int:
    """How much of the data is done with: written, or of no use to a process that does not read any more."""
    try:
        return os.write(handle, data[:_CHUNK])
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        return len(data)


def _has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has ended; unlike ``poll()`` this leaves its id, and so its group's, to it."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _exits_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not _has_exited(process):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.001)
    return True


def _kill(process: subprocess.Popen[bytes], start: Start) -> None:
    """End the whole group, and whatever else runs under the run's own uid."""
    for stream in (process.stdin, process.stdout, process.stderr):
        assert stream is not None
        with contextlib.suppress(BrokenPipeError):
            stream.close()
    if not _exits_within(process, _LEAVE_SECONDS):
        # The others first: the leader (bubblewrap, unshare) then reaps its child, and leaves by itself.
        for entry in Path("/proc").glob("[0-9]*"):
            if entry.name != str(process.pid) and _state_and_group(entry)[1] == process.pid:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(int(entry.name), signal.SIGKILL)
        _exits_within(process, _POLL_SECONDS)
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
