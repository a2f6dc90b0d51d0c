"""The results as a table, CSV, JSON and a plot: all of them made from the one document of :mod:`.run`."""

import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .options import UsageError

NOT_MEASURED = "not measured"
_MIB = 2**20


def make_folder(output: Path) -> None:
    """Make the folder for the files.

    Raises:
        UsageError: if that cannot be.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "results.json").touch()
    except OSError as error:
        raise UsageError(f"--output {output}: cannot be written: {error.strerror}") from None


# --- the table ---


def _aligned(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Columns as wide as their widest cell; those of ``right`` flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    right = set(right)
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _milliseconds(spread: Mapping[str, float] | None, with_range: bool = True) -> str:
    if spread is None:
        return "-"
    median, low, high = (_number(1000 * spread[key]) for key in ("median", "low", "high"))
    return f"{median} [{low}, {high}]" if with_range else median


def _ratio(spread: Mapping[str, float] | None) -> str:
    return "-" if spread is None else f"{spread['median']:.3f} [{spread['low']:.3f}, {spread['high']:.3f}]"


def _memory(extra_bytes: int | None) -> str:
    return NOT_MEASURED if extra_bytes is None else f"{extra_bytes / _MIB:.1f}"


def _error(errors: Mapping[str, float | None] | None) -> str:
    known = [error for error in (errors or {}).values() if error is not None]
    return f"{max(known):.1e}" if known else "-"


def main_size(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The size that was asked for, among those of the sweep."""
    size: Mapping[str, Any] = next(size for size in document["sizes"] if size["main"])
    return size


def _arm_rows(document: Mapping[str, Any]) -> list[list[str]]:
    on_gpu = document["run"]["device"] == "cuda"
    rows = [["arm", "GPU ms" if on_gpu else "wall ms", "CPU ms", "x F", "x torch", "MiB", "error", "what"]]
    results = main_size(document)["results"]
    for arm in document["arms"]:
        result = results.get(arm["name"], arm)
        error, title = _error(arm["errors"]), arm["title"]
        if result["status"] == "measured":
            ratios = result["ratios"]
            cells = [_milliseconds(result["wall"]), _milliseconds(result["cpu"], with_range=False)]
            cells += [_ratio(ratios.get("floor")), _ratio(ratios.get("torch")), _memory(result["extra_bytes"])]
        else:
            cells = ["WRONG" if result["status"] == "wrong" else NOT_MEASURED, "-", "-", "-", "-"]
        rows.append([arm["name"], *cells, error, title])
    return rows


def _reasons(document: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for arm in document["arms"]:
        if arm["status"] != "measured":
            rows.append([arm["name"], arm["status"], arm["reason"]])
            continue
        for size in document["sizes"]:
            result = size["results"].get(arm["name"], {})
            if result.get("status") == "skipped":
                rows.append([arm["name"], "skipped", f"{result['reason']} at {size['positions']} positions"])
    return rows


def _sweep_rows(document: Mapping[str, Any], cell: Any) -> list[list[str]]:
    sizes = document["sizes"]
    rows = [["arm", *(f"N = {size['rows']}" for size in sizes)]]
    for arm in document["arms"]:
        if arm["status"] == "measured":
            results = [size["results"].get(arm["name"], {"status": "skipped"}) for size in sizes]
            cells = [cell(result) if result["status"] == "measured" else NOT_MEASURED for result in results]
            rows.append([arm["name"], *cells])
    return rows


def _bandwidth_lines(document: Mapping[str, Any]) -> list[str]:
    found = document["bandwidth"]
    title = f"TD weights alone, {found['positions']:,} positions, {found['bytes'] / 1e6:.0f} MB moved by a call"
    if found["status"] != "measured":
        return [title, f"  {found['status']}: {found['reason']}"]
    rows = [["kernel", "ms", "GB/s", "share of the copy's bandwidth"]]
    for name, wall in found["wall"].items():
        share = _ratio(found["share_of_copy"].get(name))
        rows.append([name, _milliseconds(wall), _number(found["bytes"] / wall["median"] / 1e9), share])
    return [title, *_aligned(rows, (1, 2))]


def _target_value(target: Mapping[str, Any]) -> str:
    if target["value"] is None:
        return "-"
    return f"{target['value'] / 1e9:.2f} GB" if target["quantity"] == "memory" else f"{target['value']:.3f}"


def _target_lines(document: Mapping[str, Any]) -> list[str]:
    around = document["environment"]
    device = around["device"] if document["run"]["device"] == "cuda" else around["processor"]
    lines = []
    for kind, title in (("cuda", "Targets on one H100"), ("cpu", "Targets on a CPU")):
        measured_on = f" (measured on: {device})" if document["run"]["device"] == kind else ""
        rows = [["target", "limit", "found", "verdict", "why"]]
        for target in document["targets"]:
            if target["device"] == kind:
                cells = [target["text"], target["limit_text"], _target_value(target), target["verdict"]]
                rows.append([*cells, target["reason"]])
        lines += ["", title + measured_on, *_aligned(rows)]
    return lines


def _headline(document: Mapping[str, Any]) -> list[str]:
    run, around, size = document["run"], document["environment"], main_size(document)
    versions = ", ".join(f"{name} {version}" for name, version in around["versions"].items() if version)
    where = around["device"] if run["device"] == "cuda" else f"{around['processor']}, {around['threads']} threads"
    sequences = size["positions"] // size["length"]
    return [
        f"N = {size['rows']}: {run['heads']} heads x {size['positions']} positions ({sequences} sequences of "
        f"{size['length']}), D {run['dim']}, V {run['vocabulary']}, {run['dtype']}",
        f"on {where}; {versions}; kernels: {around['backend']}",
        f"mean cross-entropy {size['mean_cross_entropy']:.2f} nats, Rho-1 selects {run['k_percent']:g}; "
        f"{run['rounds']} rounds, ratios of {'GPU' if run['device'] == 'cuda' else run['clock']} time within a round, "
        "medians with [least, greatest]",
        "MiB: the most memory beyond inputs and gradients; error: the largest relative one, against float64",
    ]


def table(document: Mapping[str, Any]) -> str:
    """Everything that was measured, for reading."""
    lines = [*_headline(document), "", *_aligned(_arm_rows(document), range(1, 7))]
    reasons = _reasons(document)
    if reasons:
        lines += ["", "Not measured", *(f"  {line}" for line in _aligned(reasons))]
    if len(document["sizes"]) > 1:
        times = _sweep_rows(document, lambda result: _milliseconds(result["wall"], with_range=False))
        memory = _sweep_rows(document, lambda result: _memory(result["extra_bytes"]))
        columns = range(1, 1 + len(document["sizes"]))
        lines += ["", "Median ms against N", *_aligned(times, columns)]
        lines += ["", "MiB beyond inputs and gradients against N", *_aligned(memory, columns)]
    lines += ["", *_bandwidth_lines(document), *_target_lines(document)]
    return "\n".join(lines) + "\n"


# --- files ---

_SPREAD = ("median", "low", "high")
_COLUMNS = (
    "rows",
    "positions",
    "arm",
    "status",
    "reason",
    *(f"wall_s_{key}" for key in _SPREAD),
    *(f"cpu_s_{key}" for key in _SPREAD),
    *(f"ratio_{other}_{key}" for other in ("floor", "torch") for key in _SPREAD),
    "extra_bytes",
    "error_loss",
    "error_grad_hidden",
    "error_grad_weight",
)


def _csv_row(size: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[str, Any]:
    result = size["results"].get(arm["name"], arm)
    row = {"rows": size["rows"], "positions": size["positions"], "arm": arm["name"]}
    row |= {"status": result["status"], "reason": result["reason"]}
    row |= {f"error_{name}": value for name, value in (arm["errors"] or {}).items()}
    if result["status"] == "measured":
        spreads = {"wall_s": result["wall"], "cpu_s": result["cpu"]}
        spreads |= {f"ratio_{other}": result["ratios"].get(other) for other in ("floor", "torch")}
        row |= {f"{name}_{key}": spread[key] for name, spread in spreads.items() if spread for key in _SPREAD}
        row["extra_bytes"] = result["extra_bytes"]
    return row


def _json_safe(value: Any) -> Any:
    """Infinities and NaN, which JSON has no word for, as text."""
    if isinstance(value, dict):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def to_json(document: Mapping[str, Any]) -> str:
    """The document as JSON."""
    return json.dumps(_json_safe(dict(document)), indent=2, allow_nan=False)


def write(document: Mapping[str, Any], output: Path) -> None:
    """Write ``results.json``, ``results.csv``, ``table.txt`` and, where matplotlib is, ``plot.png``."""
    (output / "results.json").write_text(to_json(document) + "\n")
    (output / "table.txt").write_text(table(document))
    with (output / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        for size in document["sizes"]:
            writer.writerows(_csv_row(size, arm) for arm in document["arms"])
    try:
        from .plot import plot
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    plot(document, output / "plot.png")


def tell(document: Mapping[str, Any], output: Path, as_json: bool) -> None:
    """Print the table; or JSON to stdout and the table to stderr."""
    print(table(document), file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(to_json(document))
    print(f"wrote {', '.join(sorted(str(path) for path in output.iterdir()))}", file=sys.stderr)
