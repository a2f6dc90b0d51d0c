"""Checks of data files and of the folder that is written to."""

import os
from pathlib import Path

from wmtp_ds.config.context import Check, Context
from wmtp_ds.errors import UserError

_ROWS = 20  # read of each file; the rest is checked when the index is built


def check_dataset(context: Context) -> None:
    """Both files exist, and their first rows keep to the schema."""
    for key in ("dataset.train", "dataset.validation"):
        path = context.path(key)
        if path is None:
            continue
        if not os.path.isfile(path):
            what = "is a folder, not a file" if os.path.isdir(path) else "does not exist"
            context.report(key, f"{path} {what}", how_to_get_data(path))
        else:
            _check_rows(context, key, path)


def how_to_get_data(path: str) -> str:
    """The command that makes or imports a data file."""
    folder = os.path.dirname(os.path.normpath(path)) or "."
    if folder == "storage/data/sample":
        return "make it: wmtp-ds data sample"
    source = "mbpp" if "mbpp" in folder.lower() else "SOURCE"
    return f"import it: wmtp-ds data import {source} --input FILE --output {folder}"


def _check_rows(context: Context, key: str, path: str) -> None:
    from wmtp_ds.data.rows import parse_row, read_lines

    mend = "correct the line, or import the data again"
    rows = 0
    try:
        with open(path, "rb") as file:
            for _, number, line in read_lines(file, path):
                if not line.strip():
                    continue
                rows += 1
                try:
                    parse_row(line, Path(path), number)
                except UserError as error:
                    context.report(key, str(error), mend)
                if rows == _ROWS:
                    break
    except UserError as error:
        context.report(key, str(error), mend)
    except OSError as error:
        context.report(key, f"{path} cannot be read: {error.strerror}", "check the file's permissions")
    else:
        if rows == 0:
            context.report(key, f"{path} is empty", how_to_get_data(path))


def check_save_dir(context: Context) -> None:
    """Checkpoints can be written."""
    key = "checkpoint.save_dir"
    path = context.path(key)
    if path is None:
        return
    nearest = os.path.abspath(path)
    while not os.path.exists(nearest):
        nearest = os.path.dirname(nearest)
    if not os.path.isdir(nearest):
        context.report(key, f"{path} cannot be a folder: {nearest} is a file", "name another folder")
    elif not os.access(nearest, os.W_OK | os.X_OK):
        context.report(key, f"{path} cannot be written: no permission in {nearest}", "name another folder")


DATA_CHECKS: tuple[Check, ...] = (check_dataset, check_save_dir)
