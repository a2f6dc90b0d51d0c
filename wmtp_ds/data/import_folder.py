"""A data set's folder while an import writes it: beside its destination, under a name that nothing takes for data.

Files grow by lines. Now and then the import commits: what was written so far is on the disk, and a journal says how
much that is and where in its source the import stands. After an interruption (a kill, a full disk) the same command
cuts the files back to the last commit and goes on from there; another command starts afresh. The folder gets its
name last.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from wmtp_ds.data.dataset_files import MANIFEST, finished
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.files import read_json, sha256_of, sync, try_lock, write_atomically

PROBLEMS = "problems.jsonl"
SPLITS: tuple[str, ...] = ("train", "validation", "evaluation")
LISTED = 100  # of what was skipped for one reason, so many are named in the manifest

_JOURNAL = ".journal.json"
_NOTES = ".notes"


def finished_import(output: Path, made_from: Mapping[str, Any], *, force: bool) -> dict[str, Any] | None:
    """The summary of a finished import that was made from exactly this; None if the folder is to be written.

    Args:
        output: the folder.
        made_from: what decides its contents. Where only ``code`` differs, the folder is made again.
        force: whether other data may be replaced.

    Raises:
        UserError: there is something else, which is not to be replaced.
    """
    if not os.path.lexists(output):
        return None
    if not output.is_dir():
        raise UserError(f"{output}: is not a folder: give --output a folder")
    manifest = finished(output, made_from)
    if manifest is not None and not force:
        return {**manifest["summary"], "reused": True}
    names = {entry.name for entry in output.iterdir()}
    if not names:
        return None
    try:
        found = read_json(output / MANIFEST)
        before, own = dict(found["made_from"]), {MANIFEST, *found["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{output}: has files in it that no import made: give --output another folder") from None
    others = sorted(name for name in names - own if not name.startswith("."))
    wanted = dict(made_from)
    other_code = before != wanted and before | {"code": ""} == wanted | {"code": ""}
    if not (force or other_code):
        raise UserError(f"{output}: {_difference(before, wanted)}: give another --output, or --force to replace it")
    if others:
        raise UserError(
            f"{output}: is to be replaced, but {others[0]} in it is no file of the import: move it elsewhere, or "
            "give another --output"
        )
    return None


def _difference(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    keys = [key for key in wanted if before.get(key) != wanted[key]]
    if not keys:
        return "holds this import, but its files have changed since"
    if "command" in keys:
        return f"holds data of another command ({before.get('command')})"
    told = ", ".join(
        f"{key} was {before.get(key)!r}, not {wanted[key]!r}" if key not in ("source", "code") else f"other {key}"
        for key in keys
    )
    return f"holds data made with other options ({told})"


class ImportFolder:
    """The folder being written; a context in which it is this process's alone.

    Leaving it by a ``UserError`` removes it; after anything else, what was committed stays, to go on from.

    Args:
        output: the folder that is to be.
        made_from: all that decides what is written; what was committed from something else is thrown away.

    Attributes:
        state: what the last commit before an interruption was given, or None at the beginning.
        splits: counts of each split's problems and rows.
        skipped: for each reason how many were skipped, and the first ``LISTED`` of them.
    """

    def __init__(self, output: Path, made_from: Mapping[str, Any]):
        self.output = output
        self.state: dict[str, Any] | None = None
        self.splits: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, dict[str, Any]] = {}
        self._final = Path(os.path.realpath(output))
        self._folder = self._final.with_name(f".partial-{self._final.name}")
        self._made_from = dict(made_from)
        self._plan = hashlib.sha256(json.dumps(self._made_from, sort_keys=True).encode()).hexdigest()
        self._files: dict[str, BinaryIO] = {}
        self._rows: dict[str, int] = {}

    def __enter__(self) -> "ImportFolder":
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{self.output}: cannot be made: {error.strerror}: give another --output") from None
        if not try_lock(self._lock):
            os.close(self._lock)
            raise UserError(f"{self.output}: another process is writing it: wait for it, or end it")
        try:
            self._go_on()
        except OSError as error:
            os.close(self._lock)
            raise self._explain(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        os.close(self._lock)
        if error is None:
            return
        if (isinstance(error, UserError) and not isinstance(error, RunError)) or self.state is None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._explain(error) from error

    def _go_on(self) -> None:
        """Take up what an interrupted import has committed, and remove the rest."""
        sizes: dict[str, int] = {}
        try:
            journal = read_json(self._folder / _JOURNAL)
            is_whole = journal.pop("checksum") == _checksum(journal)
            if (
                is_whole
                and journal["plan"] == self._plan
                and all((self._folder / name).stat().st_size >= size for name, size in journal["sizes"].items())
            ):
                sizes = dict(journal["sizes"])
                self.state, self._rows = journal["state"], dict(journal["rows"])
                self.splits, self.skipped = journal["splits"], journal["skipped"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        for entry in self._folder.iterdir():
            if entry.name in sizes:
                os.truncate(entry, sizes[entry.name])
            elif entry.name != _JOURNAL or not sizes:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def add_problem(self, split: str, problem: Mapping[str, Any] | None) -> None:
        """Write a problem, once, before or after its rows.

        Args:
            split: train, validation or evaluation.
            problem: a line of problems.jsonl; None for one without tests, which is only counted.
        """
        self._count(split)["problems"] += 1
        if problem is not None:
            self._append(PROBLEMS, problem)

    def add_row(self, split: str, row: Mapping[str, Any]) -> None:
        """Write a row to its split's file."""
        counts = self._count(split)
        counts["rows"] += 1
        counts["correct" if row["is_correct"] else "incorrect"] += 1
        difficulty = str(row.get("difficulty", 0))
        counts["by_difficulty"][difficulty] = counts["by_difficulty"].get(difficulty, 0) + 1
        self._append(f"{split}.jsonl", row)

    def skip(self, reason: str, what: str = "", count: int = 1) -> None:
        """Count something that is not imported; ``what`` names it for the manifest."""
        entry = self.skipped.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += count
        if what and len(entry["first"]) < LISTED:
            entry["first"].append(what)

    def note(self, line: bytes) -> None:
        """Keep a line that the import needs when it goes on; ``notes`` gives it back. It is not in the data set."""
        self._handle(_NOTES).write(line + b"\n")

    def notes(self) -> Iterator[bytes]:
        """The lines that were noted up to the last commit before an interruption."""
        with contextlib.suppress(FileNotFoundError), (self._folder / _NOTES).open("rb") as file:
            for line in file:
                yield line[:-1]

    def commit(self, state: Mapping[str, Any]) -> None:
        """Put all on the disk, so that the import goes on from here after an interruption.

        Args:
            state: where the import stands; plain JSON.
        """
        self._sync_files()
        journal = {
            "plan": self._plan,
            "state": dict(state),
            "sizes": {
                entry.name: entry.stat().st_size
                for entry in self._folder.iterdir()
                if entry.name == _NOTES or entry.name in self._rows
            },
            "rows": self._rows,
            "splits": self.splits,
            "skipped": self.skipped,
        }
        write_atomically(self._folder / _JOURNAL, json.dumps(journal | {"checksum": _checksum(journal)}))
        self.state = dict(state)

    def publish(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest and give the folder its name; what was there before goes.

        Args:
            extra: what the summary says besides the counts; plain JSON.

        Returns:
            The summary, with ``reused`` false.
        """
        self._sync_files()
        for counts in self.splits.values():
            spread: dict[str, int] = counts["by_difficulty"]
            counts["by_difficulty"] = {key: spread[key] for key in sorted(spread, key=int)}
        splits = {name: self.splits[name] for name in SPLITS if name in self.splits}
        summary: dict[str, Any] = {**splits, **extra}
        files = {
            name: {"rows": rows, "sha256": sha256_of(self._folder / name)} for name, rows in sorted(self._rows.items())
        }
        manifest = {"made_from": self._made_from, "files": files, "summary": summary}
        write_atomically(self._folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        old = self._final.with_name(f".old-{self._final.name}")
        shutil.rmtree(old, ignore_errors=True)
        if self._final.exists() and any(self._final.iterdir()):
            self._final.rename(old)
        self._folder.replace(self._final)
        sync(self._final.parent)
        shutil.rmtree(old, ignore_errors=True)
        for name in (_JOURNAL, _NOTES):
            (self._final / name).unlink(missing_ok=True)
        return {**summary, "reused": False}

    def _sync_files(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def _count(self, split: str) -> dict[str, Any]:
        return self.splits.setdefault(
            split, {"rows": 0, "problems": 0, "correct": 0, "incorrect": 0, "by_difficulty": {}}
        )

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        self._rows[name] = self._rows.get(name, 0) + 1
        self._handle(name).write(json.dumps(record).encode() + b"\n")

    def _handle(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = (self._folder / name).open("ab")
        return self._files[name]

    def _explain(self, error: OSError) -> RunError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else str(error)
        mend = "free space" if full else "mend that"
        kept = f"; the work so far is kept in {self._folder}" if self.state is not None else ""
        return RunError(
            f"{self.output}: writing failed: {what}; nothing there counts as finished: {mend}, and run the same "
            f"command again{kept}"
        )


def _checksum(journal: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(journal, sort_keys=True).encode()).hexdigest()
