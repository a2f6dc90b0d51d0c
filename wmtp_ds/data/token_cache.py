"""Token ids of a data file, made once and memory-mapped: shared by the ranks of a node, and by later runs.

A cache is a folder, named by a hash of all that its ids depend on: the data's content, the tokenizer's, the template,
the format. In it:

- ``tokens.npy``: uint16 or uint32 [tokens], prompt and solution of each row, one row after another;
- ``ends.npy``: int64 [rows, 2], where each row's prompt and its solution end in them;
- ``checksums.npy``: uint32 [rows], CRC-32 of each row's tokens, checked whenever the row is read;
- ``header.json``: what the folder is of, and the sizes of the files.

Prompt and solution are kept as they are tokenised, without BOS and EOS and not cut, so that ``dataset.max_length`` may
change. A cache is never more than that: what cannot be read or written is tokenised when it is needed, to the same ids.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from wmtp_ds.data.groups import Rows
from wmtp_ds.data.index import DataIndex
from wmtp_ds.data.rows import Row
from wmtp_ds.data.templates import Template
from wmtp_ds.data.text_encoder import Pair, TextEncoder, encode_rows
from wmtp_ds.files import read_json

FORMAT = 1  # raise it whenever the files or their meaning change
HEADER = "header.json"
PARTIAL = ".partial-"  # an unfinished folder's name starts with it

logger = logging.getLogger(__name__)

_CHUNK = 512  # rows that are tokenised together: enough for the tokenizer's threads, few to hold
_NOTICE_SECONDS = 3.0
_PROGRESS_SECONDS = 10.0
_POLL_SECONDS = 0.1
_FILES = ("tokens.npy", "ends.npy", "checksums.npy")


class TokenCache:
    """The tokens of a data file's rows, read from a folder. Safe to use from several threads at once."""

    def __init__(self, folder: Path, index: DataIndex, encode: Callable[[Sequence[Row]], list[Pair]]):
        """Open a folder.

        Args:
            folder: made by `open_token_cache`.
            index: of the same data file: rows that turn out damaged are read from it.
            encode: rows to token ids, for those.

        Raises:
            OSError: there is none, or it cannot be read.
            ValueError: it is damaged; says how.
        """
        header = read_json(folder / HEADER)
        for name in _FILES:
            size, expected = (folder / name).stat().st_size, header["files"][name]["bytes"]
            if size != expected:
                raise ValueError(f"{name} has {size} bytes, not {expected}")
        self.folder = folder
        self._index, self._encode = index, encode
        # Plain arrays over the maps: np.memmap's own slices cost more than what is in them.
        maps = [np.load(folder / name, mmap_mode="r").view(np.ndarray) for name in _FILES]
        self._tokens_T, self._ends, self._checksums_R = maps
        for name, array in (("ends.npy", self._ends), ("checksums.npy", self._checksums_R)):
            if zlib.crc32(np.ascontiguousarray(array).data) != header["files"][name]["crc32"]:
                raise ValueError(f"{name} has another checksum")
        if self._ends.shape != (len(index), 2) or self._checksums_R.shape != (len(index),):
            raise ValueError(f"it is of {len(self._ends)} rows, not {len(index)}")
        if self._tokens_T.shape != (header["tokens"],) or int(self._ends[-1, 1]) != header["tokens"]:
            raise ValueError(f"it has not the {header['tokens']} tokens of its header")
        self._doubted = False

    def lengths(self, row_ids: Rows | slice = slice(None)) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The number of tokens of prompts and of solutions, int64 [rows] each; of all rows by default."""
        if isinstance(row_ids, slice):
            begins, ends = np.concatenate([[0], self._ends[:-1, 1]]), self._ends
            return (ends[:, 0] - begins)[row_ids], (ends[:, 1] - ends[:, 0])[row_ids]
        begins, ends = self._begins(row_ids), self._ends[row_ids]
        return ends[:, 0] - begins, ends[:, 1] - ends[:, 0]

    def read(self, row_ids: Rows) -> list[Pair]:
        """Token ids of prompt and solution of each row; a damaged row's are made again from the data file.

        Raises:
            RunError: the data file is needed, and has changed since it was indexed.
        """
        row_ids = np.asarray(row_ids, np.int64)
        begins, ends = self._begins(row_ids).tolist(), self._ends[row_ids].tolist()
        return [self._read_one(int(i), begin, *end) for i, begin, end in zip(row_ids, begins, ends, strict=True)]

    def _begins(self, row_ids: Rows) -> npt.NDArray[np.int64]:
        # The row before row 0 is the last one: its end is not where row 0 begins.
        begins: npt.NDArray[np.int64] = np.where(row_ids > 0, self._ends[row_ids - 1, 1], 0)
        return begins

    def _read_one(self, row: int, begin: int, prompt_end: int, end: int) -> Pair:
        tokens = self._tokens_T[begin:end]
        if zlib.crc32(tokens.data) == self._checksums_R[row]:
            return tokens[: prompt_end - begin], tokens[prompt_end - begin :]
        if not self._doubted:
            self._doubted = True
            logger.warning(
                "%s: damaged at row %d: damaged rows are tokenised again, and the cache at the next start",
                self.folder,
                row,
            )
            with contextlib.suppress(OSError):
                (self.folder / HEADER).unlink()
        return self._encode([self._index.read_row(row)])[0]


def open_token_cache(
    index: DataIndex, encoder: TextEncoder, template: Template, cache_dir: Path | None
) -> TokenCache | None:
    """The cache of a data file's tokens; made first if need be, by one of the processes that ask for it.

    Processes that come meanwhile wait. One that is killed leaves only a folder that nobody takes for a cache.

    Args:
        index: of the data file.
        encoder: texts to token ids.
        template: rows to prompts.
        cache_dir: where caches lie; None for none.

    Returns:
        None where there is no cache and none can be made, after a warning: rows are tokenised as they are read.

    Raises:
        RunError: the data file has changed since it was indexed.
    """
    if cache_dir is None:
        return None

    def encode(rows: Sequence[Row]) -> list[Pair]:
        return encode_rows(encoder, template, rows)

    parts = {
        "format": FORMAT,
        "data": index.fingerprint,
        "tokenizer": encoder.fingerprint,
        "tokenizers": importlib.metadata.version("tokenizers"),
        "template": _fingerprint_of_template(template),
    }
    folder = cache_dir / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    cache = _open(folder, index, encode, say=False)
    if cache is not None:
        return cache
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _Lock(cache_dir / f".lock-{folder.name}", index.path) as lock:
            cache = _open(folder, index, encode, say=True)  # perhaps made while this process waited
            if cache is None and not lock.failed_meanwhile:
                try:
                    _make(folder, index, encode, encoder.vocabulary_size, parts, alone=lock.held)
                except OSError:
                    lock.mark_failed()
                    raise
                cache = TokenCache(folder, index, encode)
    except (OSError, ValueError) as error:
        logger.warning(
            "%s: no tokens can be kept there (%s): every run tokenises %s as it reads it. Make room or name another "
            'folder in dataset.cache_dir; "" turns the cache off',
            cache_dir,
            error.strerror or error if isinstance(error, OSError) else error,
            index.path,
        )
    return cache


def _fingerprint_of_template(template: Template) -> str:
    """What a template makes of a row with an input and of one without."""
    rows = [Row("p", "{instruction}", "", True, text) for text in ("", "{input}")]
    return hashlib.sha256("\0".join(template(row) for row in rows).encode()).hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _open(
    folder: Path, index: DataIndex, encode: Callable[[Sequence[Row]], list[Pair]], *, say: bool
) -> TokenCache | None:
    """The cache in a folder; None if there is none or it is damaged, whatever the damage; ``say`` so."""
    if not folder.exists():
        return None
    try:
        return TokenCache(folder, index, encode)
    except Exception as error:  # a damaged header or array raises about anything
        if say:
            logger.warning("%s: damaged token cache, made again (%s)", folder, error)
        return None


class _Lock:
    """Held by the process that makes a cache; where a file system has no locks, nobody holds it and all go on.

    Attributes:
        held: whether this process alone is inside.
        failed_meanwhile: whether another one tried in vain while this one waited: it need not try the same.
    """

    def __init__(self, path: Path, data: Path):
        self.held = self.failed_meanwhile = False
        self._path, self._data = path, data
        self._descriptor = -1

    def __enter__(self) -> Self:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        failures = self._failures()
        waited = False
        while not self.held:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.held = True
            except BlockingIOError:
                if not waited:
                    logger.info("waiting for another process that tokenises %s", self._data)
                waited = True
                time.sleep(_POLL_SECONDS)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    os.close(self._descriptor)
                    raise
                return self
        self.failed_meanwhile = self._failures() > failures
        return self

    def mark_failed(self) -> None:
        """Tell those who wait. The file's length is what counts: a hole fits on a full disk, too."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, self._failures() + 1)

    def _failures(self) -> int:
        return os.fstat(self._descriptor).st_size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


class _ArrayFile:
    """A .npy file that grows along its first axis, whose length its header gets at the end."""

    def __init__(self, path: Path, dtype: npt.DTypeLike, row: tuple[int, ...] = ()):
        self._file, self._dtype, self._row = path.open("wb"), np.dtype(dtype), row
        self._length = self.crc32 = 0
        self._write_header()
        self._start = self._file.tell()

    def append(self, values: npt.NDArray[Any]) -> None:
        data = np.ascontiguousarray(values, self._dtype)
        self.crc32 = zlib.crc32(data.data, self.crc32)
        self._length += len(data)
        self._file.write(data.data)

    def close(self) -> int:
        """Complete the file; returns its size in bytes."""
        size = self._file.tell()
        self._file.seek(0)
        self._write_header()
        # numpy leaves room in a header for an array that grows.
        assert self._file.tell() == self._start, "the header has grown"
        self._file.close()
        return size

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # what is still to be written no longer matters
            self._file.close()

    def _write_header(self) -> None:
        shape = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length, *self._row)}
        np.lib.format.write_array_header_1_0(self._file, shape)


def _make(
    folder: Path,
    index: DataIndex,
    encode: Callable[[Sequence[Row]], list[Pair]],
    vocabulary_size: int,
    parts: dict[str, Any],
    *,
    alone: bool,
) -> None:
    """Tokenise every row into ``folder``, which appears when it is complete. ``alone``: nobody else makes it now."""
    prefix = f"{PARTIAL}{folder.name}-"
    if alone:
        for left in folder.parent.glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        _write(partial, index, encode, np.uint16 if vocabulary_size <= 2**16 else np.uint32, parts)
        partial.chmod(0o755)  # a shared folder: what one user tokenised, the others may read
        if damaged := folder.exists():
            folder.rename(partial / "damaged")
        partial.rename(folder)
        if damaged:
            _remove(folder / "damaged")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(
    folder: Path,
    index: DataIndex,
    encode: Callable[[Sequence[Row]], list[Pair]],
    dtype: npt.DTypeLike,
    parts: dict[str, Any],
) -> None:
    kinds: tuple[tuple[npt.DTypeLike, tuple[int, ...]], ...] = ((dtype, ()), (np.int64, (2,)), (np.uint32, ()))
    files = [_ArrayFile(folder / name, kind, row) for name, (kind, row) in zip(_FILES, kinds, strict=True)]
    tokens, ends, checksums = files
    total = 0
    try:
        for rows in _progress(index):
            pairs = [tuple(ids.astype(dtype) for ids in pair) for pair in encode([index.read_row(i) for i in rows])]
            lengths = np.array([[len(prompt), len(solution)] for prompt, solution in pairs], np.int64)
            stops = total + lengths.cumsum().reshape(-1, 2)
            total = int(stops[-1, 1])
            joined = [np.concatenate(pair) for pair in pairs]
            tokens.append(np.concatenate(joined))
            ends.append(stops)
            checksums.append(np.array([zlib.crc32(row.data) for row in joined], np.uint32))
        sizes = {name: {"bytes": f.close(), "crc32": f.crc32} for name, f in zip(_FILES, files, strict=True)}
    except BaseException:
        for file in files:
            file.abandon()
        raise
    header = parts | {"file": str(index.path), "rows": len(index), "tokens": total, "files": sizes}
    (folder / HEADER).write_text(json.dumps(header, indent=1) + "\n")


def _progress(index: DataIndex) -> Iterator[range]:
    """The rows by the chunk; says how far it is where that takes more than a few seconds."""
    began, told = time.monotonic(), -1.0
    with _tokenizer_threads():
        for start in range(0, len(index), _CHUNK):
            yield range(start, min(start + _CHUNK, len(index)))
            done, seconds = min(start + _CHUNK, len(index)), time.monotonic() - began
            due = _NOTICE_SECONDS if told < 0 else told + _PROGRESS_SECONDS
            if seconds >= due and done < len(index):
                told = seconds
                left = seconds / done * (len(index) - done)
                logger.info("tokenising %s, once: %d of %d rows, %.0f s left", index.path, done, len(index), left)
    logger.info("tokenised %s: %d rows in %.1f s", index.path, len(index), time.monotonic() - began)


@contextlib.contextmanager
def _tokenizer_threads() -> Iterator[None]:
    """Let the tokenizer use every core inside: ranks start without that, because they all tokenise while they train."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
