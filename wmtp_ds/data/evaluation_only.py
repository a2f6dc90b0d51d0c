"""Rows that one must not train on: those with ``metadata.evaluation_only``, which imports of test sets write."""

from pathlib import Path

from wmtp_ds.data.rows import Row, parse_row, read_lines
from wmtp_ds.errors import UserError
from wmtp_ds.files import open_file

HOW_TO_ALLOW = "name training data, or set dataset.allow_evaluation_data = true to train on it all the same"

_KEY = b"evaluation_only"


def is_evaluation_only(row: Row) -> bool:
    """Whether the row is marked."""
    return row.metadata.get("evaluation_only") is True


def refuse_evaluation_rows(path: str | Path) -> None:
    """Check that no row of a data file is marked: one pass over the file, which parses only lines that may be.

    Args:
        path: a data file whose lines are known to be rows.

    Raises:
        UserError: a row is; with its line and its source.
    """
    with open_file(path) as handle:
        for _, number, line in read_lines(handle, path):
            if _KEY not in line and b"\\u" not in line:  # a key may be written with escapes
                continue
            if line.strip() and is_evaluation_only(row := parse_row(line, path, number)):
                raise UserError(f"dataset.train: {refusal(row, path, number)}: {HOW_TO_ALLOW}")


def refusal(row: Row, path: str | Path, line_number: int) -> str:
    """What is wrong with a marked row in a training file."""
    source = row.metadata.get("source")
    named = f" ({source})" if isinstance(source, str) else ""
    return f"{path}:{line_number}: problem {row.problem_id}{named} is for evaluation only"
