"""Files: those of others are read so that it comes to an end, ours are whole under their names. Imports nothing heavy.

A pipe nobody writes to, a device, a file of gigabytes where kilobytes belong, JSON nested a hundred thousand deep: each
is an error that says so, of the kinds that readers expect anyway (OSError and ValueError). What is written here is on
the disk when it is said to be.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

# Of a file that is read into memory as a whole: the largest tokenizer.json has a tenth of it.
MOST_BYTES = 256 * 2**20


def open_file(path: str | Path) -> BufferedReader:
    """Open a regular file to read bytes.

    Raises:
        OSError: there is none, or it is a folder, a pipe or a device, which might never end; ``strerror`` says so.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for a writer
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def version_of(path: str | Path) -> tuple[int, int, int]:
    """What tells whether a file is the one that it was: inode, size, time of change.

    Raises:
        OSError: it is gone.
    """
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """A whole regular file.

    Raises:
        OSError: as `open_file`; or the file has more than ``most`` bytes.
    """
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it is longer than {most / 2**20:g} MiB", str(path))
    return content


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """A whole regular file of UTF-8 text.

    Raises:
        OSError: as `read_bytes`.
        ValueError: it is not UTF-8.
    """
    return read_bytes(path, most).decode("utf-8")


def read_json(path: str | Path, most: int = MOST_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: as `read_bytes`.
        ValueError: it is not UTF-8, not JSON, or nested too deeply.
    """
    try:
        return json.loads(read_text(path, most))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def twice(names: list[str]) -> str | None:
    """The first name that occurs a second time, in time that grows with their number alone."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def sync(path: Path) -> None:
    """Make sure that a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(partial: Path, final: Path) -> None:
    """Give a finished file its name, on disk before it is seen."""
    sync(partial)
    partial.replace(final)
    sync(final.parent)


def write_atomically(file: Path, text: str) -> None:
    """Write a file (UTF-8) that has all of its text, or what it was before, whenever the machine stops."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    replace_file(temporary, file)


def sha256_of(file: Path) -> str:
    """SHA-256 (hex) of a regular file's bytes.

    Raises:
        OSError: as `open_file`.
    """
    with open_file(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def try_lock(file: int | IO[Any]) -> bool:
    """Lock an open file for this process alone, until it is closed or the process ends, however that ends.

    Returns:
        False if another process holds it. True on a file system without locks, where nobody can.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Wait until no other process is in such a context of the same file; nothing is left behind, after a kill neither.

    A file that cannot be opened, or whose file system knows no locks, keeps nobody waiting.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            # Network file systems lock for one alone only what is open for writing.
            mode = os.O_RDWR if os.access(file, os.W_OK) else os.O_RDONLY
            descriptor = os.open(file, mode | os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def nearest_folder(path: Path) -> Path:
    """The path, or the nearest above it that exists: whose disk the path would be on."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place
