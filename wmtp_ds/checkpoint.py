"""Checkpoints that survive a crash, and exports that need no DeepSpeed to read.

``save_dir/step_00000500/`` is written under a temporary name; when every rank is done, rank 0 adds a manifest with the
size and SHA-256 of each file, renames the folder, and points ``latest`` at it. A crash at any moment leaves the
checkpoint before it whole, and a damaged one is told by its manifest and never picked.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wmtp_ds import distributed
from wmtp_ds.engine import Engine
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.resume import MANIFEST, STEP_PREFIX, checkpoint_folders, is_complete

_PARTIAL = ".partial-"


class Checkpoints:
    """The periodic checkpoints of a run.

    Args:
        root: ``checkpoint.save_dir``.
        limit: keep this many of the newest; None keeps all.
        exclude_frozen: leave frozen parameters out (the critic's trunk).
    """

    def __init__(self, root: Path, *, limit: int | None = None, exclude_frozen: bool = False):
        self.root = root
        self.limit = limit
        self.exclude_frozen = exclude_frozen

    def save(self, engine: Engine, step: int, state: dict[str, Any], files: dict[str, str]) -> Path:
        """Save all that an exact resume needs; every rank must call this.

        Args:
            engine: its weights, optimizer and schedule.
            step: optimizer steps taken.
            state: of this rank, in plain types and tensors.
            files: name -> text, written beside the shards (the resolved config).

        Raises:
            RunError: if a file cannot be written (a full disk). The checkpoint before stays as it was.
        """
        name = f"{STEP_PREFIX}{step:08d}"
        partial, final = self.root / f"{_PARTIAL}{name}", self.root / name
        try:
            if distributed.is_main():
                for leftover in self.root.glob(f"{_PARTIAL}{STEP_PREFIX}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                partial.mkdir(parents=True)
            distributed.barrier()
            engine.save_state(self.root, partial.name, state, exclude_frozen=self.exclude_frozen)
            distributed.barrier()
            if distributed.is_main():
                for file, text in files.items():
                    (partial / file).write_text(text)
                write_manifest(partial, step)
                replace_folder(partial, final)
                _write_atomically(self.root / "latest", name + "\n")
                self._prune()
        except (OSError, RuntimeError) as error:
            # The other ranks may be waiting in a collective: nothing is safe but to leave, and the launcher ends them.
            raise RunError(
                f"checkpoint {final} could not be written: {error}. The checkpoints before it are untouched; "
                "free space or mend the disk, then go on with --resume auto."
            ) from error
        distributed.barrier()
        return final

    def steps(self) -> list[Path]:
        """Complete checkpoints, oldest first; completeness is the manifest's presence, not its truth.

        Steps beyond ``latest`` were left behind by a resume from an earlier checkpoint (of choice, or because they
        are damaged): they count as older than all others, lest they be resumed from or outlive newer ones.
        """
        folders = [folder for folder in checkpoint_folders(self.root) if is_complete(folder)]
        try:
            latest = (self.root / "latest").read_text().strip()
        except (OSError, ValueError):
            return folders
        return sorted(folders, key=lambda folder: (folder.name <= latest, folder.name))

    def newest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose manifest verifies, the same on every rank; damaged ones are warned about."""
        found: Path | None = None
        if distributed.is_main():
            for folder in reversed(self.steps()):
                problem = verify_manifest(folder)
                if problem is None:
                    found = folder
                    break
                warn(f"checkpoint {folder} is damaged ({problem}); trying the one before")
        newest: Path | None = distributed.broadcast_object(found)
        return newest

    def restore(self, engine: Engine, folder: Path) -> dict[str, Any]:
        """Load a checkpoint into a fresh engine; returns this rank's state.

        Raises:
            RunError: if it does not load; UserError: if it was made by another number of ranks.
        """
        manifest = read_manifest(folder)
        if manifest["world_size"] != distributed.world_size():
            raise UserError(
                f"{folder} was made by {manifest['world_size']} ranks and this run has {distributed.world_size()}; "
                f"start it with --num_gpus {manifest['world_size']}."
            )
        return engine.load_state(folder.parent, folder.name, strict=not self.exclude_frozen)

    def _prune(self) -> None:
        if self.limit:
            for folder in self.steps()[: -self.limit]:
                shutil.rmtree(folder, ignore_errors=True)


def write_manifest(folder: Path, step: int) -> None:
    """List every file of a folder with size and SHA-256, synced to disk: from here on the checkpoint is complete."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[str(file.relative_to(folder))] = {"size": file.stat().st_size, "sha256": _sha256(file)}
        _sync_file(file)
    manifest = {"step": step, "world_size": distributed.world_size(), "files": files}
    _write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    _sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        UserError: if there is none or it is damaged.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        if type(manifest["world_size"]) is not int:
            raise ValueError("its world_size is no number")
        for name, entry in manifest["files"].items():
            if type(entry["size"]) is not int or not isinstance(entry["sha256"], str):
                raise ValueError(f"its entry of {name} is malformed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder} is not a complete checkpoint: {MANIFEST} cannot be read: {type(error).__name__}: {error}"
        ) from None
    return manifest


def verify_manifest(folder: Path) -> str | None:
    """What is wrong with a checkpoint, compared with its manifest byte for byte; None if nothing is."""
    try:
        for name, entry in read_manifest(folder)["files"].items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['size']}"
            if _sha256(file) != entry["sha256"]:
                return f"{name} has changed: its SHA-256 differs"
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def replace_folder(partial: Path, final: Path) -> None:
    """Put a finished folder in the place of an older one; a crash leaves one or the other whole."""
    old = final.with_name(f".old-{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_atomically(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    _sync_file(temporary)
    temporary.replace(file)
    _sync_folder(file.parent)


def _sync_file(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
