"""``wmtp-ds compare``: which run is better, by how much, and what is different about them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import click

Group = tuple[str, list[str]]


def _groups(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> list[Group]:
    found = []
    for value in values:
        name, equals, members = value.partition("=")
        runs = members.split(",")
        if not name or not equals or not all(runs):
            raise click.BadParameter(f"{value}: write NAME=RUN,RUN,… without spaces")
        found.append((name, runs))
    return found


@click.command(epilog="Example: wmtp-ds compare checkpoints/local-baseline checkpoints/local-verifiable")
@click.argument("runs", metavar="RUN RUN …", nargs=-1)
@click.option(
    "--group",
    "groups",
    multiple=True,
    callback=_groups,
    metavar="NAME=RUN,RUN,…",
    help="Runs that differ by their seed alone, as one arm. May be repeated.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="A folder for compare.md, compare.json and curves.png.  [default: comparisons/RUN-vs-RUN]",
)
@click.option(
    "--evaluations",
    type=click.Path(path_type=Path),
    default=Path("evaluations"),
    show_default=True,
    help="Below this folder, and the runs', evaluations of the runs are looked for.",
)
@click.option("--tracking-uri", help="MLflow, for ids of runs.  [default: as configured, or sqlite:///mlflow.db]")
@click.option("--json", "as_json", is_flag=True, help="Print what compare.json gets.")
def compare(
    runs: tuple[str, ...],
    groups: list[Group],
    output: Path | None,
    evaluations: Path,
    tracking_uri: str | None,
    as_json: bool,
) -> None:
    """Compare runs: config, metrics, learning curves, and pass@k with intervals of the differences.

    RUN is a run's folder, an export or a checkpoint in it, the folder of an evaluation, or the id of an MLflow run; the
    first one is what the others are held against. Evaluations are those that wmtp-ds evaluate has made of the runs.
    """
    if len(runs) + len(groups) < 2:
        raise click.UsageError("give at least two runs (or groups of runs) to compare")

    from wmtp_ds.compare.comparison import compare as compare_arms
    from wmtp_ds.compare.inputs import Reader, configured_uri, make_arms
    from wmtp_ds.compare.report import check_folder, to_markdown, write_report
    from wmtp_ds.errors import UserError
    from wmtp_ds.masking import printable

    uri = configured_uri() if tracking_uri is None else tracking_uri
    arms = make_arms(runs, groups, Reader(uri, evaluations))
    told = compare_arms(arms)
    if output is None:
        names = [arm.name for arm in arms][:3]
        output = Path("comparisons") / re.sub(r"[^\w.-]+", "-", "-vs-".join(names))[:120]
    check_folder(output)
    picture = write_report(told, output)
    if as_json:
        for text in told["warnings"]:
            click.echo(printable(f"warning: {text}"), err=True)
        click.echo(json.dumps(told))
    else:
        click.echo(printable(to_markdown(told)))
        click.echo(f"{output}: compare.md, compare.json{', curves.png' if picture else ''}")
    if told["errors"]:
        raise UserError("\n".join(told["errors"]))
