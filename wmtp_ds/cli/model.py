"""``wmtp-ds model``: make models, bring them in and out, look at them."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import click


@click.group(epilog="Example: wmtp-ds model info storage/models/micro-policy")
def model() -> None:
    """Make, import, export and inspect models."""


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


_DTYPES = ("float32", "bfloat16", "float16")
_FORCE = click.option("--force", is_flag=True, help="Replace a model at DEST.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Say what was done as JSON.")
_TOKENIZER = click.option(
    "--tokenizer",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Folder, tokenizer.json or tokenizer.model to take the tokenizer from.  [default: SOURCE]",
)


class Size(click.ParamType):
    """A number of bytes, with a unit or without: 500MB, 4GB, 2GiB."""

    name = "size"
    _UNITS: ClassVar[dict[str, int]] = {
        "": 1,
        **{f"{unit}B": 1000**power for power, unit in enumerate(("", "K", "M", "G", "T"))},
        **{f"{unit}IB": 1024**power for power, unit in enumerate(("", "K", "M", "G", "T")) if power},
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Z]*)", str(value).strip().upper())
        if not match or match[2] not in self._UNITS or not (size := int(float(match[1]) * self._UNITS[match[2]])):
            self.fail(f"{value!r} is no size like 500MB, 4GB or 2GiB", param, ctx)
        return size


_SHARDS = click.option(
    "--max-shard-size", "shard_bytes", type=Size(), default="4GB", show_default=True, help="Of a file of weights."
)


@model.command("import", epilog="Example: wmtp-ds model import llama-7b-mtp storage/models/meta-llama-mtp")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", metavar="DEST", type=click.Path(path_type=Path))
@click.option(
    "--heads",
    type=click.Choice(["copy", "random"]),
    default="copy",
    show_default=True,
    help="Extra heads of a next-token model: copies of its last block, or new ones.",
)
@click.option(
    "--n-future",
    type=click.IntRange(min=1),
    help="Heads, head 1 included.  [default: those of SOURCE; 4 for a next-token model]",
)
@click.option("--gguf-file", metavar="NAME", help="A GGUF file in SOURCE.")
@_TOKENIZER
@click.option("--dtype", type=click.Choice(_DTYPES), help="Of the weights.  [default: as they are]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of random heads.")
@_SHARDS
@_FORCE
@_JSON
def import_(source: Path, destination: Path, dtype: str | None, as_json: bool, **options: Any) -> None:
    """Make a policy of a model in Meta's or Hugging Face's layout, or in GGUF.

    SOURCE is a folder, whose layout is told by what is in it, or a .gguf file. The policy goes to DEST, with tokenizer
    and trunk fingerprint. After an interruption the same command goes on where it was.
    """
    with _conversion() as progress:
        import torch

        from wmtp_ds.models.convert.importing import import_model

        wanted = getattr(torch, dtype) if dtype else None
        done = import_model(source, destination, dtype=wanted, progress=progress, **options)
    _tell(done, source, as_json)


@model.command(epilog="Example: wmtp-ds model export checkpoints/rho1/checkpoint_best exported --format hf")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", metavar="DEST", type=click.Path(path_type=Path))
@click.option(
    "--format",
    type=click.Choice(["hf", "mtp", "meta"]),
    default="hf",
    show_default=True,
    help="hf: the next-token model as a plain LlamaForCausalLM; mtp: all heads; meta: all heads, Meta's layout.",
)
@_TOKENIZER
@_SHARDS
@_FORCE
@_JSON
def export(source: Path, destination: Path, as_json: bool, **options: Any) -> None:
    """Write a model for other tools.

    SOURCE is a folder of any layout, such as a run's checkpoint_best. What is written is read back and compared.
    """
    with _conversion() as progress:
        from wmtp_ds.models.convert.exporting import export_model

        done = export_model(source, destination, progress=progress, **options)
    _tell(done, source, as_json)


@model.command(epilog="Example: wmtp-ds model info storage/models/micro-policy --json")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def info(path: Path, as_json: bool) -> None:
    """Show a model's architecture, heads, sizes, dtype and tokenizer, without reading its weights."""
    from wmtp_ds.models.info import model_info

    found = model_info(path)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
        return
    for name, value in found.lines().items():
        click.echo(f"{name:<15}{value}")


@contextmanager
def _conversion() -> Iterator[Any]:
    """A bar of bytes on a terminal, a line now and then elsewhere; warnings of libraries stay out of the way."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    from wmtp_ds.models.convert.deliver import Progress

    with _quiet(), Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("writing and comparing", total=None)
        done = total = 0

        def start(count: int) -> None:
            nonlocal total
            total = count
            bar.update(task, total=count)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.advance(task, count)
            if not console.is_terminal and done * 4 // total > (done - count) * 4 // total:
                click.echo(f"written and compared: {done * 100 // total} %", err=True)

        yield Progress(start, advance)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers logs nothing: what matters of it is an error or a warning of ours."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _tell(done: Any, source: Path, as_json: bool) -> None:
    for warning in done.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        fields = ("files", "tensors", "parameters", "nbytes", "resumed", "warnings", "trunk_fingerprint")
        told = {"source": str(source), "folder": str(done.folder), **{name: getattr(done, name) for name in fields}}
        click.echo(json.dumps(told, indent=2))
        return
    went_on = f", {len(done.resumed)} of them kept from an interrupted attempt" if done.resumed else ""
    click.echo(
        f"{done.folder}: {done.parameters:,} parameters in {done.tensors} tensors, {done.nbytes / 1e9:.2f} GB, "
        f"{len(done.files)} files{went_on}; read back and found right"
    )
