"""Finds the tests of a row: its own, or its problem's in ``problems.jsonl``."""

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wmtp_ds.data.labels import FunctionTests, StdioTests, Tests, plan_checks
from wmtp_ds.data.labels_output import Comparison
from wmtp_ds.data.rows import check_pairs, decode_object, read_lines
from wmtp_ds.data.sandbox import FunctionRun, Limits, run_job
from wmtp_ds.errors import UserError
from wmtp_ds.files import open_file

PROBLEMS = "problems.jsonl"
PYTHON = frozenset(("python", "python3", "py", "py3"))
# Memory is limited by addresses, of which the interpreter alone takes some that no judge would count.
INTERPRETER_MB = 128

_CACHED_PROBLEMS = 32
_MIN_OUTPUT_BYTES = 1 << 20
# Of a source's own limits: a day, a terabyte. Clocks and rlimits take no number whatever.
_MOST = {"seconds": 86_400, "memory_mb": 1_000_000}


class UnusableTestsError(Exception):
    """Tests that prove nothing about a solution, and why."""


@dataclass(frozen=True)
class Problem:
    """What a row is tested with. ``seconds`` and ``memory_mb`` are the source's own limits; None where it has none."""

    tests: Tests
    seconds: float | None = None
    memory_mb: float | None = None
    evaluation_only: bool = False

    def limits(self, default: Limits, factor: float) -> Limits:
        """What one run may use: the source's limit of time times ``factor``, or the default."""
        cpu = default.cpu_seconds if self.seconds is None else self.seconds * factor
        memory = default.memory_bytes
        if self.memory_mb is not None:
            memory = int(self.memory_mb * 1e6) + (INTERPRETER_MB << 20)
        output = _MIN_OUTPUT_BYTES
        if isinstance(self.tests, StdioTests):
            output = max(output, 2 * max(len(wanted) for _, wanted in self.tests.cases))
        return replace(
            default,
            cpu_seconds=cpu,
            wall_seconds=5 + 4 * cpu,
            memory_bytes=memory,
            output_bytes=output,
            file_bytes=max(default.file_bytes, 2 * output),
        )


def read_tests(found: Any, setup: str, comparison: Comparison) -> Tests:
    """Tests as a row (a list of asserts) or a problem (an object with ``kind``) has them.

    Raises:
        UnusableTestsError: they are neither.
    """
    if isinstance(found, list):
        found = {"kind": "function", "asserts": found, "setup": setup}
    if isinstance(found, dict) and found.get("kind") == "function":
        asserts, setup = found.get("asserts"), found.get("setup") or ""
        if isinstance(asserts, list) and all(isinstance(one, str) for one in asserts) and isinstance(setup, str):
            return FunctionTests(tuple(asserts), setup)
    if isinstance(found, dict) and found.get("kind") == "stdio":
        cases = found.get("cases")
        if isinstance(cases, list) and cases and all(_is_case(case) for case in cases):
            return StdioTests(tuple((stdin, stdout) for stdin, stdout in cases), comparison)
    raise UnusableTestsError("they are neither a list of asserts nor cases of input and output")


def _is_case(case: Any) -> bool:
    return isinstance(case, list) and len(case) == 2 and all(isinstance(part, str) for part in case)


class ProblemFile:
    """Problems by id: an index of a ``problems.jsonl``, of which only a few problems are held in memory.

    Raises:
        UserError: it cannot be read, a line is no problem, or an id occurs twice.
    """

    def __init__(self, path: Path):
        self.path = path
        self._places: dict[str, tuple[int, int, int]] = {}  # id -> offset, size, line
        try:
            with open_file(path) as handle:
                for offset, number, line in read_lines(handle, path):
                    if line.strip():
                        self._enter(line, offset, number)
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}: give --problems a JSONL file") from None
        self.get = functools.lru_cache(_CACHED_PROBLEMS)(self._read)

    def _enter(self, line: bytes, offset: int, number: int) -> None:
        where = f"{self.path}:{number}"
        problem = decode_object(line, where)
        if b"\\u" in line:
            check_pairs(problem, where)
        own_id = problem.get("problem_id")
        if not isinstance(own_id, str) or not own_id.strip():
            raise UserError(f'{where}: "problem_id" must be a text that is not empty')
        if own_id in self._places:
            raise UserError(f"{where}: problem {own_id} is already on line {self._places[own_id][2]}: keep one of them")
        self._places[own_id] = (offset, len(line), number)

    def _read(self, problem_id: str) -> Mapping[str, Any] | None:
        if problem_id not in self._places:
            return None
        offset, size, number = self._places[problem_id]
        return decode_object(os.pread(self._handle, size, offset), f"{self.path}:{number}")

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._handle)


def problem_of(row: Mapping[str, Any], problems: ProblemFile | None, comparison: Comparison) -> Problem | str:
    """What a row is tested with, or why there is nothing to test it with.

    Args:
        row: a row, as JSON.
        problems: of the rows that bring no tests of their own.
        comparison: of the output of programs.

    Raises:
        UnusableTestsError: there are tests, and they cannot be run.
    """
    metadata = row.get("metadata") or {}
    found = (problems.get(row["problem_id"]) if problems else None) or {}
    language = metadata.get("language") or found.get("language") or "python"
    if not isinstance(language, str) or language not in PYTHON:
        return f"language {language}"
    listed = metadata.get("tests") or found.get("tests")
    if not listed:
        return "no tests"
    tests = read_tests(listed, metadata.get("test_setup") or "", comparison)
    limits = found.get("limits") or {}
    return Problem(
        tests, _number(limits, "seconds"), _number(limits, "memory_mb"), found.get("evaluation_only") is True
    )


def _number(limits: Any, key: str) -> float | None:
    value = limits.get(key) if isinstance(limits, dict) else None
    if not isinstance(value, (int, float)) or not value > 0:
        return None
    if value > _MOST[key]:
        raise UnusableTestsError(f"the limit of {key} is more than {_MOST[key]:,}")
    return float(value)


def check_tests(tests: Tests, limits: Limits) -> None:
    """Try the tests without any solution.

    Raises:
        UnusableTestsError: they pass without one, or fail for another reason than that there is none.
        RunError: no sandbox works here.
    """
    if isinstance(tests, StdioTests):
        if all(not wanted.strip() for _, wanted in tests.cases):
            raise UnusableTestsError("a program that does nothing passes them")
        return
    found = _check_functions(tests, limits)
    if found:
        raise UnusableTestsError(found)


@functools.lru_cache(1024)
def _check_functions(tests: FunctionTests, limits: Limits) -> str:
    try:
        checks = plan_checks(tests)
    except ValueError as error:
        return str(error)
    [report] = run_job([FunctionRun("", tuple(check.step for check in checks))], limits)
    missed = False
    for number, check in enumerate(checks):
        where = "the setup code" if check.test < 0 else f"test {check.test + 1}"
        told = report.steps.get(number)
        if told is None:
            return f"{where} does not come to an end even without a solution"
        if told.error == "NameError":
            missed = True
        elif told.error:
            return f"{where} fails without a solution: {told.error}: {told.message}"[:300]
        elif not check.accepts(told.values):
            return f"{where} fails without calling a solution: {json.dumps(check.step[1])}"[:300]
    return "" if missed else "they pass without a solution"
