"""Figures of what a stage sees: by kind of token, by how far a solution is written, and as a distribution."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wmtp_ds.errors import RunError, UserError
from wmtp_ds.look.columns import Solution
from wmtp_ds.look.kinds import KINDS

BINS = 40
STRETCHES = 20

Floats = npt.NDArray[np.float64]


def main_column(columns: Collection[str]) -> str:
    """The column that tokens are shaded by: the weight, or the value where a stage weighs nothing."""
    return "weight" if "weight" in columns else "value"


def check(solutions: Sequence[Solution], stage: str) -> None:
    """Whether figures can be made of what a stage sees.

    Raises:
        UserError: it says neither what it weighs nor its values.
        RunError: some of it is not finite.
    """
    columns = solutions[0].tokens[0].columns
    main = main_column(columns)
    if main not in columns:
        raise UserError(f"the stage {stage} shows neither weights nor values: define its look (docs/stages.md)")
    for solution in solutions:
        for token in solution.tokens:
            if not all(math.isfinite(value) for value in token.columns.values()):
                bad = ", ".join(f"{name} {value}" for name, value in token.columns.items() if not math.isfinite(value))
                raise RunError(
                    f"line {solution.line}, token {token.text or token.part_of!r}: {bad}. The model's numbers are not "
                    "finite: look at an earlier checkpoint"
                )


def values_of(solutions: Iterable[Solution], column: str, kind: str | None = None) -> Floats:
    """All entries of a column, of tokens of one kind or of all."""
    found = [token.columns[column] for s in solutions for token in s.tokens if kind is None or token.kind == kind]
    return np.array(found, np.float64)


def by_kind(solutions: Sequence[Solution], column: str) -> dict[str, dict[str, Any]]:
    """Of each kind that occurs: how many tokens, and the mean in right and in wrong solutions (None without any)."""
    table: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        entry: dict[str, Any] = {"tokens": len(values_of(solutions, column, kind))}
        for name, is_correct in (("correct", True), ("incorrect", False)):
            found = values_of((s for s in solutions if s.row.is_correct is is_correct), column, kind)
            entry[name] = float(found.mean()) if len(found) else None
        if entry["tokens"]:
            table[kind] = entry
    return table


def trajectory(solutions: Sequence[Solution], column: str) -> dict[str, list[float | None]]:
    """The mean of a column over the stretches of a solution, from its first token to its last, of right and wrong ones.

    A token in the middle of a solution of 101 tokens stands at 0.5; every solution counts alike in each stretch.
    """
    result: dict[str, list[float | None]] = {}
    for name, is_correct in (("correct", True), ("incorrect", False)):
        sums, counts = np.zeros(STRETCHES), np.zeros(STRETCHES)
        for solution in solutions:
            if solution.row.is_correct is not is_correct:
                continue
            values = np.array([token.columns[column] for token in solution.tokens])
            places = np.arange(len(values)) / max(1, len(values) - 1)
            stretches = np.minimum((places * STRETCHES).astype(int), STRETCHES - 1)
            for stretch in np.unique(stretches):
                sums[stretch] += values[stretches == stretch].mean()
                counts[stretch] += 1
        result[name] = [float(s / c) if c else None for s, c in zip(sums, counts, strict=True)]
    return result


def distribution(solutions: Sequence[Solution], column: str) -> dict[str, list[float]]:
    """As `histogram`, of all tokens of solutions."""
    correct = [solution.row.is_correct for solution in solutions for _ in solution.tokens]
    return histogram(values_of(solutions, column), np.array(correct, np.bool_))


def histogram(values: Floats, correct: npt.NDArray[np.bool_]) -> dict[str, list[float]]:
    """``edges`` (one more than bins), and how many tokens of right and of wrong solutions are in each bin.

    Args:
        values: of tokens, all finite, ``[N]``.
        correct: whether the solution of each is right, ``[N]``.
    """
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
    kinds = {"correct": correct, "incorrect": ~correct}
    counts = {name: np.histogram(values[kind], edges)[0].astype(float).tolist() for name, kind in kinds.items()}
    return {"edges": edges.tolist(), **counts}


def summary(solutions: Sequence[Solution]) -> dict[str, Any]:
    """Everything, for JSON."""
    columns = list(solutions[0].tokens[0].columns)
    main = main_column(columns)
    figures: dict[str, Any] = {
        "solutions": len(solutions),
        "problems": len({solution.row.problem_id for solution in solutions}),
        "tokens": sum(len(solution.tokens) for solution in solutions),
        "shaded_by": main,
        "columns": {},
        "by_kind": by_kind(solutions, main),
        "distribution": distribution(solutions, main),
    }
    for column in columns:
        values = values_of(solutions, column)
        figures["columns"][column] = {
            "mean": float(values.mean()),
            "std": float(values.std()),
            "min": float(values.min()),
            "max": float(values.max()),
        }
    if "value" in columns:
        figures["trajectory"] = trajectory(solutions, "value")
    return figures
