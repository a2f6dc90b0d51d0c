"""``wmtp-ds data label``: labels earned by running."""

import json
import os
import time
from pathlib import Path
from typing import Any

import click

from wmtp_ds.cli.finite import FiniteRange

_SHOWN = 5  # disagreements, and problems with suspicious tests


# What a reward model needs to be told, and what only running does.
_OF_SCORING = ("dtype", "template", "max_length", "batch_size")
_OF_RUNNING = (
    "problems", "workers", "limit_seconds", "limit_memory", "limit_factor", "white_space", "float_tolerance",
    "untested", "suspicious",
)  # fmt: skip


@click.command(epilog="Example: wmtp-ds data label --input storage/data/own/train.jsonl --output labelled.jsonl")
@click.option("--input", "source", required=True, metavar="FILE", type=click.Path(path_type=Path), help="A data file.")
@click.option(
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The labelled file; FILE.report.json is written beside it.",
)
@click.option(
    "--problems",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Tests of rows that bring none of their own.  [default: problems.jsonl beside the input]",
)
@click.option("--workers", type=click.IntRange(min=1), help="Solutions that run at a time.  [default: one a CPU]")
@click.option(
    "--limit-seconds",
    type=FiniteRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="CPU time of a function's tests together, or of a program's run on one input, where the problem has no limit.",
)
@click.option(
    "--limit-memory",
    type=click.IntRange(min=64),
    default=512,
    show_default=True,
    metavar="MB",
    help="Memory of each process in MiB, the interpreter included, where the problem has no limit.",
)
@click.option(
    "--limit-factor",
    type=FiniteRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="A problem's own limit of time is taken times this.",
)
@click.option(
    "--white-space",
    type=click.Choice(["lines", "tokens"]),
    default="lines",
    show_default=True,
    help="In a program's output, only that at the ends of lines does not count (lines), or none does (tokens).",
)
@click.option(
    "--float-tolerance",
    type=FiniteRange(min=0),
    default=0.0,
    show_default=True,
    help="How far, absolutely or relatively, a program's decimal numbers may be off.",
)
@click.option(
    "--untested",
    type=click.Choice(["keep", "drop"]),
    default="keep",
    show_default=True,
    help="Rows without tests, or in another language, keep the source's label, or are dropped.",
)
@click.option(
    "--suspicious",
    type=click.Choice(["drop", "keep", "label"]),
    default="drop",
    show_default=True,
    help="Rows whose tests fail by themselves, or none of whose problem's correct solutions passes: drop them, keep "
    "the source's label, or believe the tests.",
)
@click.option(
    "--reward-model",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Run nothing: write this model's score into each row (metadata.reward_score), for "
    'models.reward.source = "scores".',
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="What the reward model computes in.",
)
@click.option(
    "--template",
    type=click.Choice(["alpaca", "plain"]),
    default="alpaca",
    show_default=True,
    help="Of the prompt, for a reward model without a chat template.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    help="Tokens that the reward model reads; longer rows lose their left.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Rows of a pass of the reward model."
)
@click.option("--force", is_flag=True, help="Replace an output that was made otherwise.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def label(
    context: click.Context,
    source: Path,
    output: Path,
    problems: Path | None,
    workers: int | None,
    limit_seconds: float,
    limit_memory: int,
    limit_factor: float,
    white_space: str,
    float_tolerance: float,
    untested: str,
    suspicious: str,
    reward_model: Path | None,
    force: bool,
    as_json: bool,
    **scoring: Any,
) -> None:
    """Run every row's solution against its tests in the sandbox, and label the row by what comes of it.

    With --reward-model, score every row instead. Interrupted, the same command goes on where it was.
    """
    _refuse_mixture(context, reward_model is not None)
    if reward_model is not None:
        _score(source, output, reward_model, force, as_json, scoring)
        return
    from wmtp_ds.cli.progress import progress, warn_of_weak_sandbox
    from wmtp_ds.data.label_file import LabelOptions, label_file
    from wmtp_ds.data.labels_output import Comparison

    options = LabelOptions(
        limit_seconds=limit_seconds,
        limit_memory_mb=limit_memory,
        limit_factor=limit_factor,
        untested=untested,
        suspicious=suspicious,
        comparison=Comparison(white_space, float_tolerance),
    )
    began = time.monotonic()
    with progress("running solutions", "rows") as (start, advance):

        def on_start(total: int) -> None:
            warn_of_weak_sandbox()
            start(total)

        report = label_file(
            source,
            output,
            options,
            problems=problems,
            workers=workers,
            force=force,
            on_start=on_start,
            on_done=advance,
        )
    seconds = time.monotonic() - began
    if as_json:
        click.echo(json.dumps({"output": str(output), **report, "seconds": round(seconds, 1)}, indent=2))
        return
    _tell(output, report, options.untested, options.suspicious, seconds, workers or os.cpu_count() or 1)


def _refuse_mixture(context: click.Context, scores: bool) -> None:
    for name in _OF_RUNNING if scores else _OF_SCORING:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            typed = f"--{name.replace('_', '-')}"
            raise click.UsageError(
                f"{typed} is about running solutions, and --reward-model runs none: leave one of them out."
                if scores
                else f"{typed} is about a reward model: name one with --reward-model, or leave it out."
            )


def _score(source: Path, output: Path, model: Path, force: bool, as_json: bool, options: dict[str, Any]) -> None:
    from wmtp_ds.cli.progress import progress
    from wmtp_ds.score_file import score_file

    began = time.monotonic()
    with progress("scoring solutions", "rows") as (start, advance):
        found = score_file(source, output, model, force=force, on_start=start, on_done=advance, **options)
    seconds = time.monotonic() - began
    if as_json:
        click.echo(json.dumps({"output": str(output), **found, "seconds": round(seconds, 1)}, indent=2))
        return
    click.echo(f"wrote {output} in {seconds:.0f} s: {found['rows']} rows with metadata.reward_score")
    for name in ("all", "correct", "incorrect"):
        if (figures := found[name]) is not None:
            told = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            click.echo(f"  {name:<10} {told}")


def _tell(output: Path, report: dict[str, Any], untested: str, suspicious: str, seconds: float, workers: int) -> None:
    if report["reused"]:
        click.echo(f"{output} holds these labels already; left as it is")
    else:
        click.echo(
            f"wrote {output} in {seconds:.0f} s; code ran in the sandbox '{report['sandbox']}', {workers} at a time"
        )
    click.echo(
        f"  rows: {report['rows_read']} read, {report['rows_written']} written; {report['labelled']} labelled by "
        f"running: {report['correct']} correct, {report['incorrect']} incorrect"
    )
    _tell_source(report)
    for reason, count in report["untested"].items():
        became = "keep the source's label" if untested == "keep" else "were dropped"
        click.echo(f"  not run ({reason}): {count} rows, which {became}")
    if report["suspicious_rows"]:
        became = {
            "drop": "were dropped",
            "keep": "keep the source's label",
            "label": "were labelled where their tests run, else dropped",
        }[suspicious]
        click.echo(
            f"  suspicious tests: {report['suspicious_problems']} problems with {report['suspicious_rows']} rows, "
            f"which {became}"
        )
        first = report["suspicious_problems_first"]
        for problem_id, reason in list(first.items())[:_SHOWN]:
            click.echo(f"    {problem_id}: {reason}")
        _tell_rest(report["suspicious_problems"])


def _tell_source(report: dict[str, Any]) -> None:
    """The table of what the source said against what running showed, by verdict."""
    names = [name for name, counts in report["source_and_run"].items() if any(counts.values())]
    if not names:
        return
    header = "".join(f"{name.replace('_', ' '):>18}" for name in names)
    click.echo(f"\n  {'run says':<12}{header}")
    for says in ("correct", "incorrect"):
        click.echo(f"  {says:<12}" + "".join(f"{report['source_and_run'][name][says]:>18}" for name in names))
    for verdict, counts in report["verdicts"].items():
        if verdict != "passed":
            click.echo(f"    {verdict:<10}" + "".join(f"{counts[name]:>18}" for name in names))
    click.echo(f"\n  disagreements with the source: {report['disagreements']}")
    for found in report["disagreements_first"][:_SHOWN]:
        said = "correct" if found["source_label"] else "incorrect"
        told = f"{found['verdict']}{': ' if found['evidence'] else ''}{found['evidence']}"
        click.echo(f"    line {found['line']} ({found['problem_id']}): said to be {said}; {told}"[:200])
    _tell_rest(report["disagreements"])


def _tell_rest(total: int) -> None:
    if total > _SHOWN:
        click.echo(f"    and {total - _SHOWN} more; the report names the first 100")
