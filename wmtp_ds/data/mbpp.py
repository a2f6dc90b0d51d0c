"""Imports MBPP (Austin et al. 2021, "Program Synthesis with Large Language Models") from its own JSONL format.

The reference solution is a correct row once it passes its tests; mutants of it that fail them are incorrect
rows. MBPP has no difficulty: problems get 1 to 11 by the quantile of their reference solution's length, in
characters as it is written out; the boundaries are those of the training problems.
"""

import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from wmtp_ds.data.dataset_files import code_version, fingerprint_of
from wmtp_ds.data.import_folder import ImportFolder, finished_import
from wmtp_ds.data.labelled_rows import Report, Source, labelled_rows, prompt_input
from wmtp_ds.data.labels import FunctionTests, plan_checks
from wmtp_ds.data.mutate import normalise
from wmtp_ds.data.rows import check_pairs, decode_object, read_lines
from wmtp_ds.data.sandbox import Limits
from wmtp_ds.errors import UserError
from wmtp_ds.files import open_file

DIFFICULTIES = 11
LIMITS = Limits(cpu_seconds=1.0)
_COMMIT_EVERY = 64  # problems
_EXAMPLE = '{"task_id": 1, "text": "...", "code": "...", "test_list": ["assert ..."]}'


@dataclass(frozen=True)
class Task:
    """One line of MBPP."""

    task_id: str
    text: str
    code: str
    tests: FunctionTests
    where: str  # file and line, for messages


def read_mbpp(path: Path) -> list[Task]:
    """Read an MBPP file: the full set's field names, or the sanitised one's (``prompt``, ``test_imports``).

    Raises:
        UserError: the file cannot be read or is empty, or a line is no MBPP problem; with file and line.
    """
    tasks: list[Task] = []
    lines: dict[str, int] = {}
    try:
        with open_file(path) as handle:
            for _, number, line in read_lines(handle, path):
                if not line.strip():
                    continue
                task = _parse(line, f"{path}:{number}")
                if task.task_id in lines:
                    raise UserError(
                        f"{task.where}: task_id {task.task_id} is already on line {lines[task.task_id]}: keep one"
                    )
                lines[task.task_id] = number
                tasks.append(task)
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder: give a JSONL file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not tasks:
        raise UserError(f"{path}: has no problems: give MBPP's JSONL, lines such as {_EXAMPLE}")
    return tasks


def _parse(line: bytes, where: str) -> Task:
    found = decode_object(line, where)
    check_pairs(found, where)
    text = found.get("text", found.get("prompt"))
    for key, value in (("text", text), ("code", found.get("code"))):
        if not isinstance(value, str) or not value.strip():
            raise UserError(f'{where}: "{key}" must be a text that is not empty: MBPP has {_EXAMPLE}')
    task_id = found.get("task_id")
    if isinstance(task_id, bool) or not isinstance(task_id, (int, str)):
        raise UserError(f'{where}: "task_id" must be a number or a text')
    for key in ("test_setup_code", "text", "prompt", "code"):
        if not isinstance(found.get(key, ""), str):
            raise UserError(f'{where}: "{key}" must be a text')
    asserts = [*_texts(found, "test_list", where), *_texts(found, "challenge_test_list", where)]
    setup = "\n".join([*_texts(found, "test_imports", where), found.get("test_setup_code", "")]).strip()
    tests = FunctionTests(tuple(test.strip() for test in asserts), setup.replace("\r\n", "\n"))
    try:
        plan_checks(tests)
    except ValueError as error:
        raise UserError(f'{where}: "test_list": {error}: give asserts on the solution\'s function') from None
    return Task(str(task_id), " ".join(str(text).split()), found["code"], tests, where)


def _texts(found: dict[str, Any], key: str, where: str) -> list[str]:
    value = found.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f'{where}: "{key}" must be a list of texts')
    return value


def _length(task: Task) -> int:
    try:
        return len(normalise(task.code))
    except ValueError:
        return len(task.code)


def quantile_edges(lengths: Sequence[int]) -> list[float]:
    """The ten boundaries between the eleven difficulties, of lengths in characters."""
    if len(lengths) < 2:
        return [float(length) for length in lengths] * (DIFFICULTIES - 1)
    return statistics.quantiles(lengths, n=DIFFICULTIES, method="inclusive")


def _source(task: Task, edges: Sequence[float]) -> Source:
    return Source(
        problem_id=f"mbpp-{task.task_id}",
        instruction=task.text,
        input=prompt_input(task.tests),
        references=(task.code,),
        tests=task.tests,
        difficulty=1 + bisect_left(edges, _length(task)),
        metadata={"source": "mbpp"},
    )


def _split(tasks: list[Task], fraction: float, seed: int) -> tuple[list[Task], list[Task]]:
    """Hold problems out for validation; those that share a text stay together."""
    texts = list(dict.fromkeys(task.text for task in tasks))
    if len(texts) < 2:
        raise UserError("--validation-fraction: one problem cannot be split: give more, or --validation FILE")
    held = set(Random(f"split-{seed}").sample(texts, min(len(texts) - 1, max(1, round(fraction * len(texts))))))
    return [task for task in tasks if task.text not in held], [task for task in tasks if task.text in held]


def _read_input(
    source: Path, validation: Path | None, fraction: float | None, seed: int
) -> tuple[list[Task], list[Task], int]:
    """Training and validation problems, and how many training problems were left out as shared."""
    if not source.exists():
        raise UserError(f"{source}: does not exist: give --input MBPP's JSONL file, or a folder with train.jsonl")
    if source.is_dir():
        if validation is not None or fraction is not None:
            raise UserError(
                "--validation and --validation-fraction do not go with a folder, whose validation.jsonl is used"
            )
        for name in ("train.jsonl", "validation.jsonl"):
            if not (source / name).exists():
                raise UserError(
                    f"{source}: has no {name}: give --input a folder with train.jsonl and validation.jsonl, or one "
                    "file in MBPP's JSONL format"
                )
        train, held = read_mbpp(source / "train.jsonl"), read_mbpp(source / "validation.jsonl")
    elif validation is not None:
        if fraction is not None:
            raise UserError("--validation and --validation-fraction exclude each other: give one of them")
        train, held = read_mbpp(source), read_mbpp(validation)
    else:
        return *_split(read_mbpp(source), 0.1 if fraction is None else fraction, seed), 0
    known = {task.text for task in held} | {task.task_id for task in held}
    kept = [task for task in train if task.text not in known and task.task_id not in known]
    if not kept:
        raise UserError("every training problem is a validation problem, too: give different files")
    return kept, held, len(train) - len(kept)


def import_mbpp(
    source: Path,
    output: Path,
    *,
    validation: Path | None = None,
    validation_fraction: float | None = None,
    mutants: int = 4,
    seed: int = 0,
    force: bool = False,
    on_start: Callable[[int], None] = lambda total: None,
    on_done: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Import MBPP into ``output``: train.jsonl, validation.jsonl and problems.jsonl, or leave them if they are there.

    Args:
        source: MBPP's JSONL, or a folder with train.jsonl and validation.jsonl.
        output: a folder.
        validation: MBPP's JSONL of the validation problems.
        validation_fraction: the share of problems held out where there is no validation file; default 0.1.
        mutants: incorrect solutions wanted of each problem.
        seed: decides mutants and split.
        force: replace what another import left in ``output``.
        on_start: called with the number of problems before they run.
        on_done: called with how many problems have run since the last call.

    Returns:
        The summary: counts of rows, references and mutants, and ``reused``.

    Raises:
        UserError: the input is not what it should be, or the folder cannot be written.
        RunError: no sandbox works here, or writing failed.
    """
    train, held, shared = _read_input(source, validation, validation_fraction, seed)
    made_from = {
        "command": "data import mbpp",
        "problems": _fingerprint(train, held),
        "mutants": mutants,
        "seed": seed,
        "code": code_version(),
    }
    reused = finished_import(output, made_from, force=force)
    if reused is not None:
        return reused
    edges = quantile_edges([_length(task) for task in train])
    with ImportFolder(output, made_from) as folder:
        on_start(len(train) + len(held))
        state = folder.state or {"done": {}, "reports": {}}
        on_done(sum(state["done"].values()))
        for split, tasks in (("train", train), ("validation", held)):
            report = Report.from_dict(state["reports"].get(split, {}))
            for start in range(state["done"].get(split, 0), len(tasks), _COMMIT_EVERY):
                part = [_source(task, edges) for task in tasks[start : start + _COMMIT_EVERY]]
                rows, of_part = labelled_rows(
                    part, mutants_per_problem=mutants, seed=seed, limits=LIMITS, on_done=on_done
                )
                for problem, of_problem in zip(part, rows, strict=True):
                    _write(folder, split, problem, of_problem)
                report.add(of_part)
                state["done"][split] = start + len(part)
                state["reports"][split] = report.as_dict()
                folder.commit(state)
            if split not in folder.splits:
                raise UserError(_nothing_passed(split, len(tasks), report))
            folder.splits[split] |= _told(report)
        return folder.publish({"difficulty_edges": edges, "training_problems_shared_with_validation": shared})


def _write(folder: ImportFolder, split: str, source: Source, rows: list[dict[str, Any]]) -> None:
    """A problem whose reference passes, and its rows; of another one there are none."""
    if not rows:
        return
    problem = {
        "problem_id": source.problem_id,
        "instruction": source.instruction,
        "input": source.input,
        "difficulty": source.difficulty,
        "tests": {"kind": "function", "asserts": list(source.tests.asserts), "setup": source.tests.setup},
        "limits": {"seconds": LIMITS.cpu_seconds, "memory_mb": LIMITS.memory_bytes >> 20},
        "language": "python",
        "evaluation_only": False,
        "source": "mbpp",
    }
    folder.add_problem(split, problem)
    for row in rows:
        folder.add_row(split, row)


def _nothing_passed(name: str, problems: int, report: Report) -> str:
    first = report.references_failed[0] if report.references_failed else "there was none to run"
    return (
        f"{name}: none of {problems} reference solutions passes its tests, so there are no rows to write: give "
        f"problems whose code passes. First: {first}"
    )


def _told(report: Report) -> dict[str, Any]:
    told = report.as_dict()
    told["problems_read"] = told.pop("problems")
    return told


def _fingerprint(train: list[Task], held: list[Task]) -> str:
    """A hash of the problems that were read, but for where they stood."""
    listed = [
        [(task.task_id, task.text, task.code, task.tests.asserts, task.tests.setup) for task in tasks]
        for tasks in (train, held)
    ]
    return fingerprint_of(listed)
