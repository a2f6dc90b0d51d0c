"""A model on problems: samples, what running them shows, and the figures."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmtp_ds.data.label_file_journal import Journal
from wmtp_ds.data.labels import Group, Label, label_groups
from wmtp_ds.evaluate.answers import same_text
from wmtp_ds.evaluate.estimator import bootstrap_interval, pass_at_k
from wmtp_ds.evaluate.files import RESULTS, SUMMARY
from wmtp_ds.evaluate.problems import Problem
from wmtp_ds.evaluate.samples import Sample
from wmtp_ds.files import write_atomically

_AT_ONCE = 64  # programs between two entries in the journal
VERDICTS = "verdicts"


@dataclass(frozen=True)
class Result:
    """One problem's samples."""

    problem: Problem
    samples: list[Sample]
    verdicts: list[dict[str, Any]]

    @property
    def correct(self) -> int:
        """How many samples pass all tests."""
        return sum(verdict["verdict"] == "passed" for verdict in self.verdicts)

    def record(self, ks: Sequence[int]) -> dict[str, Any]:
        """A line of results.jsonl."""
        n = len(self.samples)
        return {
            "problem_id": self.problem.problem_id,
            "n": n,
            "correct": self.correct,
            **{f"pass@{k}": pass_at_k(n, self.correct, k) for k in ks},
            "exact_match": self.exact_match,
            "samples": [
                {
                    "number": sample.number,
                    "program": sample.program,
                    "tokens": sample.tokens,
                    "ended": sample.ended,
                    "cut_off": sample.cut_off,
                    **verdict,
                }
                for sample, verdict in zip(self.samples, self.verdicts, strict=True)
            ],
        }

    @property
    def exact_match(self) -> float | None:
        """The share of samples that are the reference solution; None where there is none."""
        if self.problem.reference is None:
            return None
        return sum(same_text(s.program, self.problem.reference) for s in self.samples) / len(self.samples)


def judge(
    problems: Sequence[Problem],
    samples: Sequence[Sample],
    folder: Path,
    made_from: Mapping[str, Any],
    *,
    workers: int | None = None,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Result]:
    """Run every sample against its problem's tests in the sandbox; goes on where an earlier run was cut short.

    Args:
        problems: each with its samples among ``samples``.
        samples: what the model wrote.
        folder: of the evaluation; a journal in it has the verdicts as they come.
        made_from: all that decides them.
        workers: sandboxes at a time; by default one a CPU.
        on_done: called with how many samples are done since the last call.

    Raises:
        RunError: no sandbox works here.
    """
    by_id = {problem.problem_id: problem for problem in problems}
    # The same program needs to run once, however often it was sampled.
    programs = list(dict.fromkeys((sample.problem_id, sample.program) for sample in samples))
    counts: dict[tuple[str, str], int] = {}
    for sample in samples:
        counts[sample.problem_id, sample.program] = counts.get((sample.problem_id, sample.program), 0) + 1
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with Journal(folder / VERDICTS, made_from, _is_verdict) as journal:
        for entry in journal:
            key = (entry["problem_id"], entry["program"])
            if key in counts and key not in found:
                found[key] = {"verdict": entry["verdict"], "evidence": entry["evidence"]}
                on_done(counts[key])
        missing = [key for key in programs if key not in found]
        for begin in range(0, len(missing), _AT_ONCE):
            for key, label in zip(part := missing[begin : begin + _AT_ONCE], _run(part, by_id, workers), strict=True):
                found[key] = {"verdict": str(label.verdict), "evidence": label.evidence}
                journal.append({"problem_id": key[0], "program": key[1], **found[key]})
                on_done(counts[key])
    results = []
    for problem in problems:
        own = [sample for sample in samples if sample.problem_id == problem.problem_id]
        results.append(Result(problem, own, [found[sample.problem_id, sample.program] for sample in own]))
    return results


def _is_verdict(entry: Mapping[str, Any]) -> bool:
    names = ("problem_id", "program", "verdict", "evidence")
    return all(isinstance(entry.get(name), str) for name in names)


def _run(keys: Sequence[tuple[str, str]], problems: Mapping[str, Problem], workers: int | None) -> list[Label]:
    """Labels of programs, run in parallel; those of one limit together."""
    labels: dict[tuple[str, str], Label] = {}
    limits = {problems[problem_id].limits for problem_id, _ in keys}
    for limit in limits:
        alike = [key for key in keys if problems[key[0]].limits == limit]
        groups = [Group((program,), problems[problem_id].tests) for problem_id, program in alike]
        for key, [label] in zip(alike, label_groups(groups, limit, workers=workers), strict=True):
            labels[key] = label
    return [labels[key] for key in keys]


def summarise(results: Sequence[Result], ks: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """The figures of a whole set: means over problems, with 95 % bootstrap intervals over problems."""
    figures: dict[str, Any] = {"problems": len(results), "samples": sum(len(result.samples) for result in results)}
    for k in ks:
        values = [pass_at_k(len(result.samples), result.correct, k) for result in results]
        figures[f"pass@{k}"] = sum(values) / len(values)
        figures[f"pass@{k}_interval"] = list(bootstrap_interval(values, seed=seed))
    matches = [result.exact_match for result in results if result.exact_match is not None]
    if matches:
        figures["exact_match"] = sum(matches) / len(matches)
    samples = [sample for result in results for sample in result.samples]
    verdicts = [verdict["verdict"] for result in results for verdict in result.verdicts]
    figures["verdicts"] = {name: verdicts.count(name) for name in sorted(set(verdicts))}
    figures["cut_off"] = sum(sample.cut_off for sample in samples) / len(samples)
    figures["tokens_per_sample"] = sum(sample.tokens for sample in samples) / len(samples)
    passes = sum(sample.passes for sample in samples)
    # The first token of a sample comes with its prompt; an end token is one, too.
    yielded = sum(sample.tokens + sample.ended - 1 for sample in samples)
    figures["tokens_per_pass"] = yielded / passes if passes else None
    return figures


def write_results(folder: Path, results: Sequence[Result], ks: Sequence[int], summary: Mapping[str, Any]) -> None:
    """results.jsonl, a line a problem, and summary.json."""
    lines = [json.dumps(result.record(ks)) + "\n" for result in results]
    write_atomically(folder / RESULTS, "".join(lines))
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
