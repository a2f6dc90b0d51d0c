"""Data sets on the disk: JSONL files beside a manifest that tells what they were made from.

The manifest comes last: a folder whose manifest fits its files was written to the end.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from wmtp_ds.files import read_json, sha256_of

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
        made_from: all that decides what is in it, as the manifest has it.
    """
    try:
        manifest = read_json(directory / MANIFEST)
        if manifest["made_from"] != dict(made_from):
            return None
        for name, expected in manifest["files"].items():
            if sha256_of(directory / name) != expected["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(manifest)


def fingerprint_of(told: Any) -> str:
    """A hash of plain JSON."""
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
