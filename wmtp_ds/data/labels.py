"""Labels by execution: runs solutions against their tests in the sandbox and says which are right, and why not.

A function test is an ``assert`` as MBPP writes it. Where it compares with a literal (``assert f(x) == [1, 2]``),
the sandbox only computes the other side; the comparison happens here. Tests by standard input and output are
compared here, too, line by line, without regard to white space at line ends and empty lines at the end.
"""

import ast
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from wmtp_ds.data.frames import RunReport, StepReport
from wmtp_ds.data.sandbox import FunctionRun, Limits, ProgramRun, Verdict, run_job, stopped_by

# Imported once a sandbox instead of once a solution; only what is quick to import and has no side effect.
PRELOADABLE = frozenset(
    ("bisect", "cmath", "collections", "copy", "functools", "heapq", "itertools", "math", "operator", "random", "re")
)
_EVIDENCE_CHARACTERS = 300
_MEDDLED = (Verdict.ERROR, "the run meddled with the checker's messages")


@dataclass(frozen=True)
class FunctionTests:
    """Asserts on a function, run in the solution's namespace after ``setup``."""

    asserts: tuple[str, ...]
    setup: str = ""


@dataclass(frozen=True)
class StdioTests:
    """Pairs of standard input and the standard output that a program must answer with."""

    cases: tuple[tuple[str, str], ...]


Tests = FunctionTests | StdioTests


@dataclass(frozen=True)
class Label:
    """What running a solution showed.

    ``passed`` of ``total`` tests passed; ``evidence`` tells the first that did not ("" where all did). Nothing
    in it depends on the machine or the time, so the same solution gets the same label again.
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


@dataclass(frozen=True)
class Check:
    """One step of a test suite and how its report is judged.

    ``rule``: "runs" (it must not raise), "equals" or "is" (its value against ``expected``), "same" (its two
    values against each other), "true" (it must be a true value). ``test`` is the test's index, -1 the setup.
    """

    step: tuple[str, ...]
    test: int
    rule: str
    expected: Any = None

    def accepts(self, values: tuple[Any, ...]) -> bool:
        """Whether the step's values are as they should be."""
        if self.rule == "runs":
            return True
        if self.rule == "is":
            return values[0] is self.expected
        if self.rule == "true":
            return values[0] is True
        try:
            return bool(values[0] == (self.expected if self.rule == "equals" else values[1]))
        except RecursionError:
            return False


def show(value: Any, depth: int = 0) -> str:
    """``repr`` that is the same in every process: sets come sorted."""
    if depth > 20:
        return "..."
    if isinstance(value, (set, frozenset)) and value:
        return "{" + ", ".join(sorted(show(item, depth + 1) for item in value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(show(item, depth + 1) for item in value) + "]"
    if isinstance(value, tuple):
        items = [show(item, depth + 1) for item in value]
        return f"({items[0]},)" if len(items) == 1 else "(" + ", ".join(items) + ")"
    if isinstance(value, dict):
        pairs = (f"{show(key, depth + 1)}: {show(item, depth + 1)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, int) and value.bit_length() > 4096:  # repr() refuses these
        return hex(value)[:40] + "..."
    return repr(value)


def _literal(node: ast.expr) -> tuple[bool, Any]:
    try:
        return True, ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False, None


def _check_of_assert(condition: ast.expr, test: int) -> Check:
    """The step that evaluates an assert's condition, and the judgement of what comes back."""
    if isinstance(condition, ast.Compare) and len(condition.ops) == 1:
        left, right, operator = condition.left, condition.comparators[0], condition.ops[0]
        if isinstance(operator, ast.Eq):
            for side, computed in ((right, left), (left, right)):
                is_literal, expected = _literal(side)
                if is_literal:
                    return Check(("value", ast.unparse(computed)), test, "equals", expected)
            return Check(("pair", ast.unparse(left), ast.unparse(right)), test, "same")
        if isinstance(operator, ast.Is) and isinstance(right, ast.Constant) and right.value in (None, True, False):
            return Check(("value", ast.unparse(left)), test, "is", right.value)
    # Any truthy value will do, as in an assert.
    return Check(("truth", f"True if ({ast.unparse(condition)}) else False"), test, "true")


def plan_checks(tests: FunctionTests) -> list[Check]:
    """The steps that a test suite consists of.

    Raises:
        ValueError: a test or the setup is not Python, a test asserts nothing, or there are none.
    """
    checks = []
    if tests.setup.strip():
        checks.append(Check(("exec", ast.unparse(_parse(tests.setup, "the setup code"))), -1, "runs"))
    for number, text in enumerate(tests.asserts):
        name = f"test {number + 1}"
        body = _parse(text.strip(), name).body
        if not any(isinstance(statement, ast.Assert) for statement in body):
            raise ValueError(f"{name} asserts nothing")
        for statement in body:
            if isinstance(statement, ast.Assert):
                checks.append(_check_of_assert(statement.test, number))
            else:
                checks.append(Check(("exec", ast.unparse(statement)), number, "runs"))
    if not tests.asserts:
        raise ValueError("there are no tests")
    return checks


def _parse(text: str, name: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name} is not Python: {error}") from None


def _tidy(text: str) -> str:
    """Evidence without what changes from run to run (addresses) and without line ends, shortened."""
    text = " ".join(re.sub(r"0x[0-9a-fA-F]{6,}", "0x...", text).split())
    return text if len(text) <= _EVIDENCE_CHARACTERS else text[: _EVIDENCE_CHARACTERS - 3] + "..."


def _judge_step(check: Check, report: StepReport) -> tuple[Verdict, str]:
    """The verdict on a step that was reached, and why."""
    if report.error == "MemoryError":
        return Verdict.MEMORY, "out of memory"
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
        return Label(verdict, 0, total, _tidy(f"loading the solution: {evidence}"))
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
    return Label(verdict, 0 if -1 in failures else total - len(failures), total, _tidy(f"{where}: {evidence}"))


def _same_output(expected: str, written: bytes) -> bool:
    """Whether two outputs are equal but for white space at line ends and empty lines at the end."""

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().splitlines()]

    return lines(written.decode("utf-8", "replace")) == lines(expected)


def _judge_program(expected: str, report: RunReport) -> tuple[Verdict, str]:
    raised = report.steps.get(0)
    if raised is not None and raised.error:
        return _judge_step(Check((), 0, "runs"), raised)
    if report.damaged or stopped_by(report) is not None:
        return _judge_end(report)
    if report.code != 0:
        return Verdict.ERROR, f"exit code {report.code}"
    if report.truncated:
        return Verdict.ERROR, "wrote more than the output limit"
    if _same_output(expected, report.stdout):
        return Verdict.PASSED, ""
    return Verdict.WRONG, f"wrote {report.stdout[:100].decode('utf-8', 'replace')!r}, not {expected[:100]!r}"


def _label_program(cases: tuple[tuple[str, str], ...], reports: list[RunReport]) -> Label:
    first: tuple[Verdict, str] | None = None
    passed = 0
    for number, ((_, expected), report) in enumerate(zip(cases, reports, strict=True)):
        verdict, evidence = _judge_program(expected, report)
        if verdict is Verdict.PASSED:
            passed += 1
        else:
            first = first or (verdict, f"test {number + 1} of {len(cases)}: {evidence}")
    if first is None:
        return Label(Verdict.PASSED, passed, len(cases))
    return Label(first[0], passed, len(cases), _tidy(first[1]))


def _preload(sources: Sequence[str]) -> list[str]:
    named = {name for source in sources for name in re.findall(r"^\s*(?:import|from)\s+(\w+)", source, re.M)}
    return sorted(named & PRELOADABLE)


def _label_programs(solutions: Sequence[str], tests: StdioTests, limits: Limits | None) -> list[Label]:
    if not tests.cases:
        raise ValueError("there are no tests")
    return [
        _label_program(tests.cases, run_job([ProgramRun(source, case[0].encode()) for case in tests.cases], limits))
        for source in solutions
    ]


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
