"""``wmtp-ds data dedup``: duplicates, contradictions and contamination in a data file."""

import json
import time
from pathlib import Path
from typing import Any

import click

from wmtp_ds.cli.finite import FiniteRange

_SHOWN = 5  # pairs of each kind


@click.command(
    epilog="Example: wmtp-ds data dedup storage/data/mbpp/train.jsonl --against HumanEval.jsonl.gz "
    "--drop --output storage/data/mbpp/train-clean.jsonl"
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--against",
    multiple=True,
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="An evaluation set: JSONL (also .gz) of rows, problems, HumanEval or MBPP, or an imported folder. Repeatable.",
)
@click.option(
    "--split",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The other side of the split.  [default: validation.jsonl beside a train.jsonl]",
)
@click.option(
    "--threshold",
    type=FiniteRange(0.3, 1.0),
    default=0.8,
    show_default=True,
    help="Jaccard similarity of near duplicates.",
)
@click.option("--shingle", type=click.IntRange(1, 100), default=5, show_default=True, help="Tokens of a shingle.")
@click.option(
    "--ngram",
    type=click.IntRange(2, 100),
    default=13,
    show_default=True,
    help="Words of an n-gram that is looked for in evaluation sets.",
)
@click.option(
    "--overlap",
    type=FiniteRange(0.0, 1.0),
    default=0.7,
    show_default=True,
    help="Share of an evaluation text's n-grams that makes a row contaminated; 0: a single one does.",
)
@click.option(
    "--what",
    type=click.Choice(["solutions", "problems", "both"]),
    default="both",
    show_default=True,
    help="Which texts are compared.",
)
@click.option(
    "--conflicts",
    type=click.Choice(["keep", "drop"]),
    default="keep",
    show_default=True,
    help="What --drop does to rows of the same solution, one of them correct and the other incorrect.",
)
@click.option("--drop", is_flag=True, help="Write the file without what was found, to --output.")
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The file that --drop writes; FILE.report.json, beside it, names what was dropped, and why.",
)
@click.option("--force", is_flag=True, help="Replace the output.")
@click.option("--check", is_flag=True, help="Exit with 1 if anything was found.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, with the first 100 pairs of a kind.")
def dedup(
    file: Path,
    against: tuple[Path, ...],
    split: Path | None,
    what: str,
    drop: bool,
    output: Path | None,
    force: bool,
    check: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Find rows of FILE that repeat others, contradict each other, or belong to an evaluation set.

    Solutions are compared to those of the same problem and label; problems to all others. Exits with 0 whatever was
    found, unless --check is given.
    """
    if drop != (output is not None):
        raise click.UsageError("--drop and --output FILE go together: what is left is written there.")
    from wmtp_ds.cli.progress import progress
    from wmtp_ds.data.duplicates import DuplicateOptions, find_duplicates
    from wmtp_ds.data.duplicates_files import write_kept
    from wmtp_ds.data.output_file import check_output, report_path

    if split is None and file.name == "train.jsonl" and (beside := file.with_name("validation.jsonl")).is_file():
        split = beside
    if output is not None:
        inputs = _inputs(file, against, split)
        check_output(output, inputs, force=force)
        check_output(report_path(output), inputs, force=True)
    parts = ("problem", "solution") if what == "both" else (what.removesuffix("s"),)
    began = time.monotonic()
    with progress("comparing rows", "rows") as (start, advance):
        found = find_duplicates(
            file,
            DuplicateOptions(parts=parts, **options),
            against=against,
            split=split,
            on_start=start,
            on_done=advance,
        )
    if output is not None:
        compared = {"against": [str(path) for path in against], "split": None if split is None else str(split)}
        write_kept(found, output, {"file": str(file), **compared, "what": what, **options})
    report = {**found.report, "output": None if output is None else str(output)}
    if as_json:
        click.echo(json.dumps({**report, "seconds": round(time.monotonic() - began, 1)}, indent=2))
    else:
        _tell(report, time.monotonic() - began)
    return 1 if check and found.anything else 0


def _inputs(file: Path, against: tuple[Path, ...], split: Path | None) -> list[Path]:
    """What is read, and must not be replaced."""
    from wmtp_ds.data.contamination_sources import evaluation_files

    sets = [found for path in against for found, _ in evaluation_files(path)]
    return [file, *sets, *([] if split is None else [split])]


def _tell(report: dict[str, Any], seconds: float) -> None:
    click.echo(f"{report['file']}: {report['rows']} rows of {report['problems']} problems, compared in {seconds:.0f} s")
    if (found := report["contamination"]) is not None:
        rules = ", ".join(f"{count} {rule.replace('_', ' ')}" for rule, count in sorted(found["by_rule"].items()))
        _tell_kind(
            f"contaminated: {found['rows']} rows of {found['problems']} problems overlap "
            f"{found['evaluation_texts_found']} of {found['evaluation_texts']} evaluation texts"
            + (f" ({rules})" if rules else ""),
            found["pairs"],
        )
    if (found := report["split"]) is not None:
        rules = ", ".join(f"{count} by {rule}" for rule, count in sorted(found["by_rule"].items()))
        _tell_kind(
            f"on both sides of the split: {found['problems']} problems with {found['rows']} rows, against "
            f"{found['other_side']}" + (f" ({rules})" if rules else ""),
            found["pairs"],
        )
    if (found := report["repeated_problems"]) is not None:
        _tell_kind(
            f"repeated problems: {found['exact']} exactly and {found['near']} nearly, in {found['groups']} groups, "
            f"with {found['rows']} rows",
            found["pairs"],
        )
    found = report["conflicts"]
    became = "dropped" if found["dropped"] else "they stay"
    _tell_kind(
        f"solutions labelled both ways: {found['solutions']} with {found['rows']} rows"
        + (f"; {became}" if found["rows"] else ""),
        found["pairs"],
    )
    if (found := report["repeated_solutions"]) is not None:
        _tell_kind(
            f"repeated solutions: {found['exact']} exactly and {found['near']} nearly, in {found['groups']} groups; "
            f"{found['correct']} of them correct",
            found["pairs"],
        )
    click.echo(f"  without all that: {report['rows_kept']} rows")
    if report["output"] is not None:
        click.echo(f"wrote {report['output']}; {report['output']}.report.json names every dropped row, and why")


def _tell_kind(line: str, pairs: list[dict[str, Any]]) -> None:
    click.echo(f"  {line}")
    for pair in pairs[:_SHOWN]:
        how = pair.get("says") or f"{pair['rule']} {pair['similarity']:.2f}"
        click.echo(f"    {pair['row']}  {pair['of']}  {how}")
    if len(pairs) > _SHOWN:
        click.echo("    and more; --json names the first 100")
