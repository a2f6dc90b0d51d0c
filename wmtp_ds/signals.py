"""Signals end a run between two steps: handlers only set a flag, which all ranks agree on at the next step."""

import ctypes
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

# What ends a run, and the signal that its exit code tells of (128 plus its number): SLURM's warning counts as SIGTERM.
ENDING = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT, signal.SIGUSR1: signal.SIGTERM}
# A terminal signals every process of a command, and launchers pass on what they get: what follows a signal this soon
# is its echo. After that it is somebody who does not want to wait.
ECHO_SECONDS = 2.0
_TICK_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


class Interruption:
    """Remembers SIGTERM, SIGINT and SIGUSR1 while it is active; a second one stops at once.

    Use as a context manager around the run, its end included: a signal must not cut off what the first one began.

    Python calls a handler between two steps of the main thread, which may be seconds after the signal came: while a
    collective, a disk or the import of a library keeps that thread. So the handler only remembers the first signal, and
    a thread of its own, to which the C library hands every signal as it comes, tells echoes from second ones by when
    they came. It also stops a process whose main thread never comes back.

    Attributes:
        signal: SIGTERM or SIGINT once one has come, else 0.
    """

    any_seen: ClassVar[bool] = False  # in this process, ever

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1
        self._pipe: tuple[int, int] | None = None
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> "Interruption":
        self._pipe = come, sent = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._previous_fd = signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
        for number in ENDING:
            self._previous[number] = signal.signal(number, self._handle)
        self._watcher = threading.Thread(target=_stop_at_a_second, args=(come,), name="wmtp-signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        assert self._pipe is not None
        assert self._watcher is not None
        come, sent = self._pipe
        os.close(sent)  # which the thread takes for its end
        self._watcher.join()
        os.close(come)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        Interruption.any_seen = True
        if not self.signal:
            self.signal = ENDING[signal.Signals(number)]


def _stop_at_a_second(come: int) -> None:
    """End the process when a signal has surely come more than `ECHO_SECONDS` after the first.

    Args:
        come: a pipe that gets each signal's number as a byte when it comes.
    """
    first: float | None = None
    emptied = time.monotonic()
    while True:
        select.select([come], [], [], None if first is None else _TICK_SECONDS)
        # What is in the pipe now has come since it was last emptied. That is a tick ago, or longer if the process, or
        # this thread, could not run: then nobody knows, and a checkpoint that is being saved matters more.
        since, emptied = emptied, time.monotonic()
        try:
            numbers = os.read(come, 1024)
        except BlockingIOError:
            continue
        if not numbers:
            return
        for number in numbers:
            if number not in ENDING:
                continue
            if first is None:
                first = emptied
            elif since - first > ECHO_SECONDS:
                os._exit(128 + ENDING[signal.Signals(number)])


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the launcher dies, so that no rank trains on as an orphan (Linux).

    A launcher that has died before this was asked for can no longer be waited for: then it ends now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if "CROSS_RANK" in os.environ and _is_adopted():  # DeepSpeed's launcher has set it
            os.kill(os.getpid(), signal.SIGTERM)


def _is_adopted() -> bool:
    """Whether this process has been handed to the one that takes in orphans."""
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return True
    return (parent == 1 or command.startswith((b"/lib/systemd/", b"/usr/lib/systemd/"))) and b"deepspeed" not in command
