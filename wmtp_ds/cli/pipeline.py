"""``wmtp-ds pipeline``: several stages, one command."""

import json
import math
from pathlib import Path
from typing import Any

import click

from wmtp_ds.errors import UserError


@click.command(epilog="Example: wmtp-ds pipeline stage_configs/critic.toml stage_configs/verifiable.toml --num_gpus 4")
@click.argument("configs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--num_gpus", "--num-gpus", type=click.IntRange(min=1), help="Ranks to train with.")
@click.option("--device", help="auto, cuda or cpu; overrides runtime.device.")
@click.option("--override", multiple=True, metavar="KEY=VALUE", help="For every stage; may be repeated.")
@click.option("--name", default="pipeline", show_default=True, help="Name of the parent run.")
@click.option("--reuse", is_flag=True, help="Do not train again what is complete and has the same config.")
@click.option(
    "--figure", type=click.Path(path_type=Path, dir_okay=False), help="Write the loss curves of all stages to this PNG."
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def pipeline(
    configs: tuple[Path, ...],
    num_gpus: int | None,
    device: str | None,
    override: tuple[str, ...],
    name: str,
    reuse: bool,
    figure: Path | None,
    as_json: bool,
) -> int:
    """Train the stages of CONFIGS in order; a critic among them is handed to the stage that needs one."""
    from wmtp_ds.launch import Request
    from wmtp_ds.pipeline import run_pipeline
    from wmtp_ds.report import figure_of, print_table, results

    if figure is not None:
        try:
            figure.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--figure {figure}: its folder cannot be made: {error}") from None
    requests = [
        Request(stage=stage, config=path, num_gpus=num_gpus, device=device, override=override)
        for path, stage in zip(configs, _stages(configs, override), strict=True)
    ]
    code, folders = run_pipeline(requests, name=name, reuse=reuse, say=lambda text: click.echo(text, err=True))
    if figure is not None and folders:
        figure_of(folders, figure)
    if as_json:
        click.echo(json.dumps([_strict(result) for result in results(folders)], indent=2))
    else:
        print_table(folders)
    return code


def _stages(configs: tuple[Path, ...], override: tuple[str, ...]) -> list[str]:
    """The stage of each config; all that is wrong with any of them in one message."""
    from wmtp_ds.config import ConfigError, load_config

    stages, problems = [], []
    for path in configs:
        try:
            stages.append(load_config(path, override, checks=False).config.experiment.stage)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return stages


def _strict(result: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinities, which JSON has not, as null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in result.items()
    }
