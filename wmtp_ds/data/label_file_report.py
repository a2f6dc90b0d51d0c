"""Counts of what came of a file's rows, and how that compares with what the source said of them."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

LISTED = 100  # disagreements, and problems with suspicious tests, that the report names

_SOURCE = {True: "source_correct", False: "source_incorrect", None: "source_silent"}


@dataclass
class Report:
    """Counts rows as they are written."""

    rows: int = 0
    written: int = 0
    labelled: Counter[bool] = field(default_factory=Counter)
    by_verdict: dict[str, Counter[str]] = field(default_factory=dict)
    table: dict[str, Counter[str]] = field(default_factory=dict)
    disagreements: list[dict[str, Any]] = field(default_factory=list)
    untested: Counter[str] = field(default_factory=Counter)
    suspicious_rows: int = 0
    suspicious: dict[str, str] = field(default_factory=dict)
    suspicious_problems: int = 0

    def count_label(self, line: int, problem_id: str, verdict: str, evidence: str, source_label: bool | None) -> None:
        """A row that got its label by running."""
        is_correct = verdict == "passed"
        self.labelled[is_correct] += 1
        self.by_verdict.setdefault(verdict, Counter())[_SOURCE[source_label]] += 1
        self.table.setdefault(_SOURCE[source_label], Counter())["correct" if is_correct else "incorrect"] += 1
        if source_label not in (None, is_correct) and len(self.disagreements) < LISTED:
            self.disagreements.append(
                {
                    "line": line,
                    "problem_id": problem_id,
                    "source_label": source_label,
                    "verdict": verdict,
                    "evidence": evidence,
                }
            )

    def count_suspicious(self, problem_id: str, reason: str, new: bool) -> None:
        """A row whose tests are not to be believed; ``new``: the first of its problem."""
        self.suspicious_rows += 1
        self.suspicious_problems += new
        if new and len(self.suspicious) < LISTED:
            self.suspicious[problem_id] = reason

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        table = {
            source: {label: self.table.get(source, Counter())[label] for label in ("correct", "incorrect")}
            for source in _SOURCE.values()
        }
        return {
            "rows_read": self.rows,
            "rows_written": self.written,
            "labelled": self.labelled.total(),
            "correct": self.labelled[True],
            "incorrect": self.labelled[False],
            "source_and_run": table,
            "verdicts": {
                verdict: {source: self.by_verdict[verdict][source] for source in _SOURCE.values()}
                for verdict in sorted(self.by_verdict)
            },
            "disagreements": table["source_correct"]["incorrect"] + table["source_incorrect"]["correct"],
            "disagreements_first": self.disagreements,
            "untested": dict(sorted(self.untested.items())),
            "suspicious_rows": self.suspicious_rows,
            "suspicious_problems": self.suspicious_problems,
            "suspicious_problems_first": self.suspicious,
        }
