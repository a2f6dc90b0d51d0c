"""Checks of data files and of the folder that is written to."""

import os
from pathlib import Path

from wmtp_ds.config.context import Check, Context, why_no_file
from wmtp_ds.errors import UserError
from wmtp_ds.run_summary import why_not_a_runs_folder

_ROWS = 20  # read of each file; the rest is checked when the index is built


def check_dataset(context: Context) -> None:
    """Both files exist, and their first rows keep to the schema."""
    for key in ("dataset.train", "dataset.validation"):
        path = context.path(key)
        if path is None:
            continue
        if what := why_no_file(path):
            context.report(key, f"{path} {what}", how_to_get_data(path))
        else:
            _check_rows(context, key, path)


def how_to_get_data(path: str) -> str:
    """The command that makes or imports a data file; for other data, what belongs there."""
    folder = os.path.dirname(os.path.normpath(path)) or "."
    if folder == "storage/data/sample":
        return "make it: wmtp-ds data sample"
    if "mbpp" in folder.lower():
        return f"import it: wmtp-ds data import mbpp --input FILE --output {folder}"
    if "codecontests" in folder.lower():
        return f"import it: wmtp-ds data import codecontests --input FOLDER --output {folder}"
    return (
        'put the file there: JSONL, each line {"problem_id": "1", "instruction": "...", "output": "...", '
        '"is_correct": true}; such files come from: wmtp-ds data sample, '
        "wmtp-ds data import mbpp --input FILE --output DIR"
    )


def _check_rows(context: Context, key: str, path: str) -> None:
    from wmtp_ds.data.evaluation_only import HOW_TO_ALLOW, is_evaluation_only, refusal
    from wmtp_ds.data.rows import parse_row, read_lines

    mend = "correct the line, or make the file again"
    rows = 0
    allowed = key != "dataset.train" or context.get("dataset.allow_evaluation_data") is True
    try:
        with open(path, "rb") as file:
            for _, number, line in read_lines(file, path):
                if not line.strip():
                    continue
                rows += 1
                try:
                    row = parse_row(line, Path(path), number)
                except UserError as error:
                    context.report(key, str(error), mend)
                else:
                    if not allowed and is_evaluation_only(row):
                        context.report(key, refusal(row, path, number), HOW_TO_ALLOW)
                        allowed = True  # said once
                if rows == _ROWS or not _is_text(line):  # nothing new would be said of a compressed file's lines
                    break
    except UserError as error:
        context.report(key, str(error), mend)
    except OSError as error:
        context.report(key, f"{path} cannot be read: {error.strerror}", "check the file's permissions")
    else:
        if rows == 0:
            context.report(key, f"{path} is empty", how_to_get_data(path))


def _is_text(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def check_save_dir(context: Context) -> None:
    """Checkpoints can be written, into a folder of the run's own."""
    key = "checkpoint.save_dir"
    path = context.path(key)
    if path is None:
        return
    nearest = os.path.abspath(path)
    while not os.path.lexists(nearest):
        nearest = os.path.dirname(nearest)
    if not os.path.exists(nearest):
        what = f"cannot be a folder: {nearest} is a symbolic link that leads nowhere"
    elif not os.path.isdir(nearest):
        what = f"cannot be a folder: {nearest} is a file"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        what = f"cannot be written: no permission in {nearest}"
    else:
        what = why_not_a_runs_folder(Path(path))
    if what:
        context.report(key, f"{path} {what}", "name another folder, one for each run")


DATA_CHECKS: tuple[Check, ...] = (check_dataset, check_save_dir)
