"""One pass over a data file: what finding duplicates needs to know of each row and of each problem."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wmtp_ds.data.contamination import EvaluationSet, Overlap
from wmtp_ds.data.contamination_sources import PROBLEM, SOLUTION, problem_text
from wmtp_ds.data.duplicates_shingles import (
    PERMUTATIONS,
    MinHash,
    Signatures,
    code_tokens,
    digest,
    same_code,
    same_prompt,
    shingles,
)
from wmtp_ds.data.index import DataIndex
from wmtp_ds.data.rows import Row

Digests = npt.NDArray[np.void]


@dataclass(frozen=True, eq=False)
class Scan:
    """What is known of rows and problems; about 550 bytes of each.

    A problem is a ``problem_id`` with a text: where rows of one id differ in that, they are several.

    Attributes:
        solutions: 16 bytes [rows], the same for solutions that are equal but for white space.
        solution_signatures: uint32 [rows, 128], or [0, 128] where solutions are not compared.
        problem_of_row: int64 [rows], the row's problem by its number.
        first_rows: int64 [problems], the first row of each.
        problems: 16 bytes [problems], as ``solutions``.
        problem_signatures: uint32 [problems, 128], or [0, 128].
        contaminated: what each row shares with the evaluation sets, by its number.
        in_split: what each row's problem shares with the other side of the split, by its number.
    """

    solutions: Digests
    solution_signatures: Signatures
    problem_of_row: npt.NDArray[np.int64]
    first_rows: npt.NDArray[np.int64]
    problems: Digests
    problem_signatures: Signatures
    contaminated: dict[int, tuple[str, Overlap]]
    in_split: dict[int, Overlap]


def scan(
    index: DataIndex,
    *,
    parts: tuple[str, ...],
    shingle: int,
    evaluation: EvaluationSet | None,
    split: EvaluationSet | None,
    split_ids: dict[str, Overlap],
    on_done: Callable[[int], None],
) -> Scan:
    """Read every row once.

    Args:
        index: of the data file.
        parts: which texts are compared: ``PROBLEM``, ``SOLUTION``.
        shingle: tokens of a shingle.
        evaluation: what training data must not share texts with.
        split: the problems on the other side of the split.
        split_ids: their ids.
        on_done: called with the number of rows read since the last call.

    Raises:
        RunError: the file has changed since it was indexed.
    """
    signature = MinHash()
    of_solutions = np.empty((len(index) if SOLUTION in parts else 0, PERMUTATIONS), np.uint32)
    of_problems: list[Signatures] = []
    solutions: list[bytes] = []
    problem_of_row = np.empty(len(index), np.int64)
    numbers: dict[tuple[int, bytes], int] = {}
    overlaps: list[tuple[Overlap | None, Overlap | None]] = []
    first_rows: list[int] = []
    contaminated: dict[int, tuple[str, Overlap]] = {}
    in_split: dict[int, Overlap] = {}
    for i in range(len(index)):
        row = index.read_row(i)
        solutions.append(digest(same_code(row.output)))
        if SOLUTION in parts:
            of_solutions[i] = signature(solution_shingles(row, shingle))
        text = problem_text(row.instruction, row.input)
        key = (int(index.problem[i]), digest(same_prompt(text)))
        number = problem_of_row[i] = numbers.setdefault(key, len(numbers))
        if number == len(first_rows):
            first_rows.append(i)
            if PROBLEM in parts:
                of_problems.append(signature(problem_shingles(row, shingle)))
            known = split_ids.get(row.problem_id) or (split and PROBLEM in parts and split.compare(PROBLEM, text))
            found = evaluation.compare(PROBLEM, text) if evaluation and PROBLEM in parts else None
            overlaps.append((known or None, found))
        other_side, of_problem = overlaps[number]
        if other_side is not None:
            in_split[i] = other_side
        if of_problem is not None:
            contaminated[i] = PROBLEM, of_problem
        elif evaluation and SOLUTION in parts and (of_solution := evaluation.compare(SOLUTION, row.output)):
            contaminated[i] = SOLUTION, of_solution
        on_done(1)
    return Scan(
        solutions=_array(solutions),
        solution_signatures=of_solutions,
        problem_of_row=problem_of_row,
        first_rows=np.array(first_rows, np.int64),
        problems=_array([text for _, text in numbers]),
        problem_signatures=np.array(of_problems, np.uint32).reshape(-1, PERMUTATIONS),
        contaminated=contaminated,
        in_split=in_split,
    )


def solution_shingles(row: Row, size: int) -> npt.NDArray[np.uint64]:
    """The shingles of a row's solution."""
    return shingles(code_tokens(row.output), size)


def problem_shingles(row: Row, size: int) -> npt.NDArray[np.uint64]:
    """The shingles of a row's problem."""
    return shingles(code_tokens(problem_text(row.instruction, row.input)), size)


def _array(digests: list[bytes]) -> Digests:
    return np.frombuffer(b"".join(digests), np.dtype("V16"))
