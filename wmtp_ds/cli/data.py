"""``wmtp-ds data``: sample data, and data from elsewhere, with labels earned by running."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click


@click.group(epilog="Example: wmtp-ds data sample --output storage/data/sample")
def data() -> None:
    """Make and import training data."""


@data.command(epilog="Example: wmtp-ds data sample --problems 440 --seed 0")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("storage/data/sample"),
    show_default=True,
    help="Folder for train.jsonl and validation.jsonl.",
)
@click.option("--problems", type=int, default=440, show_default=True, help="How many problems, at least 22.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def sample(output: Path, problems: int, seed: int, as_json: bool) -> None:
    """Generate problems that can be verified, with correct and incorrect solutions.

    Every label is earned by running the solution against its problem's tests in a sandbox. What is there already
    with the same options is left as it is.
    """
    from wmtp_ds.data.sample import make_sample

    began = time.monotonic()
    with _progress("running solutions") as (start, advance):
        summary = make_sample(output, problems=problems, seed=seed, on_start=start, on_done=advance)
    if as_json:
        click.echo(json.dumps(_completed(summary, output, began), indent=2))
        return
    _tell_files(summary, output, began)
    _tell_runs(summary)


@data.group("import", epilog="Example: wmtp-ds data import mbpp --input mbpp.jsonl --output storage/data/mbpp")
def import_() -> None:
    """Import data from its own format, with labels earned by running."""


@import_.command(epilog="Example: wmtp-ds data import mbpp --input mbpp.jsonl --output storage/data/mbpp --mutants 4")
@click.option(
    "--input",
    "source",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="MBPP's JSONL, or a folder with train.jsonl and validation.jsonl.",
)
@click.option(
    "--output",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder for train.jsonl and validation.jsonl.",
)
@click.option(
    "--validation", metavar="FILE", type=click.Path(path_type=Path), help="MBPP's JSONL of the validation problems."
)
@click.option(
    "--validation-fraction",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the problems held out where there is no validation file.  [default: 0.1]",
)
@click.option(
    "--mutants",
    type=click.IntRange(0, 100),
    default=4,
    show_default=True,
    help="Incorrect solutions wanted of each problem.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides the mutants and the split.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def mbpp(
    source: Path,
    output: Path,
    validation: Path | None,
    validation_fraction: float | None,
    mutants: int,
    seed: int,
    as_json: bool,
) -> None:
    """Import MBPP (Mostly Basic Python Problems).

    The reference solution becomes a correct row once it passes its tests, mutants of it that fail them become
    incorrect rows.
    """
    from wmtp_ds.data.mbpp import import_mbpp

    began = time.monotonic()
    with _progress("running solutions") as (start, advance):
        summary = import_mbpp(
            source,
            output,
            validation=validation,
            validation_fraction=validation_fraction,
            mutants=mutants,
            seed=seed,
            on_start=start,
            on_done=advance,
        )
    if as_json:
        click.echo(json.dumps(_completed(summary, output, began), indent=2))
        return
    _tell_files(summary, output, began)
    for name in ("train", "validation"):
        click.echo(f"{name}:")
        _tell_runs(summary[name])


def _warn_of_weak_sandbox() -> None:
    from wmtp_ds.data.sandbox import sandbox_kind

    lacking = {
        "namespaces": "the code can read this machine's files, as far as its user may",
        "plain": "the code can reach the network and this machine's files, as far as its user may",
    }.get(sandbox_kind())
    if lacking:
        click.echo(
            f"warning: the sandbox is '{sandbox_kind()}': {lacking}. Install bubblewrap for a stronger one "
            "(Debian, Ubuntu: apt-get install bubblewrap).",
            err=True,
        )


@contextmanager
def _progress(what: str) -> Iterator[tuple[Any, Any]]:
    """Two functions, to set the total and to count: a bar on a terminal, a line now and then elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        done = total = 0

        def start(count: int) -> None:
            nonlocal total
            total = count
            _warn_of_weak_sandbox()
            progress.update(task, total=count)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress.advance(task, count)
            if not console.is_terminal and done * 4 // total > (done - count) * 4 // total:
                click.echo(f"{what}: {done} of {total} problems", err=True)

        yield start, advance


def _completed(summary: dict[str, Any], output: Path, began: float) -> dict[str, Any]:
    from wmtp_ds.data.sandbox import sandbox_kind

    told = {"output": str(output), **summary, "seconds": round(time.monotonic() - began, 1)}
    return told if summary["reused"] else {**told, "sandbox": sandbox_kind()}


def _tell_files(summary: dict[str, Any], output: Path, began: float) -> None:
    from wmtp_ds.data.sandbox import sandbox_kind

    if summary["reused"]:
        click.echo(f"{output} holds this data already; left as it is")
    else:
        click.echo(f"wrote {output} in {time.monotonic() - began:.0f} s; code ran in the sandbox '{sandbox_kind()}'")
    for name in ("train", "validation"):
        found = summary[name]
        click.echo(
            f"  {name + '.jsonl':<17}{found['rows']:>6} rows of {found['problems']} problems: "
            f"{found['correct']} correct, {found['incorrect']} incorrect"
        )
        spread = "  ".join(f"{difficulty}: {count}" for difficulty, count in found["by_difficulty"].items())
        click.echo(f"{'':>19}by difficulty  {spread}")


def _tell_runs(found: dict[str, Any]) -> None:
    failed = len(found["references_failed"])
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in found["mutant_verdicts"].items())
    click.echo(
        f"  references: {found['references'] - failed} of {found['references']} pass their tests\n"
        f"  mutants: {found['mutants']} run ({verdicts or 'none'}); {found['mutants_survived_and_dropped']} survived "
        f"and were dropped, {found['mutants_failed_but_not_needed']} failed but were not needed"
    )
    for line in found["references_failed"][:10]:
        click.echo(f"  failed: {line}")
    if failed > 10:
        click.echo(f"  and {failed - 10} more, listed in manifest.json")
