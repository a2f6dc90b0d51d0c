"""Time and peak memory against N."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# The floor and plain torch in black, ours solid and thick, others thin and dashed.
_YARDSTICKS = {"floor": ":", "torch": "-"}


def _style(name: str, number: int, ours: set[str]) -> dict[str, Any]:
    if name in _YARDSTICKS:
        return {"color": "black", "linestyle": _YARDSTICKS[name], "linewidth": 1.5}
    dashes = {"linewidth": 2.2} if name in ours else {"linewidth": 1.0, "linestyle": "--"}
    # The strong colours first: of these twenty, every other one is the pale sister of the one before.
    return {"color": colormaps["tab20"]((2 * number + number // 10) % 20), **dashes}


def _curves(axis: Axes, document: Mapping[str, Any], figure_of: Any) -> None:
    ours = {arm["name"] for arm in document["arms"] if arm["ours"]}
    for number, arm in enumerate(document["arms"]):
        name = arm["name"]
        found = [
            (size["rows"], figure_of(size["results"][name]))
            for size in document["sizes"]
            if size["results"].get(name, {}).get("status") == "measured"
        ]
        points = [(rows, value) for rows, value in found if value is not None]
        if points:
            rows, values = zip(*points, strict=True)
            axis.plot(rows, values, label=name, marker="o", markersize=3, **_style(name, number, ours))
    axis.set_xscale("log", base=2)
    axis.set_xlabel("N = heads x positions")
    axis.grid(alpha=0.3)


def plot(document: Mapping[str, Any], picture: Path) -> None:
    """Draw every measured arm as a PNG: median time on the left, memory beyond inputs and gradients on the right."""
    run = document["run"]
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curves(left, document, lambda result: 1000 * result["wall"]["median"])
    left.set(yscale="log", ylabel="median ms, forward and backward", title="Time")
    _curves(right, document, lambda result: None if result["extra_bytes"] is None else result["extra_bytes"] / 2**20)
    right.set(yscale="symlog", ylabel="MiB beyond inputs and gradients", title="Peak memory")
    right.set_ylim(bottom=0)
    figure.legend(*left.get_legend_handles_labels(), fontsize="small", loc="outside right upper")
    where = document["environment"]["device"]
    figure.suptitle(f"{where}: D {run['dim']}, V {run['vocabulary']}, {run['heads']} heads, {run['dtype']}")
    figure.savefig(picture, dpi=120, format="png")
