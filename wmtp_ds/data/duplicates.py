"""Rows that a training file should not have: duplicates, contradictions, and what belongs to evaluation.

In this order, each step among the rows that the ones before have left: rows that overlap an evaluation set; rows whose
problem is on the other side of the split; problems that repeat an earlier one; solutions that are labelled both ways;
solutions that repeat an earlier one of the same problem *and label*. A solution and a mutant of it are near duplicates,
too, and their difference is what a critic learns from: rows of different labels are never merged. Where they are the
same text, that is a conflict.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from wmtp_ds.data.contamination import EvaluationSet, Overlap
from wmtp_ds.data.contamination_sources import PROBLEM, SOLUTION, EvaluationText, problem_text, read_evaluation
from wmtp_ds.data.duplicates_near import Duplicate, near_duplicates
from wmtp_ds.data.duplicates_scan import Scan, problem_shingles, scan, solution_shingles
from wmtp_ds.data.index import DataIndex, build_index

LISTED = 100  # pairs of each kind in the report


@dataclass(frozen=True)
class DuplicateOptions:
    """What counts as a duplicate.

    Attributes:
        threshold: the Jaccard similarity of the shingles of near duplicates.
        shingle: tokens of a shingle.
        ngram: words of an n-gram that is looked for in evaluation sets.
        overlap: the share of an evaluation text's n-grams that make a training text contaminated.
        parts: which texts are compared.
        conflicts: whether rows of the same solution with different labels stay.
    """

    threshold: float = 0.8
    shingle: int = 5
    ngram: int = 13
    overlap: float = 0.7
    parts: tuple[str, ...] = (PROBLEM, SOLUTION)
    conflicts: Literal["keep", "drop"] = "keep"


@dataclass(eq=False)
class Findings:
    """What was found in a file.

    Attributes:
        index: of the file.
        kept: bool [rows], the rows that stay.
        report: counts and the first pairs, ready for JSON.
    """

    index: DataIndex
    kept: npt.NDArray[np.bool_]
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def anything(self) -> bool:
        """Whether there is anything to report."""
        return not self.kept.all() or self.report["conflicts"]["rows"] > 0


def find_duplicates(
    source: Path,
    options: DuplicateOptions,
    *,
    against: Sequence[Path] = (),
    split: Path | None = None,
    on_start: Callable[[int], None] = lambda total: None,
    on_done: Callable[[int], None] = lambda count: None,
) -> Findings:
    """Find duplicates, conflicts and contamination in a data file.

    Args:
        source: the data file.
        options: what counts.
        against: evaluation sets, as in `read_evaluation`.
        split: the data file of the other side of the split; no problem may be in both.
        on_start: called with the number of rows, once they are known to be rows.
        on_done: called with the number of rows read since the last call.

    Raises:
        UserError: a file is not there, or is not what it must be.
        RunError: the data file has changed while it was read.
    """
    index = build_index(source)
    texts = (text for path in against for text in read_evaluation(path))
    evaluation = _evaluation_set(texts, options, options.ngram) if against else None
    split_texts, split_ids = _other_side(split)
    other_side = _evaluation_set(split_texts, options, None) if split else None
    on_start(len(index))
    found = scan(
        index,
        parts=options.parts,
        shingle=options.shingle,
        evaluation=evaluation,
        split=other_side,
        split_ids=split_ids,
        on_done=on_done,
    )
    findings = Findings(index, np.ones(len(index), np.bool_))
    findings.report = {
        "file": str(source),
        "rows": len(index),
        "problems": len(index.problem_names),
        "compared": list(options.parts),
        "contamination": None if evaluation is None else _contamination(findings, found, against, evaluation),
        "split": None if split is None else _split(findings, found, split),
        "repeated_problems": _problems(findings, found, options),
        "conflicts": _conflicts(findings, found, options),
        "repeated_solutions": _solutions(findings, found, options),
    }
    findings.report["rows_kept"] = int(findings.kept.sum())
    return findings


def _evaluation_set(texts: Iterable[EvaluationText], options: DuplicateOptions, ngram: int | None) -> EvaluationSet:
    return EvaluationSet(
        texts, threshold=options.threshold, shingle=options.shingle, ngram=ngram, share=options.overlap
    )


def _other_side(split: Path | None) -> tuple[list[EvaluationText], dict[str, Overlap]]:
    """The problems of the other side of the split, and their ids."""
    texts: dict[tuple[str, str], EvaluationText] = {}
    ids: dict[str, Overlap] = {}
    if split is not None:
        other = build_index(split)
        for i in range(len(other)):
            row = other.read_row(i)
            text = problem_text(row.instruction, row.input)
            found = EvaluationText(f"{split}:{other.line[i]}", PROBLEM, text)
            texts.setdefault((row.problem_id, text), found)
            ids.setdefault(row.problem_id, Overlap("problem_id", 1.0, found))
    return list(texts.values()), ids


def _where(index: DataIndex, i: int) -> str:
    return f"{index.path}:{index.line[i]}"


def _contamination(
    findings: Findings, found: Scan, against: Sequence[Path], evaluation: EvaluationSet
) -> dict[str, Any]:
    rows = list(found.contaminated)
    findings.kept[rows] = False
    index = findings.index
    return {
        "against": [str(path) for path in against],
        "evaluation_texts": len(evaluation.texts),
        "rows": len(rows),
        "problems": len(np.unique(index.problem[rows])),
        "evaluation_texts_found": len({overlap.of.where for _, overlap in found.contaminated.values()}),
        "by_rule": Counter(f"{part}_{overlap.rule}" for part, overlap in found.contaminated.values()),
        "pairs": [
            {"row": _where(index, i), "part": part, **_told(overlap)}
            for i, (part, overlap) in list(found.contaminated.items())[:LISTED]
        ],
    }


def _split(findings: Findings, found: Scan, split: Path) -> dict[str, Any]:
    left = {i: overlap for i, overlap in found.in_split.items() if findings.kept[i]}
    findings.kept[list(left)] = False
    firsts: dict[int, tuple[int, Overlap]] = {}
    for i, overlap in left.items():
        firsts.setdefault(int(found.problem_of_row[i]), (i, overlap))
    return {
        "other_side": str(split),
        "rows": len(left),
        "problems": len(firsts),
        "by_rule": Counter(overlap.rule for _, overlap in firsts.values()),
        "pairs": [{"row": _where(findings.index, i), **_told(o)} for i, o in list(firsts.values())[:LISTED]],
    }


def _told(overlap: Overlap) -> dict[str, Any]:
    return {
        "of": overlap.of.where,
        "of_part": overlap.of.part,
        "rule": overlap.rule,
        "similarity": round(overlap.similarity, 4),
    }


def _problems(findings: Findings, found: Scan, options: DuplicateOptions) -> dict[str, Any] | None:
    """Problems that repeat an earlier one of another id. Of one id with several texts, none repeats another."""
    if PROBLEM not in options.parts:
        return None
    index, firsts = findings.index, found.first_rows
    there = np.unique(found.problem_of_row[findings.kept])
    pairs, repeats = _repeats(
        there,
        found.problems,
        np.zeros(len(firsts), np.int64),
        found.problem_signatures,
        options.threshold,
        lambda problem: problem_shingles(index.read_row(int(firsts[problem])), options.shingle),
        owners=index.problem[firsts].astype(np.int64),
    )
    gone = np.isin(found.problem_of_row, [pair.text for pair in pairs]) & findings.kept
    findings.kept &= ~gone
    return {
        **_counted(pairs, repeats),
        "rows": int(gone.sum()),
        "pairs": _listed(index, pairs, repeats, lambda problem: int(firsts[problem])),
    }


def _solutions(findings: Findings, found: Scan, options: DuplicateOptions) -> dict[str, Any] | None:
    """Solutions that repeat an earlier one of the same problem and label."""
    if SOLUTION not in options.parts:
        return None
    index = findings.index
    pairs, repeats = _repeats(
        np.flatnonzero(findings.kept),
        found.solutions,
        index.problem.astype(np.int64) * 2 + index.is_correct,
        found.solution_signatures,
        options.threshold,
        lambda row: solution_shingles(index.read_row(row), options.shingle),
    )
    findings.kept[[pair.text for pair in pairs]] = False
    return {
        **_counted(pairs, repeats),
        "rows": len(pairs),
        "correct": sum(bool(index.is_correct[pair.text]) for pair in pairs),
        "pairs": _listed(index, pairs, repeats, lambda row: row),
    }


def _counted(pairs: Sequence[Duplicate], repeats: set[int]) -> dict[str, int]:
    exactly = sum(1 for pair in pairs if pair.text in repeats)
    return {"exact": exactly, "near": len(pairs) - exactly, "groups": len({pair.of for pair in pairs})}


def _listed(
    index: DataIndex, pairs: Sequence[Duplicate], repeats: set[int], row_of: Callable[[int], int]
) -> list[dict[str, Any]]:
    return [
        {
            "row": _where(index, row_of(pair.text)),
            "of": _where(index, row_of(pair.of)),
            "rule": "exact" if pair.text in repeats else "near",
            "similarity": round(pair.similarity, 4),
        }
        for pair in pairs[:LISTED]
    ]


def _repeats(
    members: npt.NDArray[np.int64],
    digests: npt.NDArray[np.void],
    groups: npt.NDArray[np.int64],
    signatures: npt.NDArray[np.uint32],
    threshold: float,
    read: Callable[[int], npt.NDArray[np.uint64]],
    owners: npt.NDArray[np.int64] | None = None,
) -> tuple[list[Duplicate], set[int]]:
    """The members that repeat an earlier one of their group, in order; and which of those exactly."""
    first: dict[tuple[int, bytes], int] = {}
    exactly, rest = [], []
    for member in members.tolist():
        known = first.setdefault((int(groups[member]), digests[member].tobytes()), member)
        if known == member:
            rest.append(member)
        else:
            exactly.append(Duplicate(member, known, 1.0))
    places = np.array(rest, np.int64)
    nearly = near_duplicates(
        signatures[places],
        groups[places],
        threshold,
        lambda place: read(rest[place]),
        None if owners is None else owners[places],
    )
    named = {rest[pair.text]: Duplicate(rest[pair.text], rest[pair.of], pair.similarity) for pair in nearly}
    # What repeats a near duplicate exactly repeats what that one repeats.
    for pair in exactly:
        of = named.get(pair.of)
        if of is None:
            named[pair.text] = pair
        elif owners is None or owners[pair.text] != owners[of.of]:
            named[pair.text] = Duplicate(pair.text, of.of, of.similarity)
    return [named[text] for text in sorted(named)], {pair.text for pair in exactly}


def _conflicts(findings: Findings, found: Scan, options: DuplicateOptions) -> dict[str, Any]:
    """Rows of one problem with the same solution and different labels."""
    index = findings.index
    by_text: dict[tuple[int, bytes], list[int]] = {}
    for i in np.flatnonzero(findings.kept).tolist():
        by_text.setdefault((int(index.problem[i]), found.solutions[i].tobytes()), []).append(i)
    clashing = [rows for rows in by_text.values() if len({bool(index.is_correct[i]) for i in rows}) == 2]
    rows = sorted(i for clash in clashing for i in clash)
    if options.conflicts == "drop":
        findings.kept[rows] = False
    return {
        "solutions": len(clashing),
        "rows": len(rows),
        "dropped": options.conflicts == "drop",
        "pairs": [
            {
                "row": _where(index, next(i for i in clash if not index.is_correct[i])),
                "of": _where(index, next(i for i in clash if index.is_correct[i])),
                "says": "incorrect, and correct",
            }
            for clash in clashing[:LISTED]
        ],
    }
