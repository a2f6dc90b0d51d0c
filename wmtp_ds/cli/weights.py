"""``wmtp-ds weights``: what a trained stage looks at, token by token."""

import json
from pathlib import Path
from typing import Any

import click


@click.command(
    epilog="Example: wmtp-ds weights checkpoints/local-verifiable --data storage/data/sample/validation.jsonl "
    "--output weights.html"
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="FILE", type=click.Path(path_type=Path), help="A data file.")
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path), help="A page (.html) or a picture (.png).")
@click.option("--problems", type=click.IntRange(min=1), default=8, show_default=True, help="How many problems.")
@click.option("--solutions", type=click.IntRange(min=1), default=4, show_default=True, help="Of each, at most.")
@click.option(
    "--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True, help="To compute on."
)
@click.option("--force", is_flag=True, help="Replace the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def weights(
    checkpoint: Path,
    data: Path,
    output: Path | None,
    problems: int,
    solutions: int,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    """Show what CHECKPOINT, an export of a run or the run's folder, sees in the tokens of some solutions.

    Right and wrong solutions of the same problems, each token shaded by its weight (a critic's by its value); the
    distribution of the weights, the value along a solution, and weights by kind of token. A page needs no network.
    """
    if output is not None and output.suffix not in (".html", ".png"):
        raise click.UsageError(f"--output {output}: name it .html (a page) or .png (a picture)")
    import torch

    from wmtp_ds.cli.progress import progress
    from wmtp_ds.data.output_file import check_output, whole_file
    from wmtp_ds.errors import UserError
    from wmtp_ds.launch import resolve_device
    from wmtp_ds.look.columns import Looker, choose_rows
    from wmtp_ds.look.page import render
    from wmtp_ds.look.picture import draw
    from wmtp_ds.look.statistics import check, summary

    if output is not None:
        check_output(output, [data], force=force)
    looker = Looker.load(checkpoint, torch.device(resolve_device(device)))
    rows = choose_rows(data, problems, solutions)
    with progress("reading solutions", "solutions") as (start, advance):
        start(len(rows))
        found = looker.look(rows, advance)
    if not found:
        raise UserError(f"--data {data}: every solution is longer than dataset.max_length of the run")
    config = looker.resolved.config
    check(found, config.experiment.stage)
    figures = summary(found)
    title = f"{config.experiment.stage}: {config.experiment.name}"
    if output is not None:
        facts = {"checkpoint": str(checkpoint), "data": str(data), "solutions": str(len(found))}
        with whole_file(output) as partial:
            if output.suffix == ".html":
                partial.write_text(render(title, facts, found, figures), encoding="utf-8")
            else:
                draw(title, found, figures, partial)
    if as_json:
        click.echo(json.dumps(figures))
        return
    _show(title, figures)
    if output is not None:
        click.echo(str(output))


def _show(title: str, figures: dict[str, Any]) -> None:
    click.echo(
        f"{title}: {figures['solutions']} solutions of {figures['problems']} problems, {figures['tokens']} tokens"
    )
    for name, entry in figures["columns"].items():
        told = "  ".join(f"{what} {entry[what]:.4f}" for what in ("mean", "std", "min", "max"))
        click.echo(f"  {name:<12} {told}")
    click.echo(f"  {figures['shaded_by']} by kind of token:     tokens    correct  incorrect")
    for kind, entry in figures["by_kind"].items():
        shown = ["" if entry[name] is None else f"{entry[name]:.4f}" for name in ("correct", "incorrect")]
        click.echo(f"    {kind:<24} {entry['tokens']:>6} {shown[0]:>10} {shown[1]:>10}")
