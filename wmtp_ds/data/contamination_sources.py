"""Evaluation sets that training data may be compared to: imported ones, and HumanEval and MBPP as published."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from wmtp_ds.data.import_folder import PROBLEMS
from wmtp_ds.data.rows import decode_object, read_lines
from wmtp_ds.errors import UserError
from wmtp_ds.files import open_file

PROBLEM, SOLUTION = "problem", "solution"

# The keys of rows and of problems.jsonl, of HumanEval, and of MBPP.
_OF_PROBLEM = ("instruction", "prompt", "text")
_OF_SOLUTION = ("output", "canonical_solution", "code")


class EvaluationText(NamedTuple):
    """A text of an evaluation set: its file and line, whether it is a problem or a solution, and what it says."""

    where: str
    part: str
    text: str


def problem_text(instruction: str, given: str) -> str:
    """What a problem says: its instruction, then its input."""
    return f"{instruction}\n{given}" if given else instruction


def read_evaluation(path: Path) -> Iterator[EvaluationText]:
    """The texts of an evaluation set.

    Args:
        path: a file of JSON lines, which may be compressed (.gz), all of whose lines count: rows, problems.jsonl,
            HumanEval or MBPP. Or a folder that an import wrote: its evaluation.jsonl, and the problems that are marked
            as for evaluation only.

    Raises:
        UserError: there is no such file, nothing to evaluate on in it, or a line that is none of these.
    """
    empty = True
    for file, marked_only in evaluation_files(path):
        for where, found in _objects(file):
            if marked_only and found.get("evaluation_only") is not True:
                continue
            empty = False
            yield from _texts(where, found)
    if empty:
        raise UserError(f"{path}: nothing to evaluate on in it: name the file of an evaluation set")


def evaluation_files(path: Path) -> list[tuple[Path, bool]]:
    """The files of an evaluation set, and of each whether only what is marked in it is for evaluation.

    Raises:
        UserError: a folder that has none.
    """
    if not path.is_dir():
        return [(path, False)]
    files = [(path / "evaluation.jsonl", False), (path / PROBLEMS, True)]
    there = [(file, marked_only) for file, marked_only in files if file.is_file()]
    if not there:
        raise UserError(f"{path}: has neither evaluation.jsonl nor {PROBLEMS}: name a file in it")
    return there


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with _open(path) as handle:
            for _, number, line in read_lines(handle, path):
                if line.strip():
                    yield f"{path}:{number}", decode_object(line, f"{path}:{number}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: correct --against") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: is no complete gzip file: fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _open(path: Path) -> BinaryIO:
    file = open_file(path)
    return cast(BinaryIO, gzip.open(file)) if path.suffix == ".gz" else file


def _texts(where: str, found: dict[str, Any]) -> Iterator[EvaluationText]:
    problem = next((found[key] for key in _OF_PROBLEM if isinstance(found.get(key), str)), None)
    solution = next((found[key] for key in _OF_SOLUTION if isinstance(found.get(key), str)), None)
    if problem is None and solution is None:
        raise UserError(
            f"{where}: has no text of a problem ({', '.join(_OF_PROBLEM)}) and none of a solution "
            f"({', '.join(_OF_SOLUTION)}): name an evaluation set of JSON lines"
        )
    given = found.get("input")
    if problem is not None:
        yield EvaluationText(where, PROBLEM, problem_text(problem, given if isinstance(given, str) else ""))
    if solution is not None:
        yield EvaluationText(where, SOLUTION, solution)
