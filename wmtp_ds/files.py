"""Files that are whole under their names, and on the disk when they are said to be. Imports no torch."""

import hashlib
import os
from pathlib import Path


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
    """SHA-256 (hex) of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def nearest_folder(path: Path) -> Path:
    """The path, or the nearest above it that exists: whose disk the path would be on."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place
