"""Reports of steps whose numbers were bad: which rows they read, and how to take the step again.

``save_dir/bad_steps/step_00000012.json`` is written when step 12 was bad or spiked, and at no other time is anything
of this gathered. Beside it lies the config that the step was taken with.
"""

import json
import math
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wmtp_ds import distributed
from wmtp_ds.config import Resolved
from wmtp_ds.data.batch import NO_ROW, Batch
from wmtp_ds.data.index import DataIndex
from wmtp_ds.files import write_atomically

FOLDER = "bad_steps"


@dataclass(frozen=True)
class BadStep:
    """What every rank is told of a step.

    Attributes:
        lines: of the data file, ascending: the rows of the micro-batches whose loss was not finite, or of all of
            them where each loss was (then the gradient was not, or the loss was only high).
        place: the report, for a message: its file, or why there is none.
    """

    lines: list[int]
    place: str


class BadSteps:
    """Writes the reports of a run. Every rank calls :meth:`report` together.

    Args:
        root: ``checkpoint.save_dir``.
        resolved: the run's config.
        data: the index of the training data.
    """

    def __init__(self, root: Path, resolved: Resolved, data: DataIndex):
        self.folder = root / FOLDER
        self._resolved = resolved
        self._data = data

    def report(
        self,
        step: int,
        what: str,
        metrics: dict[str, float],
        window: Sequence[Batch],
        losses: Iterable[Tensor],
        *,
        is_spike: bool,
        source: Path | None,
        passed_over: dict[int, list[int]] | None = None,
    ) -> BadStep:
        """Write down a step, from what each rank knows of its own micro-batches.

        Args:
            step: its number, counted from 1.
            what: was wrong, in words.
            metrics: of the global batch.
            window: this rank's micro-batches.
            losses: each one's share of the loss; they come to the host only now.
            is_spike: whether all is finite, and the loss only high.
            source: the checkpoint before the step, if there is one.
            passed_over: steps that will not be trained on because of this one -> their rows.
        """
        own = [
            {
                "rank": distributed.rank(),
                "micro_batch": number,
                "loss": float(loss),
                "rows": batch.host.row_ids.tolist(),
            }
            for number, (batch, loss) in enumerate(zip(window, losses, strict=True))
        ]
        parts = [part for rank in distributed.gather_objects(own) for part in rank]
        is_bad = [not math.isfinite(part["loss"]) for part in parts]
        suspects = [part for part, bad in zip(parts, is_bad, strict=True) if bad or not any(is_bad)]
        lines = sorted({int(self._data.line[row]) for part in suspects for row in part["rows"] if row != NO_ROW})
        file = self.folder / f"step_{step:08d}.json"
        found = BadStep(lines, str(file))
        if distributed.is_main():
            report = {
                "step": step,
                "what": what,
                "stage": self._resolved.config.experiment.stage,
                "dataset": {"file": str(self._data.path), "fingerprint": self._data.fingerprint},
                "lines_to_look_at": lines,
                "micro_batches": [part | {"rows": self._rows(part["rows"])} for part in parts],
                "passed_over": {str(number): self._rows(rows) for number, rows in (passed_over or {}).items()},
                "metrics": metrics,
                "world_size": distributed.world_size(),
                "config_hash": self._resolved.hash(),
                "again": again_command(self._resolved, self.config_file, step, source, is_spike=is_spike),
                "config": self._resolved.flat(),
            }
            try:
                self._write(file, report)
            except OSError as error:  # a full disk is no reason to stop: the weights are sound
                found = BadStep(lines, f"no report: {file} cannot be written: {error.strerror}")
        return found

    @property
    def config_file(self) -> Path:
        """Where the config lies with which the steps were taken."""
        return self.folder / f"config-{self._resolved.hash()}.toml"

    def _rows(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        names = self._data.problem_names
        return [
            {
                "row": int(row),
                "line": int(self._data.line[row]),
                "problem_id": names[self._data.problem[row]],
                "is_correct": bool(self._data.is_correct[row]),
            }
            for row in rows
            if row != NO_ROW
        ]

    def _write(self, file: Path, report: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config_file, self._resolved.toml())
        write_atomically(file, json.dumps(_plain(report), indent=1, allow_nan=False) + "\n")


def again_command(
    resolved: Resolved, config_file: Path, step: int, source: Path | None, *, is_spike: bool
) -> str | None:
    """The command that trains up to a step again, apart from the run, and stops at it; None on several machines.

    The number of steps stays as it is, because the rows and the learning rate of a step depend on it; that the step
    was bad, or a spike, is what stops the command. It needs the checkpoint that it names.
    """
    world_size = distributed.world_size()
    if int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", world_size))) != world_size:
        return None
    save_dir = resolved.config.checkpoint.save_dir
    command = ["wmtp-ds", "train", "--stage", resolved.config.experiment.stage, "--config", str(config_file)]
    command += ["--num_gpus", str(world_size), "--resume", str(source or "never")]
    overrides = {
        "checkpoint.save_dir": json.dumps(f"{save_dir}-step-{step}"),
        "checkpoint.save_checkpoint_every": "0",
        "mlflow.tracking_uri": '""',
    }
    if is_spike:
        overrides |= {"stability.on_spike": "rollback", "stability.max_rollbacks": "0"}
    else:
        overrides |= {"stability.max_skipped_steps": "1"}
    command += [part for key, value in overrides.items() for part in ("--override", f"{key}={value}")]
    return shlex.join(command)


def describe_lines(data: Path, lines: Sequence[int], most: int = 12) -> str:
    """Lines of the data file in a message, some of them if there are many."""
    shown = ", ".join(map(str, lines[:most])) + (f" and {len(lines) - most} more" if len(lines) > most else "")
    return f"line{'' if len(lines) == 1 else 's'} {shown} of {data}"


def _plain(value: Any) -> Any:
    """As JSON has it: numbers that are none become texts."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
