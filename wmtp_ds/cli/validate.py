"""``wmtp-ds validate FILE``: every problem of a config, in one run."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from wmtp_ds.config import ConfigError, Problem, Resolved, load_config
from wmtp_ds.masking import printable


@click.command(epilog="Example: wmtp-ds validate stage_configs/critic.toml --override training.batch_size=4")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--override", "overrides", multiple=True, metavar="KEY=VALUE", help="Set one key; may be repeated.")
@click.option("--online", is_flag=True, help="Also ask MLflow whether the critic's artifact exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def validate(file: Path, overrides: tuple[str, ...], online: bool, as_json: bool) -> int:
    """Check the config FILE: every problem, in one run.

    Exits with 0 if a run could start with it, with 2 otherwise. Layers, later wins: defaults, the file that
    `extends` names, FILE, the environment (WMTP_TRAINING__LEARNING_RATE), --override.
    """
    try:
        resolved = load_config(file, overrides, online=online)
    except ConfigError as error:
        if not as_json:
            raise
        click.echo(json.dumps({"ok": False, "file": str(file), "problems": _as_dicts(error.problems)}, indent=2))
        return error.exit_code
    summary = _summary(resolved)
    if as_json:
        result = {"ok": True, "file": str(file), **summary, "warnings": _as_dicts(resolved.warnings)}
        click.echo(json.dumps(result, indent=2))
        return 0
    for warning in resolved.warnings:
        click.echo(printable(f"warning: {warning}"), err=True)
    click.echo(printable(f"{file} is valid"))
    for name, value in summary.items():
        click.echo(printable(f"  {name:<11}{value}"))
    return 0


def _as_dicts(problems: list[Problem]) -> list[dict[str, Any]]:
    return [asdict(problem) for problem in problems]


def _summary(resolved: Resolved) -> dict[str, str]:
    config = resolved.config
    return {
        "experiment": config.experiment.name,
        "stage": config.experiment.stage,
        "model": str(config.models.policy.path),
        "dataset": config.dataset.name,
    }
