"""Whether a run may go on from a checkpoint, known before anything starts. Imports no torch.

A checkpoint holds the resolved config it was made with. What says which rows a step reads and what is trained must be
the same; everything else may change, and is said.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmtp_ds.checkpoint_files import (
    MANIFEST,
    STEP_PREFIX,
    checkpoint_folders,
    complete_checkpoints,
    is_complete,
    read_manifest,
    verify_manifest,
)
from wmtp_ds.config import Resolved
from wmtp_ds.errors import UserError
from wmtp_ds.files import read_text

# With another value of these, steps would read other rows than they are counted for, or weights would not fit.
_FIXED = (
    "experiment.stage",
    "models.policy.path",
    "models.reference.path",
    "dataset.train",
    "dataset.max_length",
    "dataset.template",
    "data_sampling.",
    "training.optimizer",
    "value_head.",
)
# Which rows share a tensor's row is not which rows a step reads.
_MAY_CHANGE = ("data_sampling.pack_sequences",)
# `fit_ranks` says what becomes of them.
_BATCH = ("training.batch_size", "training.gradient_accumulation_steps")
# Of no consequence for what is trained.
_FREE = (
    *_BATCH,
    "dataset.cache_dir",
    "experiment.",
    "checkpoint.",
    "mlflow.",
    "runtime.log_level",
    "runtime.peer_timeout",
    "runtime.device",
    "deepspeed.",
)


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
    is_one = named.name.startswith(STEP_PREFIX)
    folders = [named] if is_one else checkpoint_folders(named)
    if not folders:
        raise UserError(f"--resume {named}: neither a checkpoint nor a run's folder with checkpoints. {_CHOICES}")
    complete = [folder for folder in folders if is_complete(folder)] if is_one else complete_checkpoints(named)
    if not complete:
        raise UserError(
            f"--resume {resume}: no checkpoint in {named} is complete ({folders[-1].name} has no {MANIFEST}). "
            "Take another one; or --resume never, which moves the earlier run aside and starts anew."
        )
    problems = []
    for folder in reversed(complete):
        # What it takes no time to see; the ranks read every byte before they load one.
        problem = verify_manifest(folder, contents=False)
        if problem is None:
            return folder
        problems.append(f"{folder}: {problem}")
    if is_one:
        raise UserError(f"--resume {named}: the checkpoint is damaged: {problem}. Take another one.")
    what = (
        f"auto: every checkpoint in {named} is damaged"
        if resume == "auto"
        else f"{named}: none of its checkpoints is sound"
    )
    raise UserError(
        f"--resume {what}. --resume never starts anew; the earlier run is moved aside then.\n  " + "\n  ".join(problems)
    )


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


def fit_ranks(resolved: Resolved, resume: str, world_size: int) -> tuple[Resolved, list[str]]:
    """Cut the run's global batch for another number of ranks than the checkpoint's; a step reads the same rows.

    Accumulation changes first. Where that does not come out even the micro-batch becomes smaller, never larger than
    the config says, for it was chosen to fit into memory.

    Returns:
        The config, cut anew where it must be, and a line for each value that has changed.

    Raises:
        UserError: if the ranks cannot share the batch, or the config asks for another one; with the arithmetic.
    """
    checkpoint = find_checkpoint(Path(resolved.config.checkpoint.save_dir), resume)
    if checkpoint is None:
        return resolved, []
    manifest, before = read_manifest(checkpoint), saved_config(checkpoint)
    then = manifest["world_size"]
    saved = tuple(int(before.get(key, 1)) for key in _BATCH)
    training = resolved.config.training
    typed = training.batch_size, training.gradient_accumulation_steps
    rows = int(manifest.get("global_batch", saved[0] * saved[1] * then))
    if then != world_size and training.optimizer != "adamw":
        raise UserError(
            f"--resume {resume}: {checkpoint} was made by {then} ranks and this run has {world_size}, which "
            f"training.optimizer = {training.optimizer!r} cannot do: DeepSpeed converts the states of adamw alone. "
            f"Start it with --num_gpus {then}."
        )
    if typed[0] * typed[1] * world_size == rows:
        batch_size, accumulation = typed
    elif typed != saved:
        raise UserError(
            f"--resume {resume}: {checkpoint} belongs to a run whose steps read {rows} rows, and training.batch_size "
            f"{typed[0]} × training.gradient_accumulation_steps {typed[1]} × {world_size} ranks = "
            f"{typed[0] * typed[1] * world_size}. Leave both as they were ({saved[0]} and {saved[1]}), and they are "
            f"cut for the number of ranks; or choose two whose product with {world_size} is {rows}."
        )
    elif rows % world_size:
        shares = [str(ranks) for ranks in range(1, rows + 1) if rows % ranks == 0]
        raise UserError(
            f"--resume {resume}: the run's steps read {rows} rows (training.batch_size {saved[0]} × "
            f"training.gradient_accumulation_steps {saved[1]} in the config), and {rows} / {world_size} ranks is not "
            f"whole. Start it with one of these numbers of ranks: {', '.join(shares)}."
        )
    else:
        share = rows // world_size
        batch_size = next(size for size in range(typed[0], 0, -1) if share % size == 0)
        accumulation = share // batch_size
    return _cut(resolved, (batch_size, accumulation), saved, (then, world_size))


def _cut(
    resolved: Resolved, now: tuple[int, int], saved: tuple[int, ...], ranks: tuple[int, int]
) -> tuple[Resolved, list[str]]:
    training = resolved.config.training
    lines = [f"{key} was {a}, now {b}" for key, a, b in zip(_BATCH, saved, now, strict=True) if a != b]
    if ranks[0] != ranks[1]:
        rows = now[0] * now[1] * ranks[1]
        lines.append(f"ranks: {ranks[0]} before, now {ranks[1]}; a step reads {rows} rows as before")
    if lines and now[0] != saved[0] and getattr(training, "selection_scope", "") == "batch":
        lines.append('training.selection_scope = "batch" selects tokens within micro-batches, which are others now')
    if now != (training.batch_size, training.gradient_accumulation_steps):
        resolved = resolved.cut(*now)
    return resolved, lines


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
        return _flatten(tomllib.loads(read_text(file, most=2**20)))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}. Resume from another checkpoint.") from None


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
