"""A data file without its duplicates."""

import contextlib
import os
from pathlib import Path

import numpy as np

from wmtp_ds.data.duplicates import Findings
from wmtp_ds.errors import RunError, UserError


def write_kept(findings: Findings, output: Path, *, force: bool) -> None:
    """Write the rows that stay, each line as it is, in the file's order. The name appears when all is on the disk.

    Raises:
        UserError: the name is taken and ``force`` is not given, it is the file itself, or no row stays.
        RunError: writing failed.
    """
    check_output(findings.index.path, output, force=force)
    if not findings.kept.any():
        raise UserError(f"{findings.index.path}: no row would be left: raise --threshold, or compare to other data")
    partial = output.with_name(f".partial-{output.name}")
    offsets = findings.index.offset.tolist()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with findings.index.path.open("rb") as source, partial.open("wb") as file:
            for i in np.flatnonzero(findings.kept).tolist():
                source.seek(offsets[i])
                file.write(source.readline().rstrip(b"\r\n") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, output)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RunError(f"{output}: writing failed: {error.strerror}; nothing was written") from None


def check_output(source: Path, output: Path, *, force: bool) -> None:
    """Check, before the work, that a file of that name may be written.

    Raises:
        UserError: it may not; says why.
    """
    if output.is_dir():
        raise UserError(f"{output}: is a folder: give --output the name of a file")
    if not output.exists():
        return
    if source.exists() and output.samefile(source):
        raise UserError(f"{output}: is the input: give --output another name")
    if not force:
        raise UserError(f"{output}: is there already: give another --output, or --force to replace it")
