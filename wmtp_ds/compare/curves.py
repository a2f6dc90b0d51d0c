"""Learning curves, one over another."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Colours that the colour-blind tell apart (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")


def draw_curves(told: Mapping[str, Any], metrics: Sequence[str], picture: Path) -> None:
    """One panel a metric over optimizer steps, a colour for each arm; of several runs a thin line each, and their mean.

    Args:
        told: of `wmtp_ds.compare.comparison.compare`.
        metrics: of the panels.
        picture: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    columns = min(len(metrics), 3)
    rows = -(-len(metrics) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.3 * rows), squeeze=False)
    for axis, metric in zip(axes.flat, metrics, strict=False):
        for number, (arm, runs) in enumerate(told["arms"].items()):
            colour = COLOURS[number % len(COLOURS)]
            series = [_points(told["curves"][metric][run]) for run in runs if run in told["curves"][metric]]
            if series:
                _draw_arm(axis, arm, colour, series, is_first=number == 0)
        axis.set_title(metric)
        axis.set_xlabel("optimizer step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(metrics) :]:
        axis.remove()
    # Not every arm is in every panel.
    drawn = {name: line for axis in figure.axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    lines = {arm: drawn[arm] for arm in told["arms"] if arm in drawn}
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=min(4, len(lines)), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / (3.3 * rows) * -(-len(lines) // 4)))
    figure.savefig(picture, dpi=130, format="png")
    plt.close(figure)


def _points(points: Sequence[Sequence[Any]]) -> dict[int, float]:
    return {int(step): float(value) for step, value in points}


def _draw_arm(axis: Any, arm: str, colour: str, series: Sequence[dict[int, float]], *, is_first: bool) -> None:
    """One arm's line; the first one's, which others are held against, is dashed."""
    style = {"color": colour, "linestyle": "--" if is_first else "-"}
    dots = {"marker": "o", "markersize": 3} if all(len(values) <= 30 for values in series) else {}
    if len(series) == 1:
        axis.plot(list(series[0]), list(series[0].values()), label=arm, linewidth=1.4, **style, **dots)
        return
    for values in series:
        axis.plot(list(values), list(values.values()), linewidth=0.6, alpha=0.45, **style)
    steps = sorted(set.intersection(*map(set, series)))
    means = [float(np.mean([values[step] for values in series])) for step in steps]
    axis.plot(steps, means, label=arm, linewidth=1.8, **style, **dots)
