"""A file that a command writes: whether it may be, and how it gets its name when it is whole."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from wmtp_ds.errors import RunError, UserError
from wmtp_ds.files import replace_file


def report_path(output: Path) -> Path:
    """Where the report of a written file is."""
    return output.with_name(f"{output.name}.report.json")


def check_output(output: Path, inputs: Sequence[Path], *, force: bool, option: str = "--output") -> None:
    """Check, before the work, that a file of that name may be written; its folder is made where it is missing.

    Args:
        output: the file that is to be.
        inputs: what is read, and must not be replaced.
        force: whether a file that is there may be replaced.
        option: what the user has named it with, for messages.

    Raises:
        UserError: it may not; says why.
    """
    try:
        if output.is_dir():
            raise UserError(f"{output}: is a folder: give {option} the name of a file")
        if output.exists():
            for path in inputs:
                if path.exists() and output.samefile(path):
                    raise UserError(f"{output}: is the input, or one of them: give {option} another name")
            if not output.is_file():
                raise UserError(f"{output}: is a device or a pipe: give {option} the name of a file")
            if not force:
                raise UserError(f"{output}: is there already: give another {option}, or --force to replace it")
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(output)
        partial.open("ab").close()
        partial.unlink()
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{output}: its folder is a file: give another {option}") from None
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}: give another {option}") from None


@contextlib.contextmanager
def whole_file(output: Path) -> Iterator[Path]:
    """A name to write to; the file gets its own when the context ends without an error, and is on the disk then.

    Raises:
        RunError: writing failed; nothing of it is left.
    """
    partial = _partial(output)
    try:
        yield partial
        replace_file(partial, output)
    except OSError as error:
        raise RunError(f"{output}: writing failed: {error.strerror or error}; it was not written") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _partial(output: Path) -> Path:
    return output.with_name(f".partial-{output.name}")
