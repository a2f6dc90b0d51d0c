"""Checkpoints that survive a crash: how the ranks write and read them together.

``save_dir/step_00000500/`` is written under a temporary name; when every rank is done, rank 0 adds a manifest with the
size and SHA-256 of each file, renames the folder, and points ``latest`` at it. A crash at any moment leaves the
checkpoint before it whole, and a damaged one is told by its manifest and never picked. `wmtp_ds.checkpoint_files`
knows the files.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wmtp_ds import distributed
from wmtp_ds.checkpoint_files import (
    LATEST,
    PARTIAL,
    complete_checkpoints,
    file_names,
    put_back,
    read_manifest,
    remove_checkpoint,
    remove_leftovers,
    replace_folder,
    step_name,
    unfinished_saves,
    verify_manifest,
    write_manifest,
)
from wmtp_ds.engine import Engine
from wmtp_ds.errors import CutShortError, RunError
from wmtp_ds.files import write_atomically
from wmtp_ds.universal import convert


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

    def save(self, engine: Engine, step: int, state: dict[str, Any], files: dict[str, str], global_batch: int) -> Path:
        """Save all that an exact resume needs; every rank must call this.

        Args:
            engine: its weights, optimizer and schedule.
            step: optimizer steps taken.
            state: of this rank, in plain types and tensors.
            files: name -> text, written beside the shards (the resolved config).
            global_batch: rows of one optimizer step.

        Raises:
            RunError: on every rank, if any of them cannot write (a full disk). The checkpoint before stays as it was.
        """
        final = self.root / step_name(step)
        partial = self.root / f"{PARTIAL}{final.name}"
        failures: list[str] = []
        with distributed.caught(failures):
            if distributed.is_main():
                remove_leftovers(self.root)
                partial.mkdir(parents=True)
        self._agree(failures, partial)
        with distributed.caught(failures):
            engine.save_state(self.root, partial.name, state, exclude_frozen=self.exclude_frozen)
        self._agree(failures, partial)
        seen: list[str] = []
        with distributed.caught(failures):
            seen = file_names(partial)
        written = {name for names in distributed.gather_objects(seen) for name in names}
        with distributed.caught(failures):
            if distributed.is_main() and not failures:
                for file, text in files.items():
                    (partial / file).write_text(text)
                facts = {"step": step, "world_size": distributed.world_size(), "global_batch": global_batch}
                write_manifest(partial, written, **facts)
                replace_folder(partial, final)
                write_atomically(self.root / LATEST, final.name + "\n")
                self._prune()
        self._agree(failures, partial)
        return final

    def _agree(self, failures: list[str], partial: Path) -> None:
        """Go on if no rank has failed; or else stop on all of them, with the words of those that have."""
        try:
            said = distributed.failures_of_all(failures)
        except RuntimeError as error:
            step = partial.name.removeprefix(PARTIAL)
            what = f"checkpoint {step} was not finished, and those before it are untouched"
            raise CutShortError(what, error) from error
        if not said:
            return
        if distributed.is_main():  # what is there of it takes room where there may be none
            shutil.rmtree(partial, ignore_errors=True)
        name = self.root / partial.name.removeprefix(PARTIAL)
        raise RunError(
            f"checkpoint {name} could not be written: {'; '.join(said)} ({_free(self.root)} free there). The "
            "checkpoints before it are untouched; free space or mend the disk, then go on with --resume auto.",
            everywhere=True,
        )

    def steps(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return complete_checkpoints(self.root)

    def newest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose manifest verifies, the same on every rank; others are warned about."""
        found: Path | None = None
        if distributed.is_main():
            put_back(self.root)
            for folder in reversed(self.steps()):
                problem = verify_manifest(folder)
                if problem is None:
                    found = folder
                    break
                warn(f"checkpoint {folder} is damaged ({problem}); trying the one before")
            for name in unfinished_saves(self.root):
                if found is None or name > found.name:
                    warn(f"checkpoint {self.root / name} is incomplete: its saving was cut short; it is not used")
        newest: Path | None = distributed.broadcast_object(found)
        return newest

    def restore(self, engine: Engine, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
        """Load a checkpoint into a fresh engine; returns this rank's state.

        A checkpoint of another number of ranks is converted first, by rank 0, and comes without "random": that is
        each rank's own.

        Raises:
            RunError: if it does not load, or cannot be converted.
            UserError: if it asks for code to be run.
        """
        manifest = read_manifest(folder)
        if manifest["world_size"] == distributed.world_size():
            return engine.load_state(folder.parent, folder.name, strict=not self.exclude_frozen)
        say(f"{folder} was made by {manifest['world_size']} ranks: converting it for {distributed.world_size()}")
        converted: Path = distributed.on_main(lambda: convert(folder))
        state = engine.load_universal(converted.parent, converted.name)
        state.pop("random", None)
        return state

    def _prune(self) -> None:
        if self.limit:
            for folder in self.steps()[: -self.limit]:
                remove_checkpoint(folder)


def _free(folder: Path) -> str:
    """Room on a disk: what torch says of a full one does not name it."""
    try:
        return f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB"
    except OSError:
        return "it is not known how much is"
