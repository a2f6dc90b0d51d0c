"""The same for a paper: a PNG with the distribution, the values along a solution, and one pair of solutions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wmtp_ds.look.columns import Solution
from wmtp_ds.look.page import NAMES
from wmtp_ds.look.shades import LESS, MORE, Scale

_COLOURS = {"correct": MORE, "incorrect": LESS}
_LINES = 18  # of a solution


def draw(title: str, solutions: Sequence[Solution], figures: Mapping[str, Any], picture: Path) -> None:
    """Write the picture.

    Args:
        title: above it.
        solutions: the first right one and the first wrong one of a problem are shown as text.
        figures: `wmtp_ds.look.statistics.summary` of them.
        picture: the file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    main = figures["shaded_by"]
    scale = Scale.of(main, [token.columns[main] for solution in solutions for token in solution.tokens])
    pair = _pair(solutions)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5))
    _bars(axes[0, 0], figures["distribution"], NAMES[main])
    if "trajectory" in figures:
        _trajectory(axes[0, 1], figures["trajectory"])
    else:
        axes[0, 1].remove()
    for axis, solution in zip(axes[1], pair, strict=False):
        _text(axis, solution, main, scale)
    for axis in axes[1, len(pair) :]:
        axis.remove()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(picture, dpi=160, format="png")
    plt.close(figure)


def _pair(solutions: Sequence[Solution]) -> list[Solution]:
    for right in solutions:
        for wrong in solutions:
            if right.row.is_correct and not wrong.row.is_correct and right.row.problem_id == wrong.row.problem_id:
                return [right, wrong]
    return list(solutions[:2])


def _rgb(colour: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(part / 255 for part in colour)


def _bars(axis: Any, found: Mapping[str, Sequence[float]], name: str) -> None:
    for kind, colour in _COLOURS.items():
        total = max(1.0, sum(found[kind]))
        axis.stairs([count / total for count in found[kind]], found["edges"], color=_rgb(colour), label=kind)
    axis.set_xlabel(name)
    axis.set_ylabel("share of tokens")
    axis.legend()


def _trajectory(axis: Any, found: Mapping[str, Sequence[float | None]]) -> None:
    for kind, colour in _COLOURS.items():
        values = [float("nan") if value is None else value for value in found[kind]]
        axis.plot([place / (len(values) - 1) for place in range(len(values))], values, color=_rgb(colour), label=kind)
    axis.set_xlabel("place in the solution")
    axis.set_ylabel(NAMES["value"])
    axis.legend()


def _text(axis: Any, solution: Solution, main: str, scale: Scale) -> None:
    """Text in a fixed-width font, each token on its colour: lines from the top, characters from the left."""
    axis.set_axis_off()
    axis.set_title("correct" if solution.row.is_correct else "incorrect", fontsize=10)
    axis.set_xlim(0, 60)
    axis.set_ylim(_LINES, 0)
    line = column = 0
    for token in solution.tokens:
        red, green, blue, opacity = scale.colour(token.columns[main])
        for number, part in enumerate(token.text.split("\n")):
            if number:
                line, column = line + 1, 0
            if part and line < _LINES:
                box = {"facecolor": (*_rgb((red, green, blue)), opacity), "edgecolor": "none", "pad": 0.6}
                axis.text(
                    column, line + 0.5, part.replace("$", r"\$"), family="monospace", fontsize=7, va="center", bbox=box
                )
            column += len(part)
