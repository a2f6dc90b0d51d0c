"""``wmtp-ds data score``: what a reference model says of every token of the data, computed once."""

import json
import time
from pathlib import Path
from typing import Any

import click


@click.command(
    epilog="Example: wmtp-ds data score --reference storage/models/micro-reference "
    "--input storage/data/sample/train.jsonl --output storage/scores/sample --max-length 256 --compute-dtype float32"
)
@click.option(
    "--reference", required=True, metavar="MODEL", type=click.Path(path_type=Path), help="The model's folder."
)
@click.option(
    "--input",
    "inputs",
    required=True,
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A data file; repeatable.",
)
@click.option("--output", required=True, metavar="DIR", type=click.Path(path_type=Path), help="A folder of their own.")
@click.option(
    "--tokenizer",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="The policy's, if it lies elsewhere.  [default: the reference's]",
)
@click.option(
    "--template", type=click.Choice(["alpaca", "plain"]), default="alpaca", show_default=True, help="dataset.template."
)
@click.option(
    "--max-length", type=click.IntRange(min=2), default=2048, show_default=True, help="dataset.max_length of the run."
)
@click.option(
    "--compute-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="bfloat16",
    show_default=True,
    help="What the reference computes in: models.reference.dtype of the run.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    default="float32",
    show_default=True,
    help="What the scores are kept in; float16 takes half the space.",
)
@click.option("--correct-only", is_flag=True, help="Score correct rows alone, for runs that draw no others.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Rows of a pass.")
@click.option(
    "--shard-tokens",
    type=click.IntRange(min=1),
    default=2**20,
    show_default=True,
    help="Scores of a file: what a kill may lose, of each process.",
)
@click.option("--processes", type=click.IntRange(min=1), help="Copies of the model.  [default: one a GPU; one on CPUs]")
@click.option(
    "--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True, help="To compute on."
)
@click.option("--cache-dir", help="Folder where tokens are kept, '' for none.  [default: storage/cache/tokens]")
@click.option("--force", is_flag=True, help="Replace scores of something else.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def score(
    reference: Path,
    inputs: tuple[Path, ...],
    output: Path,
    tokenizer: Path | None,
    batch_size: int,
    processes: int | None,
    device: str,
    cache_dir: str | None,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Compute a reference model's loss of every token of the data, once, for rho1 with models.reference.scores = DIR.

    No run with it loads the reference. Interrupted, the same command goes on, also with another --batch-size or
    --processes.
    """
    from wmtp_ds.cli.progress import progress
    from wmtp_ds.config.schema import DatasetConfig
    from wmtp_ds.launch import resolve_device
    from wmtp_ds.scores.manifest import Settings
    from wmtp_ds.scores.scoring import Scoring
    from wmtp_ds.scores.worker import Work

    found_device = resolve_device(device)
    if settings["compute_dtype"] == "float16" and found_device == "cpu":
        raise click.UsageError("--compute-dtype float16 does not work on a CPU: take bfloat16 or float32.")
    if processes is None:
        processes = 1
        if found_device == "cuda":
            import torch

            processes = torch.cuda.device_count()
    folder = DatasetConfig.model_fields["cache_dir"].default if cache_dir is None else cache_dir
    work = Work(
        inputs,
        output,
        reference,
        tokenizer or reference,
        Settings(**settings),
        batch_size=batch_size,
        device=found_device,
        cache_dir=Path(folder).expanduser() if folder else None,
    )
    began = time.monotonic()
    with progress("scoring", "rows") as (start, advance):
        manifest, reused = Scoring(work, processes).run(force=force, on_start=start, on_done=advance)
    summary = _summary(output, manifest) | {"reused": reused, "seconds": round(time.monotonic() - began, 1)}
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        _tell(summary)


def _summary(output: Path, manifest: Any) -> dict[str, Any]:
    inputs = [
        {
            "path": scored.path,
            "rows": scored.rows,
            "scored": scored.scored,
            "tokens": scored.tokens,
            "bytes": sum(file.size for file in scored.files()),
            "mean_loss": sum(shard.loss for shard in scored.shards) / scored.tokens,
        }
        for scored in manifest.inputs
    ]
    settings, fingerprint = manifest.settings, manifest.reference.fingerprint
    return {"output": str(output), "reference_fingerprint": fingerprint, "dtype": settings.dtype, "inputs": inputs}


def _tell(summary: dict[str, Any]) -> None:
    for scored in summary["inputs"]:
        click.echo(
            f"{scored['path']}: {scored['scored']:,} of {scored['rows']:,} rows, {scored['tokens']:,} tokens, "
            f"mean loss {scored['mean_loss']:.4f}, {scored['bytes'] / 2**20:.1f} MiB"
        )
    took = "all was there already" if summary["reused"] else f"{summary['seconds']:.0f} s"
    click.echo(f'{summary["output"]}: {took}. For rho1, under [models.reference]: scores = "{summary["output"]}"')
