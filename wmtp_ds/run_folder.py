"""The folder of a run, ``checkpoint.save_dir``: who may write to it, and what happens to an earlier run in it."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO
from uuid import uuid4

from wmtp_ds import distributed
from wmtp_ds.checkpoint import Checkpoints
from wmtp_ds.checkpoint_files import checkpoint_folders, verify_manifest
from wmtp_ds.errors import UserError
from wmtp_ds.files import try_lock
from wmtp_ds.resume import find_checkpoint
from wmtp_ds.run_summary import read_summary, why_not_a_runs_folder

LOCK = ".lock"
_SHOWN_LATE_SECONDS = 45.0


class RunFolder:
    """A run's folder, locked while the run lives.

    Args:
        root: ``checkpoint.save_dir``.
        resume: "auto", "never", or the path of a checkpoint or of a run's folder.

    Raises:
        UserError: if the folder is not a run's, or the checkpoint to resume from is not there.
    """

    def __init__(self, root: Path, resume: str):
        self.root = root
        self.resume = resume
        self._lock: TextIO | None = None
        self._token = uuid4().hex
        # A run that starts anew moves an earlier run aside; it must never move anything else.
        if what := why_not_a_runs_folder(root):
            raise UserError(f"checkpoint.save_dir: {root} {what}. Give each run a folder of its own.")
        find_checkpoint(root, resume)

    def lock(self) -> None:
        """Claim the folder; only the main rank calls this.

        Raises:
            UserError: if another run holds it, or it cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = (self.root / LOCK).open("a")
            if not try_lock(self._lock):
                raise UserError(
                    f"checkpoint.save_dir: another run is training in {self.root}. Wait for it, or choose another "
                    "folder with --override checkpoint.save_dir=FOLDER."
                )
            self._lock.truncate(0)
            self._lock.write(self._token)
            self._lock.flush()
            os.fsync(self._lock.fileno())  # the ranks of other machines are to read it
        except OSError as error:
            raise UserError(f"checkpoint.save_dir: cannot write to {self.root}: {error}") from None

    def check_shared(self, peer_timeout: float) -> None:
        """Every rank must see the folder that rank 0 has locked: checkpoints are written by all ranks, into one.

        Args:
            peer_timeout: seconds after which ranks give up that wait for others.

        Raises:
            UserError: on every rank, if one of them sees another folder, or none.
        """
        token = distributed.broadcast_object(self._token if distributed.is_main() else None)
        # Network file systems may show another machine's new file half a minute late.
        deadline = time.monotonic() + min(_SHOWN_LATE_SECONDS, peer_timeout / 2)
        while not (seen := self._shows(token)) and time.monotonic() < deadline:
            time.sleep(0.5)
        views = distributed.gather_objects((seen, socket.gethostname()))
        blind = sorted({host for sees, host in views if not sees})
        if blind:
            raise UserError(
                f"checkpoint.save_dir: {self.root.absolute()} is another folder on {', '.join(blind)} than on "
                f"{views[0][1]}. Checkpoints are written by all ranks: choose a folder on a file system that all "
                "machines share."
            )

    def _shows(self, token: str) -> bool:
        try:
            with os.scandir(self.root) as entries:  # which asks the server anew
                return any(entry.name == LOCK for entry in entries) and (self.root / LOCK).read_text() == token
        except OSError:
            return False

    def prepare(self, say: Callable[[str], None]) -> None:
        """Make room for a run that starts anew: an earlier run's files move aside, none is ever overwritten.

        Only the main rank calls this.
        """
        earlier = [path for path in self.root.iterdir() if path.name != LOCK]
        if not earlier or self._goes_on_here():
            return
        number = 1
        while (aside := self.root.with_name(f"{self.root.name}.{number}")).exists():
            number += 1
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        hint = ""
        if Checkpoints(aside).steps() and not read_summary(aside).get("completed"):
            hint = f" It was not finished; to go on with it instead: --resume {aside}"
        say(f"the earlier run in {self.root} was moved to {aside}.{hint}")

    def _goes_on_here(self) -> bool:
        if self.resume == "auto":
            return bool(checkpoint_folders(self.root))
        return self.resume != "never" and Path(self.resume).resolve().is_relative_to(self.root.resolve())

    def source(self, checkpoints: Checkpoints, warn: Callable[[str], None]) -> Path | None:
        """The checkpoint to resume from, the same on every rank (all must call); None to start anew.

        Raises:
            UserError: if the one that was named is damaged, or there are checkpoints and none is sound.
        """
        if self.resume == "never":
            return None
        if self.resume == "auto":
            newest = checkpoints.newest(warn)
            if newest is None and checkpoint_folders(self.root):
                raise UserError(
                    f"--resume auto: every checkpoint in {self.root} is damaged. --resume never starts anew; "
                    "the earlier run is moved aside then."
                )
            return newest
        named = Path(self.resume)
        if named.name.startswith("step_"):
            problem = distributed.broadcast_object(verify_manifest(named) if distributed.is_main() else None)
            if problem is not None:
                raise UserError(f"--resume {named}: the checkpoint is damaged: {problem}. Take another one.")
            return named
        found = Checkpoints(named).newest(warn)
        if found is None:
            raise UserError(f"--resume {named}: none of its checkpoints is sound.")
        return found

    def close(self) -> None:
        """Give the folder free."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def is_main_process() -> bool:
    """Whether the launcher made this process rank 0; known before the process group forms."""
    return os.environ.get("RANK", "0") == "0"
