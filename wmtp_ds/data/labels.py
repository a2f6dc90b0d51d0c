"""Labels by execution: runs solutions against their tests in the sandbox and says which are right, and why not.

A function test is an ``assert`` as MBPP writes it. Where it compares with a literal (``assert f(x) == [1, 2]``),
the sandbox only computes the other side; the comparison happens here. Tests by standard input and output are
compared here, too. All function tests of a solution are run; a program's tests end with the first that fails.
"""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from wmtp_ds.data.frames import RunReport, StepReport
from wmtp_ds.data.labels_checks import Check, FunctionTests, plan_checks
from wmtp_ds.data.labels_output import Comparison
from wmtp_ds.data.labels_text import show, tidy
from wmtp_ds.data.sandbox import FunctionRun, Limits, ProgramRun, Verdict, run_job, stopped_by

# Imported once a sandbox instead of once a solution; only what is quick to import and has no side effect.
PRELOADABLE = frozenset(
    ("bisect", "cmath", "collections", "copy", "functools", "heapq", "itertools", "math", "operator", "random", "re")
)
_MEDDLED = (Verdict.ERROR, "the run meddled with the checker's messages")


@dataclass(frozen=True)
class StdioTests:
    """Pairs of standard input and the standard output that a program must answer with."""

    cases: tuple[tuple[str, str], ...]
    comparison: Comparison = field(default_factory=Comparison)


Tests = FunctionTests | StdioTests


@dataclass(frozen=True)
class Label:
    """What running a solution showed.

    ``passed`` of ``total`` tests passed (of a program's, those before the first that did not); ``evidence`` tells
    the first that did not ("" where all did). Nothing in it depends on the machine or the time, so the same
    solution gets the same label again.
    """

    verdict: Verdict
    passed: int
    total: int
    evidence: str = ""

    @property
    def is_correct(self) -> bool:
        """Whether every test passed."""
        return self.verdict is Verdict.PASSED


@dataclass(frozen=True)
class Group:
    """Solutions of one problem that one hand wrote: they share a sandbox, each in a process of its own."""

    solutions: tuple[str, ...]
    tests: Tests


def _judge_step(check: Check, report: StepReport) -> tuple[Verdict, str]:
    """The verdict on a step that was reached, and why."""
    if report.error == "MemoryError":
        return Verdict.MEMORY, "out of memory"
    if report.error == "AssertionError" and check.test >= 0:
        return Verdict.WRONG, f"an assertion failed: {report.message}" if report.message else "an assertion failed"
    if report.error:
        return Verdict.ERROR, f"{report.error}: {report.message}" if report.message else report.error
    if len(report.values) != (2 if check.rule == "same" else 1):
        return _MEDDLED
    if check.accepts(report.values):
        return Verdict.PASSED, ""
    if check.rule == "true":
        return Verdict.WRONG, f"{check.step[1]} is not so"
    wanted = report.values[1] if check.rule == "same" else check.expected
    return Verdict.WRONG, f"{check.step[1]} gave {show(report.values[0])}, not {show(wanted)}"


def _judge_end(report: RunReport) -> tuple[Verdict, str]:
    """The verdict on a run that did not come to its end, and why."""
    if report.damaged:
        return _MEDDLED
    if not report.ended:
        return Verdict.ERROR, "the run ended its own sandbox"
    stopped = stopped_by(report)
    if stopped is None:
        return Verdict.ERROR, f"the process left with code {report.code} before the tests were done"
    reasons = {
        Verdict.TIMEOUT: "over the time limit",
        Verdict.MEMORY: "killed for memory",
        Verdict.ERROR: f"killed by signal {report.code}",
    }
    return stopped, reasons[stopped]


def _label_function(checks: list[Check], report: RunReport) -> Label:
    total = checks[-1].test + 1
    if -1 in report.steps:
        verdict, evidence = _judge_step(Check((), -1, "runs"), report.steps[-1])
        return Label(verdict, 0, total, tidy(f"loading the solution: {evidence}"))
    failures: dict[int, tuple[Verdict, str]] = {}  # by test, in order
    for number, check in enumerate(checks):
        told = report.steps.get(number)
        verdict, evidence = _judge_end(report) if told is None else _judge_step(check, told)
        if verdict is not Verdict.PASSED:
            failures.setdefault(check.test, (verdict, evidence))
    if not failures and (report.damaged or not report.complete):
        failures[total - 1] = _judge_end(report)
    if not failures:
        return Label(Verdict.PASSED, total, total)
    test, (verdict, evidence) = next(iter(failures.items()))
    where = "setup" if test < 0 else f"test {test + 1} of {total}"
    return Label(verdict, 0 if -1 in failures else total - len(failures), total, tidy(f"{where}: {evidence}"))


def _judge_program(expected: str, report: RunReport, comparison: Comparison) -> tuple[Verdict, str]:
    raised = report.steps.get(0)
    if raised is not None and raised.error:
        return _judge_step(Check((), -1, "runs"), raised)
    if report.damaged or stopped_by(report) is not None:
        return _judge_end(report)
    if report.code != 0:
        return Verdict.ERROR, f"exit code {report.code}"
    if report.truncated:
        return Verdict.ERROR, "wrote more than the output limit"
    if comparison.same(expected, report.stdout):
        return Verdict.PASSED, ""
    return Verdict.WRONG, f"wrote {report.stdout[:100].decode('utf-8', 'replace')!r}, not {expected[:100]!r}"


def _label_program(source: str, tests: StdioTests, limits: Limits | None) -> Label:
    """Run a program on one input after the other, in one sandbox, until it fails."""
    judged: list[tuple[Verdict, str]] = []

    def passes(report: RunReport) -> bool:
        judged.append(_judge_program(tests.cases[len(judged)][1], report, tests.comparison))
        return judged[-1][0] is Verdict.PASSED

    runs = [ProgramRun(source, stdin.encode("utf-8", "surrogatepass")) for stdin, _ in tests.cases]
    reports = run_job(runs, limits, go_on=passes)
    total = len(reports)
    if len(judged) < total and all(verdict is Verdict.PASSED for verdict, _ in judged):
        passes(reports[len(judged)])  # the last, after which nobody asks, or one that the sandbox did not survive
    verdict, evidence = judged[-1]
    if verdict is Verdict.PASSED:
        return Label(verdict, total, total)
    return Label(verdict, len(judged) - 1, total, tidy(f"test {len(judged)} of {total}: {evidence}"))


def _preload(sources: Sequence[str]) -> list[str]:
    named = {name for source in sources for name in re.findall(r"^\s*(?:import|from)\s+(\w+)", source, re.M)}
    return sorted(named & PRELOADABLE)


def _label_programs(solutions: Sequence[str], tests: StdioTests, limits: Limits | None) -> list[Label]:
    if not tests.cases:
        raise ValueError("there are no tests")
    return [_label_program(source, tests, limits) for source in solutions]


def label_batch(groups: Sequence[Group], limits: Limits | None = None) -> list[list[Label]]:
    """Run each solution of each group against the group's tests, all function tests in one sandbox.

    Args:
        groups: solutions (source text) and their tests; all written by one hand (see ``run_job``).
        limits: of each solution by itself (function tests) or each case (programs); default ``Limits()``.

    Returns:
        For each group a label for each solution, in order.

    Raises:
        ValueError: the tests cannot be run: no Python, nothing asserted, or none at all.
        RunError: no sandbox works here.
    """
    planned: list[tuple[list[Check], FunctionRun]] = []
    for group in groups:
        if isinstance(group.tests, FunctionTests):
            checks = plan_checks(group.tests)
            steps = tuple(check.step for check in checks)
            planned += [(checks, FunctionRun(source, steps)) for source in group.solutions]
    runs = [run for _, run in planned]
    reports = run_job(runs, limits, preload=_preload([run.source for run in runs])) if runs else []
    for number, report in enumerate(reports):
        if (report.damaged or not report.ended) and len(runs) > 1:  # another one's doing, perhaps: once more, alone
            [reports[number]] = run_job([runs[number]], limits)
    found = iter([_label_function(checks, report) for (checks, _), report in zip(planned, reports, strict=True)])
    return [
        [next(found) for _ in group.solutions]
        if isinstance(group.tests, FunctionTests)
        else _label_programs(group.solutions, group.tests, limits)
        for group in groups
    ]


def label(solution: str, tests: Tests, limits: Limits | None = None) -> Label:
    """Run one solution against its tests; see ``label_batch``."""
    return label_batch([Group((solution,), tests)], limits)[0][0]


def label_groups(
    groups: Sequence[Group],
    limits: Limits | None = None,
    *,
    groups_per_sandbox: int = 1,
    workers: int | None = None,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[list[Label]]:
    """Run many groups in parallel; the labels come back in the groups' order.

    Args:
        groups: what to run.
        limits: see ``label_batch``.
        groups_per_sandbox: more than one saves time, for groups that one hand wrote.
        workers: threads, each of which waits for one sandbox; default one a CPU.
        on_done: called with how many groups have been finished since the last call, from this thread.

    Raises:
        ValueError, RunError: as ``label_batch``.
    """
    batches = [groups[start : start + groups_per_sandbox] for start in range(0, len(groups), groups_per_sandbox)]
    labels: list[list[list[Label]]] = [[] for _ in batches]
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        futures = {pool.submit(label_batch, batch, limits): index for index, batch in enumerate(batches)}
        try:
            for future in as_completed(futures):
                index = futures[future]
                labels[index] = future.result()
                on_done(len(batches[index]))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [found for batch in labels for found in batch]
