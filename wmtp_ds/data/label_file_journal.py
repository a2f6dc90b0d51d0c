"""What came of the rows that have run, beside the file that is to be, so that the work goes on after a kill."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from wmtp_ds.errors import RunError, UserError
from wmtp_ds.files import open_file, try_lock


def begun_from(journal: Path, *, needs_entry: bool = False) -> dict[str, Any] | None:
    """What the work in a journal was made from; None where it did not come to say that.

    Args:
        journal: its file.
        needs_entry: None also where nothing is entered yet.

    Raises:
        OSError: it cannot be read.
    """
    with contextlib.suppress(ValueError, RecursionError), open_file(journal) as file:
        first = json.loads(file.readline())
        return first if isinstance(first, dict) and (file.readline() or not needs_entry) else None
    return None


class Journal:
    """A line of JSON a row, in the rows' order; a context in which it is this process's alone.

    Args:
        output: the file that is to be.
        made_from: all that decides what comes of a row; what is there from something else is thrown away.
        is_entry: whether an object is an entry; from the first line that is none, all is thrown away.

    Attributes:
        entries: how many rows are in it.

    Raises:
        UserError: it cannot be made, or another process has it.
        RunError: writing failed.
    """

    def __init__(
        self,
        output: Path,
        made_from: Mapping[str, Any],
        is_entry: Callable[[dict[str, Any]], bool] = lambda entry: True,
    ):
        self._is_entry = is_entry
        self.path = output.with_name(f".partial-{output.name}.journal")
        self.entries = 0
        self._output = output
        self._first = json.dumps(dict(made_from), sort_keys=True).encode() + b"\n"

    def __enter__(self) -> "Journal":
        try:
            self._file = self.path.open("a+b")
        except OSError as error:
            raise UserError(f"{self._output}: may not be written: {error.strerror}: give another --output") from None
        if not try_lock(self._file):
            self._file.close()
            raise UserError(f"{self._output}: another process is writing it: wait for it, or end it")
        try:
            self._take_up()
        except OSError as error:
            self._close()
            raise RunError(f"{self._output}: writing failed: {error.strerror}: mend that, and try again") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # of what could not be written: that was an error before
            self._file.close()

    def _take_up(self) -> None:
        """Keep whole lines up to the first that is damaged."""
        self._file.seek(0)
        good = 0
        if self._file.readline() == self._first:
            good = len(self._first)
            for line in self._file:
                if not self._is_whole(line):
                    break
                good += len(line)
                self.entries += 1
        self._file.truncate(good)
        if not good:
            self._file.write(self._first)
            self._file.flush()

    def _is_whole(self, line: bytes) -> bool:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return False
        return line.endswith(b"\n") and isinstance(entry, dict) and self._is_entry(entry)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Enter what came of the next row."""
        self._file.write(json.dumps(dict(entry)).encode() + b"\n")
        self._file.flush()
        self.entries += 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            file.readline()
            for line in file:
                yield json.loads(line)

    def remove(self) -> None:
        """The work is done."""
        self.path.unlink(missing_ok=True)
