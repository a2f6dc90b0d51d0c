"""The index of a data file: a few numbers a row, so that sampling never reads the file itself.

One streaming pass checks every line and keeps six columns (about 25 bytes a row) and the problems' names. The
result is cached beside the data as ``.<name>.index.npz`` (in the user's cache folder where the data cannot be
written to), keyed by the file's size and modification time.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
import weakref
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from wmtp_ds.data.rows import Row, parse_row, read_lines
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.files import open_file

CACHE_SCHEMA = 1  # raise it whenever a column, its meaning or a check of the rows changes

logger = logging.getLogger(__name__)

_COLUMNS: dict[str, type[np.generic]] = {
    "offset": np.int64,
    "line": np.int64,
    "problem": np.int32,
    "is_correct": np.bool_,
    "difficulty": np.int32,
    "output_bytes": np.int32,
}


@dataclass(frozen=True, eq=False)
class DataIndex:
    """The columns of a data file, one entry a row, and the rows themselves by number.

    Attributes:
        path: the data file.
        offset: int64 [rows], the first byte of the row's line in the file.
        line: int64 [rows], the number of that line, counted from 1 (blank lines are no rows).
        problem: int32 [rows], the row's problem as a position in ``problem_names``.
        is_correct: bool [rows].
        difficulty: int32 [rows], at least 1, or 0 where unknown.
        output_bytes: int32 [rows], the length of the solution in UTF-8 bytes.
        problem_names: the ``problem_id`` of each problem, in order of first appearance.
        fingerprint: SHA-256 (hex) of the file's bytes.
    """

    path: Path
    offset: npt.NDArray[np.int64]
    line: npt.NDArray[np.int64]
    problem: npt.NDArray[np.int32]
    is_correct: npt.NDArray[np.bool_]
    difficulty: npt.NDArray[np.int32]
    output_bytes: npt.NDArray[np.int32]
    problem_names: list[str]
    fingerprint: str
    _size: int
    _descriptor: int

    def __post_init__(self) -> None:
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return len(self.offset)

    def read_row(self, i: int) -> Row:
        """Read row ``i`` (0 <= i < len) from the file. Safe to call from several threads at once.

        Raises:
            RunError: the file has changed since it was indexed.
        """
        try:
            row = parse_row(self._bytes(i), self.path, int(self.line[i]))
        except UserError as error:
            raise self._changed(i) from error
        if (
            row.is_correct != self.is_correct[i]
            or row.difficulty != self.difficulty[i]
            or row.problem_id != self.problem_names[self.problem[i]]
            or len(row.output.encode()) != self.output_bytes[i]
        ):
            raise self._changed(i)
        return row

    def where(self, i: int) -> str:
        """File and line of row ``i``, for messages and reports."""
        return f"{self.path}:{self.line[i]}"

    def read_line(self, i: int) -> bytes:
        """Row ``i`` as it stands in the file, without its line end."""
        return self._bytes(i).partition(b"\n")[0].removesuffix(b"\r")

    def _bytes(self, i: int) -> bytes:
        """Row ``i``, its line end, and blank lines that follow."""
        start = int(self.offset[i])
        end = int(self.offset[i + 1]) if i + 1 < len(self) else self._size
        return os.pread(self._descriptor, end - start, start)

    def _changed(self, i: int) -> RunError:
        return RunError(
            f"{self.path}:{self.line[i]}: the file has changed while it was in use: start again, and write changed "
            "data to a new file"
        )


def build_index(path: str | Path) -> DataIndex:
    """Index a data file, or load its index from the cache.

    Any number of processes may do this at once. It takes one pass over the file, in memory that does not grow
    but for the columns; every line is checked.

    Raises:
        UserError: no such file, no rows, a malformed line (with file, line and key), or a file that is still
            being written.
    """
    path = Path(path)
    with _open(path) as handle:
        before = os.fstat(handle.fileno())
        loaded = _load_cache(path, before)
        if loaded is None:
            started = time.monotonic()
            logger.info("indexing %s (%.1f MiB)", path, before.st_size / 2**20)
            loaded = _scan(handle, path)
            after = os.fstat(handle.fileno())
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise UserError(f"{path}: the file is still being written: wait until that is done, then start again")
            logger.info("indexed %d rows in %.1f s", len(loaded["offset"]), time.monotonic() - started)
            _store_cache(path, before, loaded)
        return DataIndex(path=path, _size=before.st_size, _descriptor=os.dup(handle.fileno()), **loaded)


def _open(path: Path) -> BinaryIO:
    try:
        return open_file(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such data file: correct dataset.train or dataset.validation, or make the sample data with "
            "`wmtp-ds data sample`"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder: name the JSONL file in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the data file: {error.strerror}") from None


def _scan(handle: BinaryIO, path: Path) -> dict[str, Any]:
    """The pass over the file: every column, ``problem_names`` and ``fingerprint``."""
    offsets, lines, problems = array("q"), array("q"), array("i")
    correct, difficulties, lengths = array("B"), array("i"), array("i")
    codes: dict[str, int] = {}
    digest = hashlib.sha256()
    for offset, line_number, line in read_lines(handle, path):
        digest.update(line)
        if line.isspace():
            continue
        row = parse_row(line, path, line_number)
        offsets.append(offset)
        lines.append(line_number)
        problems.append(codes.setdefault(row.problem_id, len(codes)))
        correct.append(row.is_correct)
        difficulties.append(row.difficulty)
        lengths.append(len(row.output.encode()))
    if not offsets:
        raise UserError(f"{path}: the data file has no rows: write one solution a line, as JSON objects")
    columns = zip(_COLUMNS.items(), (offsets, lines, problems, correct, difficulties, lengths), strict=True)
    found: dict[str, Any] = {name: np.asarray(values).astype(dtype) for (name, dtype), values in columns}
    return found | {"problem_names": list(codes), "fingerprint": digest.hexdigest()}


def _cache_files(path: Path) -> Iterator[Path]:
    """Where a cache may lie: beside the data, else in the user's cache folder."""
    yield path.parent / f".{path.name}.index.npz"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "wmtp-ds" / "index"
    yield folder / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.npz"


def _cache_key(status: os.stat_result) -> list[int]:
    return [CACHE_SCHEMA, status.st_size, status.st_mtime_ns]


def _load_cache(path: Path, status: os.stat_result) -> dict[str, Any] | None:
    """The cached index of this very file, or None. Whatever is wrong with a cache, it is only made again."""
    for cache in _cache_files(path):
        try:
            with open_file(cache) as file, np.load(file, allow_pickle=False) as stored:
                text = json.loads(stored["text"].tobytes())
                if text["key"] != _cache_key(status):
                    continue
                loaded: dict[str, Any] = {name: stored[name] for name in _COLUMNS}
        except FileNotFoundError:
            continue
        except Exception as error:  # a damaged archive raises about anything
            logger.warning("%s: unreadable index cache, made again (%s)", cache, error)
            continue
        loaded |= {"problem_names": text["problem_names"], "fingerprint": text["fingerprint"]}
        return loaded
    return None


def _store_cache(path: Path, status: os.stat_result, found: dict[str, Any]) -> None:
    """Write the cache, atomically: readers see the old file or the new one, also while several ranks write."""
    text = {"key": _cache_key(status), "problem_names": found["problem_names"], "fingerprint": found["fingerprint"]}
    arrays = {name: found[name] for name in _COLUMNS}
    arrays["text"] = np.frombuffer(json.dumps(text).encode(), np.uint8)
    for cache in _cache_files(path):
        temporary = None
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=cache.parent, prefix=cache.name, delete=False) as handle:
                temporary = handle.name
                np.savez(handle, **arrays)
            os.chmod(temporary, 0o644)  # a shared data folder: what one user indexed, the others may read
            os.replace(temporary, cache)
            return
        except OSError as error:
            logger.debug("%s: index cache not written (%s)", cache, error)
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
    logger.info("%s: no place to cache its index, so each start makes it again", path)
