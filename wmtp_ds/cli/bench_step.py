"""``wmtp-ds bench step``: a whole training step, measured."""

import json
from pathlib import Path
from typing import Any

import click

from wmtp_ds.cli.finite import FiniteRange
from wmtp_ds.launch import MAX_RANKS

SIZES = ("micro", "160m", "1b", "7b")
# Device -> tokens of a sequence.
_LENGTHS = {"cpu": 512, "cuda": 2048}


def _overrides(given: dict[str, Any]) -> list[str]:
    """``key=value`` of the config for the options that name a key of it, and were given."""
    return [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]


@click.command(epilog="Example: wmtp-ds bench step --stage verifiable --size micro --device cpu --compare-materialised")
@click.option("--stage", required=True, help="baseline, critic, verifiable or rho1 (or one of your own).")
@click.option("--size", type=click.Choice(SIZES), help="Of the model. Default: 1b on a GPU, micro on a CPU.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True, help="Where.")
@click.option("--num_gpus", "--num-gpus", type=click.IntRange(1, MAX_RANKS), default=1, help="Ranks; default 1.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Default: float32 on a CPU.")
@click.option("--sequence-length", type=click.IntRange(min=64), help="Tokens. Default: 2048, on a CPU 512.")
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True, help="Of a micro-batch.")
@click.option("--accumulation", type=click.IntRange(min=1), default=1, show_default=True, help="Micro-batches a step.")
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Measured steps of each pass.")
@click.option("--warmup", type=click.IntRange(min=2), default=4, show_default=True, help="Steps before them.")
@click.option("--attention", default="sdpa", show_default=True, help="As transformers names it: sdpa, eager, …")
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=None, help="Default: for 7b alone.")
@click.option("--k-percent", type=float, help="Share of targets that rho1 selects. Default: the stage's config.")
@click.option("--peak-tflops", type=FiniteRange(min=0, min_open=True), help="Of one rank's device, for the MFU.")
@click.option("--compare-materialised", is_flag=True, help="Run it with all logits in memory, too, and compare.")
@click.option(
    "--compare-scores", is_flag=True, help="Also without the reference, its losses at hand (models.reference.scores)."
)
@click.option("--override", multiple=True, metavar="KEY=VALUE", help="Of the stage's config. May be repeated.")
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Write JSON and CSV there.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def step(output: Path | None, as_json: bool, **typed: Any) -> int:
    """Measure a stage's training step: tokens/s, MFU, peak memory, and where the time goes.

    It runs the training loop's own step under ZeRO-3, through the launcher, on random weights and made-up data; the
    config is the stage's of stage_configs/. Nothing needs to be there.
    """
    import click

    from wmtp_ds.bench import report

    if output is not None:
        report.make_folder(output)
    figures = _measure(**typed)
    if output is not None:
        report.write(figures, output)
    click.echo(json.dumps(figures, indent=1) if as_json else report.table(figures))
    return 0


def _measure(
    stage: str,
    size: str | None,
    device: str,
    num_gpus: int,
    dtype: str | None,
    sequence_length: int | None,
    batch_size: int,
    accumulation: int,
    steps: int,
    warmup: int,
    attention: str,
    gradient_checkpointing: bool | None,
    k_percent: float | None,
    peak_tflops: float | None,
    compare_materialised: bool,
    compare_scores: bool,
    override: tuple[str, ...],
) -> dict[str, Any]:
    from wmtp_ds.bench.run import run_step
    from wmtp_ds.bench.settings import StepSettings
    from wmtp_ds.config.training import stage_names, training_class
    from wmtp_ds.launch import resolve_device

    if compare_scores and stage in stage_names() and not training_class(stage).needs_reference:
        raise click.UsageError(f"--compare-scores: stage {stage} has no reference model that scores could stand for.")
    device = resolve_device(device)
    size = size or ("1b" if device == "cuda" else "micro")
    settings = StepSettings(
        stage=stage,
        size=size,
        device=device,
        ranks=num_gpus,
        sequence_length=sequence_length or _LENGTHS[device],
        steps=steps,
        warmup=warmup,
        attention=attention,
        peak_tflops=peak_tflops,
        compare_scores=compare_scores,
    )
    chosen = {
        "models.policy.dtype": dtype or ("float32" if device == "cpu" else None),
        "training.batch_size": batch_size,
        "training.gradient_accumulation_steps": accumulation,
        "training.gradient_checkpointing": size == "7b" if gradient_checkpointing is None else gradient_checkpointing,
        "training.k_percent": k_percent,
    }
    return run_step(settings, _overrides(chosen), override, compare_materialised=compare_materialised)
