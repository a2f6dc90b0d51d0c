"""``wmtp-ds data stats``: what a data file holds, and what a run will learn from it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from wmtp_ds.launch import MAX_RANKS

_OF_CONFIG = ("tokenizer", "max_length", "template", "cache_dir")
_DEFAULT_MAX_LENGTH = 2048


@click.command(
    epilog="Example: wmtp-ds data stats --config stage_configs/local/verifiable.toml --plot storage/data/stats.png"
)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), help="A stage config: what a run of it will draw from FILE.")
@click.option(
    "--override", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a key of the config; repeatable."
)
@click.option(
    "--num_gpus",
    "--num-gpus",
    type=click.IntRange(1, MAX_RANKS),
    default=1,
    show_default=True,
    help="Ranks of the run: the global batch grows with them.",
)
@click.option("--tokenizer", metavar="FOLDER", type=click.Path(path_type=Path), help="Counts tokens, without a config.")
@click.option("--max-length", type=click.IntRange(min=2), help="Tokens of a sequence.  [default: 2048]")
@click.option("--template", type=click.Choice(["alpaca", "plain"]), help="Of the prompt.  [default: alpaca]")
@click.option("--cache-dir", help="Folder where tokens are kept, '' for none.  [default: storage/cache/tokens]")
@click.option("--plot", metavar="FILE.png", type=click.Path(path_type=Path), help="Draw a picture, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the statistics as JSON.")
@click.pass_context
def stats(
    context: click.Context,
    file: Path | None,
    config: Path | None,
    overrides: tuple[str, ...],
    num_gpus: int,
    plot: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Count FILE's rows and problems, measure prompts and solutions, and say what a run learns in each phase.

    FILE defaults to the config's dataset.train. Without --config and --tokenizer, lengths are in bytes alone.
    """
    _check_usage(context, file, config, plot, given)
    import numpy as np

    from wmtp_ds.data.index import build_index
    from wmtp_ds.data.statistics import count_rows, count_tokens, describe_tokens, prompt_bytes, spread
    from wmtp_ds.data.templates import get_template

    resolved = None
    if config is not None:
        from wmtp_ds.config import load_config

        resolved = load_config(config, overrides, checks=False)
        dataset = resolved.config.dataset
        file = Path(dataset.train) if file is None else file
        given = {
            "tokenizer": Path(resolved.config.models.policy.tokenizer_path),
            "max_length": dataset.max_length,
            "template": dataset.template,
            "cache_dir": dataset.cache_dir,
        }
    assert file is not None
    if plot is not None:
        from wmtp_ds.data.output_file import check_output

        check_output(plot, [file], force=True, option="--plot")
    template = get_template(given["template"] or "alpaca")
    index = build_index(file)
    in_bytes = prompt_bytes(index, template)
    report: dict[str, Any] = {"file": str(file), **count_rows(index)}
    report["bytes"] = {"prompt": spread(in_bytes), "solution": spread(index.output_bytes)}
    report["tokens"] = report["plan"] = None
    shown = in_bytes, index.output_bytes.astype(np.int64)
    if given["tokenizer"] is not None:
        encoder, cache = _open_tokens(index, template, given)
        lengths = count_tokens(index, encoder, template, given["max_length"] or _DEFAULT_MAX_LENGTH, cache)
        report["tokens"] = describe_tokens(lengths)
        shown = lengths.prompts, lengths.solutions
        if resolved is not None:
            from wmtp_ds.data.statistics_plan import describe_plan, plan_run

            plan, cut = plan_run(resolved, index, lengths, num_gpus)
            report["plan"] = describe_plan(plan, cut, index, lengths, resolved)
    if plot is not None:
        from wmtp_ds.data.statistics_plot import plot_statistics

        plot_statistics(report, np.bincount(index.problem), *shown, plot)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _tell(report)
    if plot is not None:
        click.echo(f"drew {plot}", err=True)


def _check_usage(
    context: click.Context, file: Path | None, config: Path | None, plot: Path | None, given: dict[str, Any]
) -> None:
    if plot is not None and plot.suffix != ".png":
        raise click.UsageError(f"--plot {plot}: draws a PNG: give a name that ends with .png.")
    if config is None:
        if file is None:
            raise click.UsageError("Name a data FILE, or a --config whose dataset.train is meant.")
        for name in ("overrides", "num_gpus"):
            if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                typed = "--override" if name == "overrides" else "--num_gpus"
                raise click.UsageError(f"{typed} is about a run: name its --config, or leave it out.")
        if given["tokenizer"] is None and (given["max_length"] is not None or given["cache_dir"] is not None):
            typed = "--max-length" if given["max_length"] is not None else "--cache-dir"
            raise click.UsageError(f"{typed} is about tokens: name a --tokenizer, too.")
        return
    for name in _OF_CONFIG:
        if given[name] is not None:
            typed = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{typed} is what the config says: leave it out, or use --override.")


def _open_tokens(index: Any, template: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    """The tokenizer's encoder, and the cache of the file's tokens."""
    from wmtp_ds.config.schema import DatasetConfig
    from wmtp_ds.data.text_encoder import TextEncoder
    from wmtp_ds.data.token_cache import open_token_cache
    from wmtp_ds.models.loading import load_tokenizer

    encoder = TextEncoder(load_tokenizer(given["tokenizer"]))
    folder = DatasetConfig.model_fields["cache_dir"].default if given["cache_dir"] is None else given["cache_dir"]
    return encoder, open_token_cache(index, encoder, template, Path(folder).expanduser() if folder else None)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: the first column to the left, numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row))
    # A file or a pipe has no width: nothing is cut there.
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=200)).print(table)


def _tell(report: dict[str, Any]) -> None:
    click.echo(
        f"{report['file']}: {report['rows']:,} rows ({report['correct']:,} correct, {report['incorrect']:,} incorrect) "
        f"of {report['problems']:,} problems\n"
        f"  problems without a correct row: {report['problems_without_correct']:,}; without an incorrect one: "
        f"{report['problems_without_incorrect']:,}"
    )
    _table(
        "Difficulty",
        ("difficulty", "problems", "correct", "incorrect"),
        [
            ("unknown" if level == "0" else level, counts["problems"], counts["correct"], counts["incorrect"])
            for level, counts in report["by_difficulty"].items()
        ],
    )
    spreads = {"rows per problem": report["rows_per_problem"]}
    spreads |= {f"{what}, bytes": found for what, found in report["bytes"].items()}
    if tokens := report["tokens"]:
        spreads |= {f"{what}, tokens": tokens[what] for what in ("prompt", "solution", "sequence")}
    columns = tuple(report["rows_per_problem"])
    _table("Spread", ("", *columns), [(what, *found.values()) for what, found in spreads.items()])
    if tokens:
        click.echo(
            f"max_length {tokens['max_length']:,}: {tokens['prompts_truncated']:,} prompts lose their left, "
            f"{tokens['solutions_skipped']:,} solutions are skipped; {tokens['supervised_tokens']:,} supervised tokens "
            f"of {tokens['tokens']:,}"
        )
    if report["plan"]:
        _tell_plan(report["plan"])


def _tell_plan(plan: dict[str, Any]) -> None:
    bins = tuple(plan["run"].get("by_bin", ()))
    lines = [(f"{phase['epoch_range'][0]:g} to {phase['epoch_range'][1]:g}", phase) for phase in plan["phases"]]
    click.echo(
        f"\nA run of {plan['steps']:,} steps of {plan['global_batch']:,} rows (ranks: {plan['ranks']}), "
        f"{plan['epochs']:g} epochs"
    )
    lines.append(("all", plan["run"]))
    keys = ("draws", "distinct_rows", "correct", "incorrect", "prompts_truncated", "supervised_tokens")
    _table(
        "What each phase learns from",
        ("share of the run", "draws", "rows", "correct", "incorrect", "truncated", "supervised"),
        [(name, *(found[key] for key in keys)) for name, found in lines],
    )
    if bins:
        _table(
            "Supervised tokens by difficulty bin",
            ("share of the run", *bins),
            [(name, *(found["by_bin"][of]["supervised_tokens"] for of in bins)) for name, found in lines],
        )
    padding = plan["padding"]
    click.echo(f"padding: {padding['unpacked']:.1%} unpacked, {padding['packed']:.1%} packed")
    for warning in plan["warnings"]:
        click.echo(f"warning: {warning}", err=True)
