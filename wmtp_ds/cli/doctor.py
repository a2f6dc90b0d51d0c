"""``wmtp-ds doctor``: what this machine lacks to train."""

import dataclasses
import json
from pathlib import Path

import click

_MARKS = {"ok": "ok     ", "warning": "warning", "failure": "FAILURE"}


@click.command(epilog="Example: wmtp-ds doctor stage_configs/local/rho1.toml")
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option("--override", "overrides", multiple=True, metavar="KEY=VALUE", help="Set one key; may be repeated.")
@click.option("--clean", is_flag=True, help="Remove the shared memory that killed processes have left.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(config: Path | None, overrides: tuple[str, ...], clean: bool, as_json: bool) -> int:
    """Look at what training needs: versions, GPUs, compilers, kernels, disk, ports, MLflow, the sandbox.

    With CONFIG, at what that run needs: its device, its folder, its tracking server. Each line is ok, a warning
    (something will not work that not everybody needs) or a failure (no run starts), with the mend. Exits with 1 if
    there is a failure.
    """
    from wmtp_ds.config import load_config
    from wmtp_ds.doctor.examination import Needs, examination

    if overrides and config is None:
        raise click.UsageError("--override needs a CONFIG to lay its value over")
    needs = Needs() if config is None else Needs.of(load_config(config, overrides, checks=False))
    findings = []
    for finding in examination(needs, clean=clean):
        findings.append(finding)
        if not as_json:
            click.echo(f"{_MARKS[finding.status]}  {finding.name}: {finding.text}")
            if finding.mend:
                click.echo(f"         -> {finding.mend}")
    failures = sum(finding.status == "failure" for finding in findings)
    warnings = sum(finding.status == "warning" for finding in findings)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        click.echo(f"{failures} failures, {warnings} warnings")
    return 1 if failures else 0
