"""``wmtp-ds model``: make models."""

import json
from pathlib import Path

import click


@click.group(epilog="Example: wmtp-ds model micro")
def model() -> None:
    """Make models."""


@model.command(epilog="Example: wmtp-ds model micro")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=Path("storage/data/sample/train.jsonl"),
    show_default=True,
    help="JSONL file that the tokenizer learns from.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("storage/models"),
    show_default=True,
    help="Folder for micro-policy/ and micro-reference/.",
)
@click.option("--vocab-size", default=768, show_default=True, type=click.IntRange(min=259), help="Tokens.")
@click.option("--n-future-tokens", default=4, show_default=True, type=click.IntRange(min=1), help="Heads.")
@click.option("--hidden-size", default=64, show_default=True, type=click.IntRange(min=64), help="A multiple of 32.")
@click.option("--trunk-layers", default=2, show_default=True, type=click.IntRange(min=1), help="Blocks before head 1.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Of the random weights.")
@click.option("--json", "as_json", is_flag=True, help="Say what was made as JSON.")
def micro(
    data: Path,
    output: Path,
    vocab_size: int,
    n_future_tokens: int,
    hidden_size: int,
    trunk_layers: int,
    seed: int,
    as_json: bool,
) -> None:
    """Make a small random policy, a smaller reference and their tokenizer, to try everything on a CPU."""
    from wmtp_ds.errors import UserError

    if hidden_size % 32:
        raise click.UsageError(f"--hidden-size {hidden_size}: must be a multiple of 32")
    if not data.is_file():
        raise UserError(f"--data {data}: there is no such file. Make it with: wmtp-ds data sample")
    from wmtp_ds.models.micro import make_micro_models

    policy, reference = output / "micro-policy", output / "micro-reference"
    try:
        sizes = make_micro_models(
            data=data,
            policy=policy,
            reference=reference,
            vocab_size=vocab_size,
            n_future_tokens=n_future_tokens,
            hidden_size=hidden_size,
            trunk_layers=trunk_layers,
            seed=seed,
        )
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error}") from None
    if as_json:
        click.echo(json.dumps({str(folder): size for folder, size in zip((policy, reference), sizes, strict=True)}))
        return
    for folder, size in zip((policy, reference), sizes, strict=True):
        click.echo(f"{folder}: {size:,} parameters")
