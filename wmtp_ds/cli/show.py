"""``wmtp-ds show FILE``: the resolved config, each value with its origin."""

import json
from pathlib import Path
from typing import Any

import click

from wmtp_ds.config import Resolved, load_config
from wmtp_ds.config.resolved import plain_values
from wmtp_ds.config.toml_writer import format_name, format_value

_WIDEST_VALUE = 60  # a longer value does not push every comment to the right


@click.command(epilog="Example: wmtp-ds show stage_configs/critic.toml --override training.batch_size=4")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--override", "overrides", multiple=True, metavar="KEY=VALUE", help="Set one key; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def show(file: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print the config FILE as a run would see it, each value with its origin.

    Only the schema is checked: models and data need not be there. Passwords are masked. The output is TOML.
    """
    resolved = load_config(file, overrides, checks=False)
    for warning in resolved.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps(_as_json(resolved), indent=2, ensure_ascii=False))
        return
    for block in _blocks(resolved):
        click.echo(block)


def _as_json(resolved: Resolved) -> dict[str, Any]:
    """Values nested as in the file, and of each dotted key where it comes from."""
    return {
        "file": str(resolved.path),
        "hash": resolved.hash(),
        "config": plain_values(resolved.config),
        "origins": {key: {"layer": origin.layer, "where": origin.where} for key, origin in resolved.origins.items()},
    }


def _blocks(resolved: Resolved) -> list[str]:
    """Lines of TOML, the origins as comments in one column."""
    rows: list[tuple[str, str]] = []  # a line, and its origin where it is a value
    _collect(resolved, plain_values(resolved.config), "", "", rows)
    width = max((len(line) for line, origin in rows if origin and len(line) <= _WIDEST_VALUE), default=0)
    return [f"{line:<{width}}  # {origin}" if origin else line for line, origin in rows]


def _collect(resolved: Resolved, values: dict[str, Any], key: str, header: str, rows: list[tuple[str, str]]) -> None:
    """The lines of a table: its keys, then the tables within. Tables in an item of a list stay on one line."""
    own: list[tuple[str, str]] = []
    inner: list[tuple[str, str, dict[str, Any]]] = []
    for name, value in values.items():
        here = f"{key}.{name}" if key else name
        if isinstance(value, dict) and value and not key.endswith("]"):
            inner.append((here, f"[{here}]", value))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            inner += [(f"{here}[{index}]", f"[[{here}]]", item) for index, item in enumerate(value)]
        else:
            own.append((f"{format_name(name)} = {format_value(value)}", str(resolved.origins[here])))
    if own:
        rows += [("", ""), (header, "")] if rows else [(header, "")]
        rows += own
    for here, inner_header, value in inner:
        _collect(resolved, value, here, inner_header, rows)
