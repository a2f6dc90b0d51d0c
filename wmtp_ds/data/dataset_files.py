"""Writes data sets: JSONL files beside a manifest that tells what they were made from.

A file takes its place only when it is complete, and the manifest comes last: a folder whose manifest fits its
files was written to the end.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

from wmtp_ds.errors import RunError, UserError

MANIFEST = "manifest.json"
# The modules, by the beginning of their names, on which it depends what rows say.
_DECIDING = (
    "frames",
    "harness",
    "humaneval",
    "isolation",
    "label_file",
    "labelled_rows",
    "labels",
    "mbpp",
    "mutate",
    "problem",
    "processes",
    "sample",
    "sandbox",
    "seccomp",
)


def code_version() -> str:
    """A hash of the code that decides what the rows say, and of the Python version, which writes their sources."""
    digest = hashlib.sha256(f"{sys.version_info.major}.{sys.version_info.minor}".encode())
    folder = resources.files("wmtp_ds.data")
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".py") and entry.name.startswith(_DECIDING):
            digest.update(entry.name.encode() + b"\0" + entry.read_bytes())
    return digest.hexdigest()[:16]


def finished(directory: Path, made_from: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest, if the folder holds a complete data set made from exactly this; else None.

    Args:
        directory: the folder.
        made_from: the parameters, as given to ``write_dataset``.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if manifest["made_from"] != dict(made_from):
            return None
        for name, expected in manifest["files"].items():
            if sha256_of(directory / name) != expected["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(manifest)


def prepare_folder(directory: Path) -> None:
    """Make the folder, so that a wrong path shows before the work and not after it.

    Raises:
        UserError: the path is no folder, or may not be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{directory}: is not a folder: give --output a folder") from None
    except OSError as error:
        raise UserError(f"{directory}: cannot be made: {error.strerror}") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"{directory}: may not be written to: give another --output, or change its permissions")


def write_dataset(
    directory: Path,
    files: Mapping[str, Sequence[Mapping[str, Any]]],
    made_from: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> None:
    """Write rows as JSONL files, and the manifest.

    Args:
        directory: made where it is missing.
        files: rows by file name.
        made_from: what the rows were made from; plain JSON.
        summary: what a reader wants to know of them; plain JSON.

    Raises:
        UserError: the path is no folder, or may not be written to.
        RunError: writing failed (a full disk).
    """
    prepare_folder(directory)
    told: dict[str, Any] = {}
    try:
        (directory / MANIFEST).unlink(missing_ok=True)
        for name, rows in files.items():
            with _replacing(directory / name) as handle:
                for row in rows:
                    handle.write(json.dumps(row).encode() + b"\n")
            told[name] = {"rows": len(rows), "sha256": sha256_of(directory / name)}
        manifest = {"made_from": dict(made_from), "files": told, "summary": dict(summary)}
        with _replacing(directory / MANIFEST) as handle:
            handle.write(json.dumps(manifest, indent=2).encode() + b"\n")
    except PermissionError as error:
        raise UserError(f"{error.filename}: may not be written: {error.strerror}") from None
    except OSError as error:
        raise RunError(f"{directory}: writing failed: {error.strerror}; nothing there counts as finished") from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes ``path``'s place once it is complete and on disk."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    current = os.umask(0o022)
    os.umask(current)
    return current


def fingerprint_of(told: Any) -> str:
    """A hash of plain JSON."""
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
