"""Signals end a run between two steps: handlers only set a flag, which all ranks agree on at the next step."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

# What ends a run, and the signal that its exit code tells of (128 plus its number): SLURM's warning counts as SIGTERM.
ENDING = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT, signal.SIGUSR1: signal.SIGTERM}
# A terminal signals every process of a command, and launchers pass on what they get: what follows a signal this soon
# is its echo. After that it is somebody who does not want to wait.
ECHO_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


class Interruption:
    """Remembers SIGTERM, SIGINT and SIGUSR1 while it is active; a second one stops at once.

    Use as a context manager around the run, its end included: a signal must not cut off what the first one began.

    Attributes:
        signal: SIGTERM or SIGINT once one has come, else 0.
    """

    any_seen: ClassVar[bool] = False  # in this process, ever

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        for number in ENDING:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        Interruption.any_seen = True
        if not self.signal:
            self.signal, self._since = ENDING[signal.Signals(number)], now
        elif now - self._since > ECHO_SECONDS:
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
