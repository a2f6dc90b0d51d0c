"""Whether a run may go on from a checkpoint, known before anything starts. Imports no torch.

A checkpoint holds the resolved config it was made with. What says which rows a step reads and what is trained must be
the same; everything else may change, and is said.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmtp_ds.config import Resolved
from wmtp_ds.errors import UserError

STEP_PREFIX = "step_"
MANIFEST = "manifest.json"

# With another value of these, steps would read other rows than they are counted for, or weights would not fit.
_FIXED = (
    "experiment.stage",
    "models.policy.path",
    "models.reference.path",
    "dataset.train",
    "dataset.max_length",
    "dataset.template",
    "data_sampling.",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.optimizer",
    "value_head.",
)
# Which rows share a tensor's row is not which rows a step reads.
_MAY_CHANGE = ("data_sampling.pack_sequences",)
# Of no consequence for what is trained.
_FREE = (
    "dataset.cache_dir",
    "experiment.",
    "checkpoint.",
    "mlflow.",
    "runtime.log_level",
    "runtime.device",
    "deepspeed.",
)


def checkpoint_folders(root: Path) -> list[Path]:
    """Every checkpoint in a run's folder, complete or not, oldest first."""
    return sorted(folder for folder in root.glob(f"{STEP_PREFIX}*") if folder.is_dir())


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has the manifest that is written last; not whether its files are sound."""
    return (checkpoint / MANIFEST).is_file()


def find_checkpoint(save_dir: Path, resume: str) -> Path | None:
    """The newest complete checkpoint that ``--resume`` means; None if the run starts anew.

    Raises:
        UserError: if what was named is no checkpoint and no run's folder, or no checkpoint there is complete.
    """
    if resume == "never":
        return None
    named = save_dir if resume == "auto" else Path(resume)
    if resume == "auto":
        if not checkpoint_folders(save_dir):
            return None
    elif not resume or not named.exists():
        raise UserError(f"--resume {resume or repr(resume)}: there is no such folder. {_CHOICES}")
    elif not named.is_dir():
        raise UserError(f"--resume {named} is a file, not a folder. {_CHOICES}")
    folders = [named] if named.name.startswith(STEP_PREFIX) else checkpoint_folders(named)
    if not folders:
        raise UserError(f"--resume {named}: neither a checkpoint nor a run's folder with checkpoints. {_CHOICES}")
    complete = [folder for folder in folders if is_complete(folder)]
    if not complete:
        raise UserError(
            f"--resume {resume}: no checkpoint in {named} is complete ({folders[-1].name} has no {MANIFEST}). "
            "Take another one; or --resume never, which moves the earlier run aside and starts anew."
        )
    return complete[-1]


_CHOICES = "Give a checkpoint (step_…), a run's folder, auto or never."


def check_resume(resolved: Resolved, resume: str) -> list[str]:
    """Compare the config of the checkpoint to resume from with this run's.

    Returns:
        A line for each value that has changed and may.

    Raises:
        UserError: if there is nothing to resume from where something was named, or the run would be another one.
    """
    checkpoint = find_checkpoint(Path(resolved.config.checkpoint.save_dir), resume)
    if checkpoint is None:
        return []
    before, now = saved_config(checkpoint), _flatten(tomllib.loads(resolved.toml()))
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and (key.startswith(_FIXED) or not key.startswith(_FREE))
    ]
    lines = {key: f"{key} was {before.get(key, 'not set')}, now {now.get(key, 'not set')}" for key in changed}
    fixed = [line for key, line in lines.items() if key.startswith(_FIXED) and key not in _MAY_CHANGE]
    if fixed:
        raise UserError(
            f"--resume {resume}: {checkpoint} belongs to another run:\n  "
            + "\n  ".join(fixed)
            + "\nGo on with the values that it was made with, or start anew with --resume never."
        )
    return list(lines.values())


def same_table(checkpoint: Path, resolved: Resolved, table: str) -> bool:
    """Whether a table of the config is what it was when the checkpoint was made."""
    before, now = saved_config(checkpoint), _flatten(tomllib.loads(resolved.toml()))
    return {k: v for k, v in before.items() if k.startswith(f"{table}.")} == {
        k: v for k, v in now.items() if k.startswith(f"{table}.")
    }


def saved_config(checkpoint: Path) -> dict[str, Any]:
    """The resolved config that a checkpoint was made with, by dotted keys.

    Raises:
        UserError: if it is missing or damaged.
    """
    file = checkpoint / "config.toml"
    try:
        return _flatten(tomllib.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}. Resume from another checkpoint.") from None


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
