"""The files of checkpoints: what makes one complete, what is sound, what a crash has left. Imports no torch.

A checkpoint is a folder ``step_…`` with a manifest, written last, that lists every file with size and SHA-256. What is
not finished has another name, and what is removed gets another name first, so that under ``step_…`` lie whole
checkpoints only, whenever a process ends.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from wmtp_ds.errors import UserError
from wmtp_ds.files import read_json, read_text, sha256_of, sync, write_atomically

STEP_PREFIX = "step_"
MANIFEST = "manifest.json"
LATEST = "latest"
# Names of what is being written, replaced and removed; and of checkpoints made ready for another number of ranks.
PARTIAL, REPLACED, REMOVED = ".partial-", ".old-", ".removed-"
CONVERTED = ".universal"
# In the metrics.json of a checkpoint's export: the SHA-256 of the manifest that it was made from.
MADE_FROM = "manifest"


def step_name(step: int) -> str:
    """The name of a step's folder."""
    return f"{STEP_PREFIX}{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder's name says; None if the name is none of ours."""
    number = name.removeprefix(STEP_PREFIX)
    return int(number) if number != name and number.isdecimal() else None


def checkpoint_folders(root: Path) -> list[Path]:
    """Every checkpoint in a run's folder, complete or not, oldest first."""
    return sorted(folder for folder in root.glob(f"{STEP_PREFIX}*") if folder.is_dir())


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has the manifest that is written last; not whether its files are sound."""
    return (checkpoint / MANIFEST).is_file()


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first; completeness is the manifest's presence, not its truth.

    Steps beyond ``latest`` were left behind by a resume from an earlier checkpoint (of choice, or because they are
    damaged): they count as older than all others, lest they be resumed from or outlive newer ones.
    """
    folders = [folder for folder in checkpoint_folders(root) if is_complete(folder)]
    latest = read_latest(root)
    return folders if latest is None else sorted(folders, key=lambda folder: (folder.name <= latest, folder.name))


def read_latest(root: Path) -> str | None:
    """The name of the checkpoint that was saved last; None if it is not known."""
    try:
        return read_text(root / LATEST, most=4096).strip()
    except (OSError, ValueError):
        return None


def export_place(checkpoint: Path) -> Path:
    """Where the export of a checkpoint is that tools make when they first need one."""
    return checkpoint.with_name(f"exported_{checkpoint.name}")


def export_there(checkpoint: Path) -> Path | None:
    """The export of a checkpoint that tools have made; None if there is none, or it is of what was there before."""
    export = export_place(checkpoint)
    try:
        facts = read_json(export / "metrics.json")
        same = isinstance(facts, dict) and facts.get(MADE_FROM) == sha256_of(checkpoint / MANIFEST)
    except (OSError, ValueError):
        return None
    return export if same else None


def unfinished_saves(root: Path) -> list[str]:
    """Names of the checkpoints whose saving has not come to its end, oldest first."""
    partial = {folder.name.removeprefix(PARTIAL) for folder in root.glob(f"{PARTIAL}{STEP_PREFIX}*")}
    return sorted(partial | {folder.name for folder in checkpoint_folders(root) if not is_complete(folder)})


# --- manifests ---


def file_names(folder: Path) -> list[str]:
    """Every file in a folder and its folders, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def write_manifest(folder: Path, written: Iterable[str] = (), **facts: Any) -> None:
    """List every file of a folder with size and SHA-256, synced to disk: from here on the folder is complete.

    Args:
        folder: all is written there.
        written: files that are there for certain: a network file system may list another machine's late.
        facts: what else the manifest says; a checkpoint's has ``step``, ``world_size`` and ``global_batch``.
    """
    files = {}
    for name in sorted({*file_names(folder), *written} - {MANIFEST}):
        path = folder / name
        files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        sync(path)
    for path in folder.rglob("*"):
        if path.is_dir():
            sync(path)
    manifest = {**facts, "saved": datetime.now(UTC).isoformat(timespec="seconds"), "files": files}
    write_atomically(folder / MANIFEST, json.dumps(manifest | {"checksum": _checksum(manifest)}, indent=1) + "\n")


def _checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of all else that a manifest says."""
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        UserError: if there is none, it is damaged, or it names files outside the folder.
    """
    try:
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        for name in ("world_size", "global_batch", "step"):
            value = manifest[name] if name == "world_size" else manifest.get(name)
            if (value is not None or name == "world_size") and not _is_count(value, least=int(name != "step")):
                raise ValueError(f"its {name} is no number of its kind")
        if not manifest["files"]:
            raise ValueError("it lists no file")
        for name, entry in manifest["files"].items():
            if type(entry["size"]) is not int or not isinstance(entry["sha256"], str):
                raise ValueError(f"its entry of {name} is malformed")
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
                raise ValueError(f"{name!r} lies outside the checkpoint")
        if manifest.get("checksum", _checksum(manifest)) != _checksum(manifest):
            raise ValueError("it has changed: its checksum differs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} is not a complete checkpoint: {MANIFEST} cannot be read: {type(error).__name__}: {error}"
        ) from None
    return manifest


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**63


def verify_manifest(folder: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, compared with its manifest; None if nothing is.

    Args:
        folder: the checkpoint.
        contents: False compares presence and sizes alone, and the contents of the config: it takes no time.
    """
    try:
        for name, entry in read_manifest(folder)["files"].items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if not file.resolve().is_relative_to(folder.resolve()):
                return f"{name} is a link that leads out of the checkpoint"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['size']}"
            if (contents or name == "config.toml") and sha256_of(file) != entry["sha256"]:
                return f"{name} has changed: its SHA-256 differs"
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


# --- what a crash has left ---


def put_back(root: Path) -> None:
    """Undo what a crash in the middle of `replace_folder` has left: the old folder gets its name back."""
    for old in root.glob(f"{REPLACED}*"):
        if not (final := root / old.name.removeprefix(REPLACED)).exists():
            old.rename(final)


def leftovers(root: Path) -> list[Path]:
    """What no one will use again: unfinished and half removed folders, and conversions of what is gone."""
    found = [path for prefix in (PARTIAL, REMOVED) for path in root.glob(f"{prefix}*")]
    found += [path for path in root.glob(f"{REPLACED}*") if (root / path.name.removeprefix(REPLACED)).exists()]
    found += root.glob(f".{LATEST}.tmp")  # others may be the tracker's, which writes at any time
    found += [path for path in root.glob(f"{CONVERTED}/*") if not is_complete(root / path.name)]
    return sorted(found)


def remove_leftovers(root: Path) -> None:
    """Remove what a crash has left; nothing else may be writing to the folder."""
    put_back(root)
    for path in leftovers(root):
        _remove(path)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint and what was converted from it; a crash leaves no half of it under its name."""
    removed = folder.with_name(f"{REMOVED}{folder.name}")
    _remove(removed)
    folder.rename(removed)
    _remove(removed)
    _remove(folder.parent / CONVERTED / folder.name)


def replace_folder(partial: Path, final: Path) -> None:
    """Put a finished folder in the place of an older one; a crash leaves one or the other whole."""
    old = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        _remove(old)
        final.rename(old)
    partial.rename(final)
    sync(final.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# --- files ---


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
