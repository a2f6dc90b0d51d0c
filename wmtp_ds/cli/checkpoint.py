"""``wmtp-ds checkpoint``: what lies in a run's folder, whether it is sound, and making room."""

import dataclasses
import json
from pathlib import Path

import click

from wmtp_ds.checkpoint_listing import Listing, PruneReport, list_runs, prune_run, verify_path

_PATH = click.Path(path_type=Path, exists=True, file_okay=False)


@click.group(epilog="Example: wmtp-ds checkpoint list checkpoints")
def checkpoint() -> None:
    """List, verify, export and prune the checkpoints of runs."""


@checkpoint.command("list", epilog="Example: wmtp-ds checkpoint list checkpoints/critic")
@click.argument("folder", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def list_(folder: Path, as_json: bool) -> None:
    """List the checkpoints in FOLDER: a run's folder, or one with several runs in it.

    A checkpoint is complete, damaged (a file is missing, or of another size; `verify` reads every byte) or partial
    (its saving was cut short).
    """
    runs = list_runs(folder)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(run) for run in runs], default=str))
        return
    for run in runs:
        click.echo(f"{run.folder}:")
        for item in run.checkpoints:
            click.echo(_line(item))
        for path in run.leftovers:
            click.echo(f"  {path.relative_to(run.folder)}: left by a crash; `wmtp-ds checkpoint prune` removes it")
    if not any(run.checkpoints for run in runs):
        click.echo(f"no checkpoint in {folder}", err=True)


def _line(item: Listing) -> str:
    ranks = "" if item.world_size is None else f"{item.world_size} ranks"
    latest = "  latest" if item.latest else ""
    problem = f": {item.problem}" if item.problem else ""
    size = f"{item.size / 2**20:,.1f} MiB"
    return f"  {item.name:<15} {item.saved:<25} {size:>14} {ranks:>9}  {item.state}{problem}{latest}"


@checkpoint.command(epilog="Example: wmtp-ds checkpoint verify checkpoints/critic/step_00000500")
@click.argument("path", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def verify(path: Path, as_json: bool) -> int:
    """Compare every byte of PATH with its manifest: one checkpoint, or all of a run's.

    Exit code 1 if any is damaged or partial.
    """
    found = verify_path(path, lambda folder: click.echo(f"reading {folder}", err=True))
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(item) for item in found], default=str))
    else:
        for item in found:
            click.echo(f"{item.folder}: {'sound' if item.problem is None else f'{item.state}: {item.problem}'}")
    return int(any(item.problem is not None for item in found))


@checkpoint.command(epilog="Example: wmtp-ds checkpoint export checkpoints/rho1/step_00000500 exported")
@click.argument("source", metavar="CHECKPOINT", type=_PATH)
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace an export at DEST.")
def export(source: Path, dest: Path, force: bool) -> None:
    """Write CHECKPOINT, which is to resume from, as a model at DEST: what the run would have exported at that step."""
    from wmtp_ds.checkpoint_export import export_checkpoint

    click.echo(str(export_checkpoint(source, dest, force=force)))


@checkpoint.command(epilog="Example: wmtp-ds checkpoint prune checkpoints/critic --keep 1 --dry-run")
@click.argument("run", type=_PATH)
@click.option("--keep", type=click.IntRange(min=1), required=True, help="Sound checkpoints to keep, the newest.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def prune(run: Path, keep: int, dry_run: bool, as_json: bool) -> None:
    """Remove old and damaged checkpoints of RUN, and what crashes have left.

    Every byte is read first: only sound checkpoints count as kept, and while none is sound, none is removed.
    """
    report = prune_run(run, keep=keep, dry_run=dry_run, say=lambda folder: click.echo(f"reading {folder}", err=True))
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report), default=str))
        return
    _say(report, dry_run)


def _say(report: PruneReport, dry_run: bool) -> None:
    verb = "would remove" if dry_run else "removed"
    for item in report.removed:
        click.echo(f"{verb} {item.folder}{'' if item.problem is None else f' ({item.state}: {item.problem})'}")
    for path in report.leftovers:
        click.echo(f"{verb} {path} (left by a crash)")
    for item in report.kept:
        click.echo(f"kept {item.folder}{'' if item.problem is None else f' ({item.state}: {item.problem})'}")
    click.echo(f"{report.freed / 2**20:,.1f} MiB {'would be' if dry_run else 'are'} free again", err=True)
    if report.kept and all(item.problem is not None for item in report.kept):
        click.echo("warning: no checkpoint is sound, so none is removed", err=True)
