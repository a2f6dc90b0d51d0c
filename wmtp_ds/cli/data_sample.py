"""``wmtp-ds data sample``: generated problems with labels earned by running."""

import json
import time
from pathlib import Path

import click

from wmtp_ds.cli.data_summary import completed, tell_files, tell_runs
from wmtp_ds.cli.progress import progress, warn_of_weak_sandbox


@click.command(epilog="Example: wmtp-ds data sample --problems 440 --seed 0")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("storage/data/sample"),
    show_default=True,
    help="Folder for train.jsonl and validation.jsonl.",
)
@click.option("--problems", type=int, default=220, show_default=True, help="How many problems, at least 22.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def sample(output: Path, problems: int, seed: int, as_json: bool) -> None:
    """Generate problems that can be verified, with correct and incorrect solutions.

    Every label is earned by running the solution against its problem's tests in a sandbox. What is there already
    with the same options is left as it is.
    """
    from wmtp_ds.data.sample import make_sample

    began = time.monotonic()
    with progress("running solutions") as (start, advance):

        def on_start(total: int) -> None:
            warn_of_weak_sandbox()
            start(total)

        summary = make_sample(output, problems=problems, seed=seed, on_start=on_start, on_done=advance)
    if as_json:
        click.echo(json.dumps(completed(summary, output, began, ran_code=True), indent=2))
        return
    tell_files(summary, output, began, ran_code=True)
    tell_runs(summary)
