"""What an evaluation leaves: ``results.jsonl``, a line a problem, and ``summary.json``. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wmtp_ds.errors import UserError
from wmtp_ds.evaluate.estimator import pass_at_k
from wmtp_ds.files import read_json, read_text

RESULTS, SUMMARY = "results.jsonl", "summary.json"


@dataclass(frozen=True)
class Finished:
    """A finished evaluation, read back.

    Attributes:
        place: where it was read from.
        problem_set: the name of what was asked.
        counts: of each problem, in the file's order: samples, and how many of them passed.
        ks: of pass@k.
        options: how samples were drawn.
        model: the folder that was evaluated, as it was typed.
        model_key: of that folder then (`wmtp_ds.models.config_file.model_key`).
        problems_key: SHA-256 of the problems with their tests.
    """

    place: str
    problem_set: str
    counts: dict[str, tuple[int, int]]
    ks: tuple[int, ...]
    options: dict[str, Any]
    model: str
    model_key: str
    problems_key: str

    def pass_at(self, k: int) -> npt.NDArray[np.float64]:
        """pass@k of each problem, in the order of ``counts``, ``[problems]``."""
        return np.array([pass_at_k(n, c, k) for n, c in self.counts.values()])


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a finished evaluation."""
    return (folder / SUMMARY).is_file() and (folder / RESULTS).is_file()


def read_finished(folder: Path) -> Finished:
    """Read an evaluation's folder.

    Raises:
        UserError: it is damaged, or not of `wmtp-ds evaluate`.
    """
    file = folder / SUMMARY
    try:
        summary = read_json(file)
        made_from = summary["made_from"]
        if made_from["command"] != "evaluate":
            raise ValueError("no evaluation has made it")
        ks = sorted(int(name.removeprefix("pass@")) for name in summary["figures"] if _is_pass(name))
        file = folder / RESULTS
        records = [json.loads(line) for line in read_text(file, most=2**33).split("\n") if line]
        counts = {str(record["problem_id"]): (_count(record, "n"), _count(record, "correct")) for record in records}
        if len(counts) != summary["figures"]["problems"] or len(counts) != len(records):
            raise ValueError(f"it has {len(records)} problems, and {SUMMARY} {summary['figures']['problems']}")
        if not counts or any(correct > n or n < max(ks, default=1) for n, correct in counts.values()):
            raise ValueError("its counts of samples make no sense")
        return Finished(
            place=str(folder),
            problem_set=str(summary["problems"]),
            counts=counts,
            ks=tuple(ks),
            options=dict(made_from["options"]),
            model=str(summary["model"]),
            model_key=str(made_from["model"]),
            problems_key=str(made_from["problems"]),
        )
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file} is damaged ({why}): evaluate the model again, with --force") from None


def _is_pass(name: str) -> bool:
    return name.startswith("pass@") and name.removeprefix("pass@").isdecimal()


def _count(record: Mapping[str, Any], name: str) -> int:
    value = record[name]
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is no number of samples")
    return value
