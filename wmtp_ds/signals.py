"""Signals end a run between two steps: handlers only set a flag, which all ranks agree on at the next step."""

import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1


class Interruption:
    """Remembers SIGTERM and SIGINT while it is active; a second one stops at once.

    Use as a context manager around the training loop.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number


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
