"""Makes labelled rows of problems: reference solutions, mutants of them, and verdicts from running both.

A reference counts as correct once it passes its tests; a problem none of whose references does is left out,
mutants and all, since its tests prove nothing. A mutant that fails is an incorrect solution. A mutant that
passes is *dropped* and counted: it may be a correct solution or an error that the tests miss, and no run of
those tests can tell which.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from wmtp_ds.data.labels import FunctionTests, Group, Label, label_groups
from wmtp_ds.data.mutate import Mutant, mutants, normalise
from wmtp_ds.data.sandbox import Limits

# Mutants drawn for each one wanted, rounded up: some survive, and which do shows only when they run.
DRAWN_PER_WANTED = 1.33


@dataclass(frozen=True)
class Source:
    """A problem to make rows of. ``difficulty`` 0 leaves the key out; ``metadata`` goes into each of its rows."""

    problem_id: str
    instruction: str
    input: str
    references: tuple[str, ...]
    tests: FunctionTests
    difficulty: int
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """What came of a set of problems; ``verdicts`` count all runs of mutants by verdict."""

    problems: int = 0
    references: int = 0
    references_failed: list[str] = field(default_factory=list)
    problems_left_out: int = 0
    mutants: int = 0
    mutants_failed: int = 0
    mutants_survived: int = 0
    mutants_surplus: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "problems": self.problems,
            "problems_left_out": self.problems_left_out,
            "references": self.references,
            "references_failed": self.references_failed,
            "mutants": self.mutants,
            "mutants_failed": self.mutants_failed,
            "mutants_survived_and_dropped": self.mutants_survived,
            "mutants_failed_but_not_needed": self.mutants_surplus,
            "mutant_verdicts": dict(sorted(self.verdicts.items())),
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> "Report":
        """The report that ``as_dict`` told of; an empty one of an empty mapping."""
        if not told:
            return cls()
        return cls(
            problems=told["problems"],
            references=told["references"],
            references_failed=list(told["references_failed"]),
            problems_left_out=told["problems_left_out"],
            mutants=told["mutants"],
            mutants_failed=told["mutants_failed"],
            mutants_survived=told["mutants_survived_and_dropped"],
            mutants_surplus=told["mutants_failed_but_not_needed"],
            verdicts=Counter(told["mutant_verdicts"]),
        )

    def add(self, other: "Report") -> None:
        """Count another set of problems in."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


def prompt_input(tests: FunctionTests) -> str:
    """What a row's ``input`` says: the first test, which names the function and shows how it is called."""
    return f"Your code should pass this test:\n{tests.asserts[0]}"


def _draw(source: Source, references: Sequence[str], wanted: int, seed: int) -> list[Mutant]:
    """Candidates for incorrect solutions: the references take turns."""
    if wanted == 0:
        return []
    rng = random.Random(f"mutants-{seed}-{source.problem_id}")
    total = math.ceil(wanted * DRAWN_PER_WANTED)
    lists = []
    seen = set(references)
    for reference in references:
        found = mutants(reference, math.ceil(total / len(references)), rng, exclude=seen)
        seen |= {mutant.source for mutant in found}
        lists.append(found)
    longest = max(len(found) for found in lists)
    turns = [found[place] for place in range(longest) for found in lists if place < len(found)]
    return turns[:total]


def _row(source: Source, text: str, label: Label, mutation: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "problem_id": source.problem_id,
        "instruction": source.instruction,
        "input": source.input,
        "output": text,
        "is_correct": label.is_correct,
    }
    if source.difficulty:
        row["difficulty"] = source.difficulty
    row["metadata"] = {
        **source.metadata,
        "verdict": str(label.verdict),
        "evidence": label.evidence,
        "mutation": mutation,
        "tests": list(source.tests.asserts),
        **({"test_setup": source.tests.setup} if source.tests.setup else {}),
    }
    return row


def labelled_rows(
    sources: Sequence[Source],
    *,
    mutants_per_problem: int,
    seed: int,
    limits: Limits,
    groups_per_sandbox: int = 1,
    on_done: Callable[[int], None] = lambda count: None,
) -> tuple[list[list[dict[str, Any]]], Report]:
    """Run references and mutants of every problem, in parallel, and make rows of them.

    Args:
        sources: the problems.
        mutants_per_problem: incorrect solutions wanted of each problem, at most as many as there are edits.
        seed: decides which mutants are tried.
        limits: of each run.
        groups_per_sandbox: problems that share a sandbox, where one hand wrote them.
        on_done: called with how many problems have run since the last call.

    Returns:
        The rows of each problem, in order, all written by ``ast.unparse``; and the counts.

    Raises:
        ValueError: a problem's tests cannot be run.
        RunError: no sandbox works here.
    """
    report = Report(problems=len(sources))
    references: list[list[str]] = []
    candidates: list[list[Mutant]] = []
    for source in sources:
        texts = []
        for reference in source.references:
            report.references += 1
            try:
                texts.append(normalise(reference))
            except ValueError as error:
                report.references_failed.append(f"{source.problem_id}: {error}")
        references.append(list(dict.fromkeys(texts)))
        candidates.append(_draw(source, references[-1], mutants_per_problem, seed) if texts else [])
    groups = [
        Group((*texts, *(mutant.source for mutant in drawn)), source.tests)
        for source, texts, drawn in zip(sources, references, candidates, strict=True)
    ]
    labels = label_groups(groups, limits, groups_per_sandbox=groups_per_sandbox, on_done=on_done)
    rows = [
        _rows_of(source, texts, drawn, found, mutants_per_problem, report)
        for source, texts, drawn, found in zip(sources, references, candidates, labels, strict=True)
    ]
    return rows, report


def _rows_of(
    source: Source, references: list[str], drawn: list[Mutant], labels: list[Label], wanted: int, report: Report
) -> list[dict[str, Any]]:
    """The rows of one problem; counts go into the report."""
    rows = []
    for text, label in zip(references, labels, strict=False):
        if label.is_correct:
            rows.append(_row(source, text, label, None))
        else:
            report.references_failed.append(f"{source.problem_id}: {label.verdict}: {label.evidence}")
    if not rows:
        report.problems_left_out += 1
        return []
    kept = 0
    for mutant, label in zip(drawn, labels[len(references) :], strict=True):
        report.mutants += 1
        report.verdicts[str(label.verdict)] += 1
        if label.is_correct:
            report.mutants_survived += 1
            continue
        report.mutants_failed += 1
        if kept == wanted:
            report.mutants_surplus += 1
            continue
        kept += 1
        rows.append(_row(source, mutant.source, label, mutant.operator))
    return rows
