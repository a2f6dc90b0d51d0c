"""What other programs read of a run's folder, without importing torch."""

import json
from pathlib import Path
from typing import Any

from wmtp_ds.files import read_json

SUMMARY = "run.json"
# What tells a run's folder from any other one, besides its checkpoints: a folder without these is never moved aside.
RUN_SIGNS = (".lock", "config.toml", "metrics.jsonl", SUMMARY, "latest")
BEST, FINAL = "checkpoint_best", "checkpoint_final"


def why_not_a_runs_folder(path: Path) -> str:
    """What else a folder is; "" for a run's, an empty one and one that is not there yet."""
    try:
        if not path.is_dir():
            return ""
    except OSError as error:  # a name that is too long, say
        return f"cannot be a folder: {error.strerror}"
    if Path.cwd().is_relative_to(path.resolve()):
        return "holds the current directory"
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    is_run = any((path / name).exists() for name in RUN_SIGNS) or any(path.glob("step_*/manifest.json"))
    if is_run or all(name.startswith(".") for name in names):
        return ""
    return "holds other files, but no run"


def read_summary(root: Path) -> dict[str, Any]:
    """What ``run.json`` of a run's folder says; empty if there is none, or it is damaged."""
    try:
        summary = read_json(root / SUMMARY)
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def write_summary(root: Path, **fields: Any) -> None:
    """Add to what ``run.json`` tells other programs of the run in a folder."""
    temporary = root / f".{SUMMARY}.tmp"
    temporary.write_text(json.dumps(read_summary(root) | fields, indent=2) + "\n")
    temporary.replace(root / SUMMARY)
