"""Rows that a training file should not have: duplicates, contradictions, and what belongs to evaluation.

In this order, each step among the rows that the ones before have left: rows that overlap an evaluation set; rows whose
problem is on the other side of the split; problems that repeat an earlier one; solutions that are labelled both ways;
solutions that repeat an earlier one of the same problem *and label*. A solution and a mutant of it are near duplicates,
too, and their difference is what a critic learns from: rows of different labels are never merged. Where they are the
same text, that is a conflict.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wmtp_ds.data.contamination import EvaluationSet, Overlap
from wmtp_ds.data.contamination_sources import PROBLEM, SOLUTION, EvaluationText, problem_text, read_evaluation
from wmtp_ds.data.duplicates_findings import Findings, Reason
from wmtp_ds.data.duplicates_near import Duplicate, repeats
from wmtp_ds.data.duplicates_scan import Digests, Scan, problem_shingles, scan, solution_shingles
from wmtp_ds.data.duplicates_shingles import digest
from wmtp_ds.data.index import DataIndex, build_index
from wmtp_ds.errors import UserError

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
    for path in [*against, *([] if split is None else [split])]:
        if path.exists() and path.samefile(source):
            raise UserError(f"{path}: is the data file itself: compare it to another")
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


def _contamination(
    findings: Findings, found: Scan, against: Sequence[Path], evaluation: EvaluationSet
) -> dict[str, Any]:
    rows = list(found.contaminated)
    for row, (part, overlap) in found.contaminated.items():
        findings.drop(row, Reason("contamination", f"{part}_{overlap.rule}", overlap.of.where, overlap.similarity))
    index = findings.index
    return {
        "against": [str(path) for path in against],
        "evaluation_texts": len(evaluation.texts),
        "rows": len(rows),
        "problems": len(np.unique(index.problem[rows])),
        "evaluation_texts_found": len({overlap.of.where for _, overlap in found.contaminated.values()}),
        "by_rule": Counter(f"{part}_{overlap.rule}" for part, overlap in found.contaminated.values()),
        "pairs": [
            {"row": index.where(i), "part": part, **_told(overlap)}
            for i, (part, overlap) in list(found.contaminated.items())[:LISTED]
        ],
    }


def _split(findings: Findings, found: Scan, split: Path) -> dict[str, Any]:
    left = {i: overlap for i, overlap in found.in_split.items() if findings.kept[i]}
    for row, overlap in left.items():
        findings.drop(row, Reason("split", overlap.rule, overlap.of.where, overlap.similarity))
    firsts: dict[int, tuple[int, Overlap]] = {}
    for i, overlap in left.items():
        firsts.setdefault(int(found.problem_of_row[i]), (i, overlap))
    return {
        "other_side": str(split),
        "rows": len(left),
        "problems": len(firsts),
        "by_rule": Counter(overlap.rule for _, overlap in firsts.values()),
        "pairs": [{"row": findings.index.where(i), **_told(o)} for i, o in list(firsts.values())[:LISTED]],
    }


def _told(overlap: Overlap) -> dict[str, Any]:
    return {
        "of": overlap.of.where,
        "of_part": overlap.of.part,
        "rule": overlap.rule,
        "similarity": round(overlap.similarity, 4),
    }


def _problems(findings: Findings, found: Scan, options: DuplicateOptions) -> dict[str, Any] | None:
    """Problems that repeat an earlier one of another id. Of one id with several texts, none repeats another.

    Problems without a text, which are told apart by their ids alone, repeat nothing.
    """
    if PROBLEM not in options.parts:
        return None
    index, firsts = findings.index, found.first_rows
    nothing = digest("")
    there = np.unique(found.problem_of_row[findings.kept])
    pairs = repeats(
        there[[found.problems[problem].tobytes() != nothing for problem in there.tolist()]],
        found.problems,
        np.zeros(len(firsts), np.int64),
        found.problem_signatures,
        options.threshold,
        lambda problem: problem_shingles(index.read_row(int(firsts[problem])), options.shingle),
        owners=index.problem[firsts].astype(np.int64),
    )
    by_problem = {pair.text: pair for pair in pairs}
    gone = [int(i) for i in np.flatnonzero(findings.kept) if found.problem_of_row[i] in by_problem]
    for row in gone:
        pair = by_problem[int(found.problem_of_row[row])]
        of = index.where(int(firsts[pair.of]))
        findings.drop(row, Reason("repeated_problems", _rule(pair, found.problems), of, pair.similarity))
    return {
        **_counted(pairs, found.problems),
        "rows": len(gone),
        "pairs": _listed(index, pairs, found.problems, lambda problem: int(firsts[problem])),
    }


def _solutions(findings: Findings, found: Scan, options: DuplicateOptions) -> dict[str, Any] | None:
    """Solutions that repeat an earlier one of the same problem and label."""
    if SOLUTION not in options.parts:
        return None
    index = findings.index
    pairs = repeats(
        np.flatnonzero(findings.kept),
        found.solutions,
        index.problem.astype(np.int64) * 2 + index.is_correct,
        found.solution_signatures,
        options.threshold,
        lambda row: solution_shingles(index.read_row(row), options.shingle),
    )
    for pair in pairs:
        rule = _rule(pair, found.solutions)
        findings.drop(pair.text, Reason("repeated_solutions", rule, index.where(pair.of), pair.similarity))
    return {
        **_counted(pairs, found.solutions),
        "rows": len(pairs),
        "correct": sum(bool(index.is_correct[pair.text]) for pair in pairs),
        "pairs": _listed(index, pairs, found.solutions, lambda row: row),
    }


def _rule(pair: Duplicate, digests: Digests) -> str:
    return "exact" if digests[pair.text].tobytes() == digests[pair.of].tobytes() else "near"


def _counted(pairs: Sequence[Duplicate], digests: Digests) -> dict[str, int]:
    exactly = sum(_rule(pair, digests) == "exact" for pair in pairs)
    return {"exact": exactly, "near": len(pairs) - exactly, "groups": len({pair.of for pair in pairs})}


def _listed(
    index: DataIndex, pairs: Sequence[Duplicate], digests: Digests, row_of: Callable[[int], int]
) -> list[dict[str, Any]]:
    return [
        {
            "row": index.where(row_of(pair.text)),
            "of": index.where(row_of(pair.of)),
            "rule": _rule(pair, digests),
            "similarity": round(pair.similarity, 4),
        }
        for pair in pairs[:LISTED]
    ]


def _conflicts(findings: Findings, found: Scan, options: DuplicateOptions) -> dict[str, Any]:
    """Rows of one problem with the same solution and different labels."""
    index = findings.index
    by_text: dict[tuple[int, bytes], list[int]] = {}
    for i in np.flatnonzero(findings.kept).tolist():
        by_text.setdefault((int(index.problem[i]), found.solutions[i].tobytes()), []).append(i)
    clashing = [rows for rows in by_text.values() if len({bool(index.is_correct[i]) for i in rows}) == 2]
    if options.conflicts == "drop":
        for clash in clashing:
            for i in clash:
                other = next(j for j in clash if index.is_correct[j] != index.is_correct[i])
                findings.drop(i, Reason("conflicts", "exact", index.where(other), 1.0))
    return {
        "solutions": len(clashing),
        "rows": sum(map(len, clashing)),
        "dropped": options.conflicts == "drop",
        "pairs": [
            {
                "row": index.where(next(i for i in clash if not index.is_correct[i])),
                "of": index.where(next(i for i in clash if index.is_correct[i])),
                "says": "incorrect, and correct",
            }
            for clash in clashing[:LISTED]
        ],
    }
