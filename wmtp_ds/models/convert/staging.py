"""A model's folder while it is written: beside its destination, under a name that nothing takes for a model.

A file is recorded as done once it is on the disk. After an interruption the same conversion goes on behind the files
that are done; another one starts afresh. The folder gets its name last, when all of it was read back and found right.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from wmtp_ds.errors import RunError, UserError
from wmtp_ds.files import nearest_folder, read_json, sync, try_lock, write_atomically

_PROGRESS = ".progress.json"
# What may be replaced with --force: a folder with one of these is a model's.
_MODEL_FILES = ("config.json", "params.json")

Writer = Callable[[Path], dict[str, str]]


class Staging:
    """The folder being written; a context in which it is this process's alone.

    Leaving it by an error of the input removes it; after an interruption or a full disk the files that are done stay,
    to go on from.

    Args:
        final: where the folder will be.
        plan: all that decides what is written; files of another plan are thrown away.

    Raises:
        UserError: if another process is writing there, or the place cannot be written to.
    """

    def __init__(self, final: Path, plan: Mapping[str, Any]):
        self.final = final
        self.folder = partial_of(final)
        self._plan = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        self._done: dict[str, dict[str, str]] = {}
        self.resumed: list[str] = []

    def __enter__(self) -> "Staging":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be made: {error.strerror}. Name another destination.") from None
        if not try_lock(self._lock):
            os.close(self._lock)
            raise UserError(f"{self.final} is being written by another process. Wait for it, or end it.")
        self._done = self._read_progress()
        for entry in self.folder.iterdir():
            if entry.name not in self._done and entry.name != _PROGRESS:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)
        if error is None:
            return
        keeps = not isinstance(error, UserError) and self._done
        if not keeps:
            shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._explain(error, bool(keeps)) from error

    def _read_progress(self) -> dict[str, dict[str, str]]:
        try:
            progress = read_json(self.folder / _PROGRESS)
            if progress["plan"] != self._plan:
                return {}
            sizes = {name: entry["size"] for name, entry in progress["files"].items()}
            if any((self.folder / name).stat().st_size != size for name, size in sizes.items()):
                return {}
            return {name: dict(entry["sums"]) for name, entry in progress["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def write(self, name: str, writer: Writer) -> dict[str, str]:
        """Write a file of weights, unless it was done before an interruption.

        Args:
            name: of the file.
            writer: writes a path, and returns the SHA-256 of each tensor in it.

        Returns:
            The SHA-256 of each tensor.
        """
        if name in self._done:
            self.resumed.append(name)
            return self._done[name]
        sums = writer(self.folder / name)
        self._done[name] = sums
        files = {done: {"size": (self.folder / done).stat().st_size, "sums": self._done[done]} for done in self._done}
        write_atomically(self.folder / _PROGRESS, json.dumps({"plan": self._plan, "files": files}))
        return sums

    def publish(self) -> None:
        """Give the folder its name; what was there before goes."""
        for file in self.folder.iterdir():
            sync(file)
        (self.folder / _PROGRESS).unlink(missing_ok=True)
        sync(self.folder)
        old = self.final.with_name(f".old-{self.final.name}")
        if self.final.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.final.rename(old)
        try:
            self.folder.rename(self.final)
        except OSError:
            if old.exists():
                old.rename(self.final)
            raise
        sync(self.final.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _explain(self, error: OSError, keeps: bool) -> RunError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "Free space" if full else "Mend that"
        on = f" The {len(self._done)} files that are done are kept in {self.folder}." if keeps else ""
        what = "the disk is full" if full else str(error)
        return RunError(f"{self.final} could not be written: {what}. {mend}, and run the same command again.{on}")


def partial_of(final: Path) -> Path:
    """Where a folder lies while it is written."""
    return final.with_name(f".partial-{final.name}")


def check_destination(final: Path, source: Path, *, force: bool) -> None:
    """The destination is free, or may be replaced.

    Raises:
        UserError: if it is not, or lies in the source or around it, or is no name for a folder.
    """
    if final.name in ("", ".."):
        raise UserError(f"{final} cannot be made anew. Name the model's own folder, which is made there.")
    try:
        mine, other = Path(os.path.realpath(final)), Path(os.path.realpath(source))
        partial_of(final).exists()  # a name may be too long, or lead in a circle
    except (OSError, RuntimeError) as error:
        raise UserError(f"{final} cannot be made of {source}: {error}. Name another destination.") from None
    if mine == other or mine in other.parents or other in mine.parents:
        raise UserError(f"{final} and {source} lie in each other. Name another destination.")
    if not os.path.lexists(final):
        return
    if not final.is_dir() or final.is_symlink():
        raise UserError(f"{final} exists and is no folder. Name another destination.")
    if not any(final.iterdir()):
        return
    if not force:
        raise UserError(f"{final} exists. Name another destination, or replace it with --force.")
    if not any((final / name).is_file() for name in _MODEL_FILES):
        raise UserError(f"{final} exists and is no model's folder: --force does not replace it. Remove it yourself.")


def check_space(final: Path, needed: int) -> None:
    """There is room for as many bytes, less those of an interrupted attempt.

    Raises:
        UserError: if there is not.
    """
    held = sum(file.stat().st_size for file in partial_of(final).glob("*") if file.is_file())
    free = shutil.disk_usage(nearest_folder(final.parent)).free
    if needed > free + held:
        raise UserError(
            f"{final} takes {needed / 1e9:.1f} GB, but there are {(free + held) / 1e9:.1f} GB free. Free space, or "
            "name another destination."
        )
