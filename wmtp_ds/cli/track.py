"""``wmtp-ds track``: the metrics of runs, and bringing MLflow up to date with them."""

import dataclasses
import json
from pathlib import Path

import click


@click.group(epilog="Example: wmtp-ds track sync checkpoints/critic")
def track() -> None:
    """Work with the metrics of runs."""


@track.command(epilog="Example: wmtp-ds track sync checkpoints/critic --tracking-uri http://localhost:5000")
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--tracking-uri", help="Where to send it. Default: where the run was tracked.")
@click.option("--new-run", is_flag=True, help="Send everything as a new run: the old one is lost.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def sync(run_dir: Path, tracking_uri: str | None, new_run: bool, as_json: bool) -> None:
    """Send to MLflow what RUN_DIR holds and MLflow lacks.

    RUN_DIR is the directory that training wrote metrics.jsonl into. Running it again sends nothing twice.
    """
    from wmtp_ds.tracking_sync import sync_run

    report = sync_run(run_dir, tracking_uri=tracking_uri, new_run=new_run)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
        return
    click.echo(
        f"run {report.run_id} ({report.status.lower()}): sent {report.metric_points} metric points and "
        f"{report.artifact_files} artifact files; MLflow has all {report.metric_lines} lines of metrics.",
        err=True,
    )
    for path in report.missing_artifacts:
        click.echo(f"warning: the artifact {path} is gone and was not sent", err=True)
    for item in report.rejected:
        click.echo(f"warning: MLflow refused {item}", err=True)
