"""``wmtp-ds plan CONFIG``: the memory that a config takes, before anything is started."""

import json
from pathlib import Path

import click

from wmtp_ds.cli.finite import FiniteRange
from wmtp_ds.config import load_config
from wmtp_ds.launch import MAX_RANKS
from wmtp_ds.plan import machine, report
from wmtp_ds.plan.plan import GIB, Plan
from wmtp_ds.plan.reading import Sizes, kernels_on, read_setup
from wmtp_ds.plan.shape import NAMED

_SIZE = click.Choice(list(NAMED))
# What a production config is written for, where there is no GPU to ask.
_GPUS, _GPU_GIB = 4, 80.0


@click.command(epilog="Example: wmtp-ds plan stage_configs/rho1.toml --num_gpus 4 --gpu-memory 80")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--num_gpus", "--num-gpus", type=click.IntRange(1, MAX_RANKS), help="Default: this machine's, or 4.")
@click.option("--gpu-memory", type=FiniteRange(min=0, min_open=True), help="GiB of each. Default: its own, or 80.")
@click.option("--size", type=_SIZE, help="Of the policy. Default: as its folder or its name says.")
@click.option("--reference-size", type=_SIZE, help="Of the reference model, likewise.")
@click.option("--reward-size", type=_SIZE, help="Of the reward model, likewise.")
@click.option("--override", "overrides", multiple=True, metavar="KEY=VALUE", help="Set one key; may be repeated.")
@click.option("--check", is_flag=True, help="Exit with 1 if it does not fit.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON, in bytes.")
def plan(
    config: Path,
    num_gpus: int | None,
    gpu_memory: float | None,
    size: str | None,
    reference_size: str | None,
    reward_size: str | None,
    overrides: tuple[str, ...],
    check: bool,
    as_json: bool,
) -> int:
    """Work out the memory that the config CONFIG takes on each GPU, and whether it fits.

    Parameters, gradients, optimizer states, activations, the loss's workspace and frozen models, at each moment of a
    step, under ZeRO-3 with and without offload. Neither models nor data need be there. Exits with 0 whether it fits or
    not, unless --check is given. docs/memory.md has the formulae, and what they were checked against.
    """
    resolved = load_config(config, overrides, checks=False)
    device, capacity, ranks, assumed = _machine(resolved.config.runtime.device, num_gpus, gpu_memory)
    sizes = Sizes(size, reference_size, reward_size)
    reading = read_setup(resolved, ranks=ranks, device=device, sizes=sizes, kernels=kernels_on(device))
    found = Plan(reading.setup, capacity)
    basis = report.Basis(str(config), resolved.config.experiment.stage, reading.notes, assumed)
    if as_json:
        click.echo(json.dumps(report.as_dict(found, basis), indent=1))
    else:
        click.echo("\n".join(report.lines(found, basis)))
    return 1 if check and not found.fits else 0


def _machine(device: str, num_gpus: int | None, gpu_memory: float | None) -> tuple[str, int, int, list[str]]:
    """Device, bytes and number of ranks; and what was assumed of them."""
    typed = None if gpu_memory is None else round(gpu_memory * GIB)
    if device == "cpu":
        ranks = num_gpus or 1
        return "cpu", typed or machine.memory() // ranks, ranks, []
    there, assumed = machine.gpus(), []
    if num_gpus is None and not there:
        assumed.append(f"{_GPUS} GPUs, since there is none here (--num_gpus sets another number)")
    if typed is None and not there:
        assumed.append(f"{_GPU_GIB:.0f} GiB on each GPU (--gpu-memory)")
    capacity = typed or min(there, default=round(_GPU_GIB * GIB))
    return "cuda", capacity, num_gpus or len(there) or _GPUS, assumed
