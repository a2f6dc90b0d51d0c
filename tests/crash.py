"""Ends or fails a process at a chosen moment of its work on files: before each operation, and half-way in each write.

Only for processes that end afterwards: what watches them cannot be taken away again.
"""

import builtins
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Operations that a full disk can refuse; the others are there to be killed at.
_GROW = ("open", "os.mkdir", "os.rename", "fsync", "write")


class Moments:
    """Counts operations on files under a folder, and acts at the chosen one.

    Args:
        root: the folder.
        chosen: number of the moment to act at, from 0.
        act: what happens then.
        growing: count only operations that a full disk can refuse.
    """

    def __init__(self, root: Path, chosen: int, act: Callable[[], None], *, growing: bool = False):
        self.root, self.left, self.act, self.growing = str(root), chosen, act, growing
        self.watching = True

    def install(self) -> None:
        """Begin to watch."""
        sys.addaudithook(self._audit)
        fsync, opened = os.fsync, builtins.open

        def watched_fsync(descriptor: int) -> None:
            self.passes("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        def watched_open(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
            stream = opened(file, mode, *arguments, **keywords)
            return _Halved(stream, self, str(file)) if set(mode) & set("wax+") else stream

        os.fsync = watched_fsync
        io.open = builtins.open = watched_open

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and self.watching:
            self.passes(event, *(os.fsdecode(p) for p in arguments[:2] if isinstance(p, str | bytes | Path)))

    def passes(self, event: str, *paths: str) -> None:
        """One of the operations is about to happen."""
        if self._counts(event, *paths):
            self.act()

    def _counts(self, event: str, *paths: str) -> bool:
        # shutil.rmtree names files relative to a folder that it has opened.
        mine = any(path.startswith(self.root) or not path.startswith("/") for path in paths)
        if not self.watching or not mine:
            return False
        if self.growing and event not in _GROW:
            return False
        self.left -= 1
        if self.left == -1:
            self.watching = False
            return True
        return False


class _Halved:
    """A file opened for writing whose every write is a moment: half of it is there then."""

    def __init__(self, stream: Any, moments: Moments, path: str):
        self._stream, self._moments, self._path = stream, moments, path

    def write(self, data: Any) -> int:
        if self._moments._counts("write", self._path):
            self._stream.write(data[: len(data) // 2])
            self._stream.flush()
            self._moments.act()
        written: int = self._stream.write(data)
        return written

    def __enter__(self) -> "_Halved":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __iter__(self) -> Any:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def kill() -> None:
    """As kill -9: nothing runs after it."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    """As the operation of a full disk ends."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
