"""What was found in a data file, and of each row that goes why."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wmtp_ds.data.index import DataIndex


class Reason(NamedTuple):
    """Why a row goes: the step that found it, the rule, what it is like (file and line), and how much."""

    step: str
    rule: str
    of: str
    similarity: float


@dataclass(eq=False)
class Findings:
    """What was found in a file.

    Attributes:
        index: of the file.
        kept: bool [rows], the rows that stay.
        reasons: of the rows that go, by their numbers.
        report: counts and the first pairs, ready for JSON.
    """

    index: DataIndex
    kept: npt.NDArray[np.bool_]
    reasons: dict[int, Reason] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def drop(self, row: int, reason: Reason) -> None:
        """A row that has stayed so far goes."""
        self.kept[row] = False
        self.reasons[row] = reason

    def dropped(self) -> list[dict[str, Any]]:
        """Every row that goes, in the file's order, and why; ready for JSON."""
        return [
            {
                "line": int(self.index.line[row]),
                "problem_id": self.index.problem_names[self.index.problem[row]],
                "step": reason.step,
                "rule": reason.rule,
                "of": reason.of,
                "similarity": round(reason.similarity, 4),
            }
            for row, reason in sorted(self.reasons.items())
        ]

    @property
    def anything(self) -> bool:
        """Whether there is anything to report."""
        return not self.kept.all() or self.report["conflicts"]["rows"] > 0
