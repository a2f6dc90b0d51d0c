"""What ``wmtp-ds checkpoint`` shows of checkpoints, and how it makes room. Imports no torch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from wmtp_ds.checkpoint_files import (
    PARTIAL,
    STEP_PREFIX,
    checkpoint_folders,
    complete_checkpoints,
    folder_size,
    is_complete,
    leftovers,
    put_back,
    read_latest,
    read_manifest,
    remove_checkpoint,
    remove_leftovers,
    step_of,
    verify_manifest,
)
from wmtp_ds.errors import UserError
from wmtp_ds.files import try_lock
from wmtp_ds.run_summary import RUN_SIGNS


@dataclass(frozen=True)
class Listing:
    """One checkpoint.

    Attributes:
        name: of its folder, or of the folder that it would have become.
        step: optimizer steps taken; None if its name is none of ours.
        saved: when it was finished (or last written to), in UTC.
        size: bytes.
        world_size: ranks that made it; None if that is not known.
        state: "partial" if its saving was cut short.
        problem: what is wrong; None if nothing is.
        latest: whether it is the one that was saved last.
    """

    folder: Path
    name: str
    step: int | None
    saved: str
    size: int
    world_size: int | None
    state: Literal["complete", "damaged", "partial"]
    problem: str | None
    latest: bool


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    folder: Path
    checkpoints: list[Listing]
    leftovers: list[Path]


@dataclass(frozen=True)
class PruneReport:
    """What `prune_run` has done, or would do. ``freed`` is in bytes."""

    removed: list[Listing]
    kept: list[Listing]
    leftovers: list[Path]
    freed: int


def inspect(folder: Path, *, contents: bool) -> Listing:
    """Look at a checkpoint; with ``contents`` every byte of it is read."""
    name = folder.name.removeprefix(PARTIAL)
    world_size, saved = None, None
    partial = folder.name.startswith(PARTIAL) or not is_complete(folder)
    problem = "its saving was cut short: it has no manifest" if partial else verify_manifest(folder, contents=contents)
    if not partial:
        try:
            manifest = read_manifest(folder)
            world_size, saved = manifest["world_size"], manifest.get("saved")
        except UserError:
            pass
    if not isinstance(saved, str):
        saved = datetime.fromtimestamp(folder.stat().st_mtime, UTC).isoformat(timespec="seconds")
    return Listing(
        folder=folder,
        name=name,
        step=step_of(name),
        saved=saved,
        size=folder_size(folder),
        world_size=world_size,
        state="partial" if partial else "complete" if problem is None else "damaged",
        problem=problem,
        latest=not partial and read_latest(folder.parent) == folder.name,
    )


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or what is left of one."""
    return any((folder / sign).exists() for sign in RUN_SIGNS) or any(_all_checkpoints(folder))


def _all_checkpoints(run: Path) -> list[Path]:
    """Finished or not, oldest first."""
    found = [*checkpoint_folders(run), *run.glob(f"{PARTIAL}{STEP_PREFIX}*")]
    return sorted(found, key=lambda folder: folder.name.removeprefix(PARTIAL))


def list_runs(folder: Path) -> list[Run]:
    """The run in a folder, or every run in the folders below it.

    Raises:
        UserError: if there is none.
    """
    runs = [folder] if is_run(folder) else sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path))
    if not runs:
        raise UserError(f"{folder} holds no run. Name a run's folder (checkpoint.save_dir), or the one that holds it.")
    return [
        Run(run, [inspect(path, contents=False) for path in _all_checkpoints(run)], _other_leftovers(run))
        for run in runs
    ]


def _other_leftovers(run: Path) -> list[Path]:
    """Those that are not listed as partial checkpoints."""
    listed = _all_checkpoints(run)
    return [path for path in leftovers(run) if path not in listed]


def verify_path(path: Path, say: Callable[[Path], None]) -> list[Listing]:
    """Read every byte of a checkpoint, or of all those of a run.

    Args:
        path: of either.
        say: is told of each before it is read.

    Raises:
        UserError: if there is none.
    """
    name = path.resolve().name
    folders = [path] if name.startswith(STEP_PREFIX) or is_complete(path) else _all_checkpoints(path)
    if not folders:
        raise UserError(f"{path} is neither a checkpoint (step_…) nor a run's folder with checkpoints.")
    found = []
    for folder in folders:
        say(folder)
        found.append(inspect(folder, contents=True))
    return found


def prune_run(run: Path, *, keep: int, dry_run: bool, say: Callable[[Path], None]) -> PruneReport:
    """Keep the newest sound checkpoints, and remove others and leftovers; nothing else while none is sound.

    Args:
        run: its folder.
        keep: how many.
        dry_run: change nothing.
        say: is told of each checkpoint before it is read.

    Raises:
        UserError: if it is no run's folder, or the run is going on.
    """
    if not is_run(run):
        raise UserError(f"{run} is no run's folder. `wmtp-ds checkpoint list FOLDER` shows the runs in a folder.")
    with _locked(run):
        if not dry_run:
            put_back(run)
        found = []
        for folder in reversed(complete_checkpoints(run)):  # newest first
            say(folder)
            found.append(inspect(folder, contents=True))
        sound = [item for item in found if item.problem is None]
        kept = sound[:keep] if sound else found
        removed = [item for item in found if item not in kept]
        rest = leftovers(run)
        freed = sum(item.size for item in removed) + sum(_size(path) for path in rest)
        if not dry_run:
            for item in removed:
                remove_checkpoint(item.folder)
            remove_leftovers(run)
        return PruneReport(removed, kept, rest, freed)


def _size(path: Path) -> int:
    return folder_size(path) if path.is_dir() else path.lstat().st_size


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Keep a run from starting meanwhile.

    Raises:
        UserError: if one is going on.
    """
    with (run / ".lock").open("a") as lock:
        if not try_lock(lock):
            raise UserError(
                f"a run is training in {run}. It prunes by itself (checkpoint.save_total_limit); wait until it ends."
            )
        yield
