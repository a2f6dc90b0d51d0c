"""Progress of long commands: a bar on a terminal, a line now and then elsewhere; on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

# Elsewhere than on a terminal: how many lines a whole command prints.
_LINES = 4


@contextmanager
def progress(what: str, unit: str = "problems") -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Show how far a command is.

    Args:
        what: what is being done, such as "running solutions".
        unit: what is counted, in the plural.

    Yields:
        ``start(total)``, which sets how many there are, and ``advance(count)``, which adds to those done. Work
        that an earlier run did is added in the same way.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        done = total = 0

        def start(count: int) -> None:
            nonlocal total
            total = count
            bar.update(task, total=count)

        def advance(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            bar.advance(task, count)
            if not console.is_terminal and total and done * _LINES // total > before * _LINES // total:
                click.echo(f"{what}: {done} of {total} {unit}", err=True)

        yield start, advance


def warn_of_weak_sandbox() -> None:
    """Say on standard error what the sandbox lacks on this machine, if anything."""
    from wmtp_ds.data.sandbox import sandbox_kind, what_is_missing

    lacking = what_is_missing()
    if lacking:
        click.echo(
            f"warning: the sandbox is '{sandbox_kind()}': {lacking}. Install bubblewrap for a stronger one "
            "(Debian, Ubuntu: apt-get install bubblewrap).",
            err=True,
        )
