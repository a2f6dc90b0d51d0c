"""The same for a paper: a PNG with the distribution, the values along a solution, and one pair of solutions."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

from wmtp_ds.look.columns import Solution, Token
from wmtp_ds.look.page import NAMES
from wmtp_ds.look.shades import LESS, MORE, Scale

_COLOURS = {"correct": MORE, "incorrect": LESS}
_LINES = 18  # of a solution
_FONTS = ["DejaVu Sans Mono", "DejaVu Sans"]  # matplotlib's own
_FONT_SIZE = 7.5
_ADVANCE = 1233 / 2048  # a character's width, of the first font's size
_LINE_HEIGHT = 0.17  # inches


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
    lines = max(len(_laid_out(solution)) for solution in pair)
    figure, axes = plt.subplots(
        2, 2, figsize=(11, 4.6 + lines * _LINE_HEIGHT), height_ratios=(3.6, 0.3 + lines * _LINE_HEIGHT)
    )
    _bars(axes[0, 0], figures["distribution"], NAMES[main])
    if "trajectory" in figures:
        _trajectory(axes[0, 1], figures["trajectory"])
    else:
        _by_kind(axes[0, 1], figures["by_kind"], NAMES[main])
    for axis, solution in zip(axes[1], pair, strict=False):
        axis.set_axis_off()
        axis.set_title(f"{'correct' if solution.row.is_correct else 'incorrect'}, line {solution.line}", fontsize=10)
        axis.set_ylim(lines, 0)
    for axis in axes[1, len(pair) :]:
        axis.remove()
    figure.suptitle(title)
    more, less = scale.words
    colours = f"green: {more}" if scale.selects else f"green: {more}, orange: {less}, darker the farther"
    figure.supxlabel(f"tokens by {NAMES[main]} ({colours})", fontsize=9)
    figure.tight_layout()
    for axis, solution in zip(axes[1], pair, strict=False):  # now that it is known how wide they are
        _text(axis, solution, main, scale)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box stands for it
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
        style = {"color": _rgb(colour), "linestyle": "-" if kind == "correct" else "--"}  # where both are alike
        axis.stairs([count / total for count in found[kind]], found["edges"], label=kind, **style)
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


def _by_kind(axis: Any, table: Mapping[str, Mapping[str, Any]], name: str) -> None:
    kinds = list(table)
    for shift, (side, colour) in zip((-0.2, 0.2), _COLOURS.items(), strict=True):
        means = [float("nan") if table[kind][side] is None else table[kind][side] for kind in kinds]
        axis.barh([place + shift for place in range(len(kinds))], means, 0.4, color=_rgb(colour), label=side)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.invert_yaxis()
    axis.set_xlabel(f"mean {name}")


def _laid_out(solution: Solution) -> list[list[tuple[str, Token]]]:
    """The lines that are shown, each as its parts with their tokens; one that only says that there are more."""
    lines: list[list[tuple[str, Token]]] = [[]]
    for token in solution.tokens:
        for number, part in enumerate(token.text.replace("\t", "    ").split("\n")):
            if number:
                lines.append([])
            if part:
                lines[-1].append((part, token))
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    return [*lines[: _LINES - 1], []] if len(lines) > _LINES else lines


def _text(axis: Any, solution: Solution, main: str, scale: Scale) -> None:
    """Text in a fixed-width font, each token on its colour: lines from the top, characters from the left.

    What is longer than the axis is wide, or has more lines than are shown, ends with an ellipsis.
    """
    from matplotlib.patches import Rectangle

    figure = axis.get_figure()
    width = axis.get_position().width * figure.get_figwidth() * 72 / (_FONT_SIZE * _ADVANCE)  # in characters
    axis.set_xlim(0, width)
    style = {"family": _FONTS, "fontsize": _FONT_SIZE, "va": "center_baseline", "clip_on": True, "parse_math": False}
    for line, parts in enumerate(_laid_out(solution)):
        fits = sum(_columns(part) for part, _ in parts) <= width
        room, column = int(width) if fits else int(width) - 1, 0
        for part, token in parts:
            while column + _columns(part) > room:
                part = part[:-1]
            if part:
                red, green, blue, opacity = scale.colour(token.columns[main])
                colour = (*_rgb((red, green, blue)), opacity)
                axis.add_patch(Rectangle((column, line), _columns(part), 1, facecolor=colour, edgecolor="none"))
                axis.text(column, line + 0.5, part, **style)
            column += _columns(part)
        if not fits or (not parts and line == _LINES - 1):
            axis.text(column, line + 0.5, "…", **style)


def _columns(text: str) -> int:
    """How wide a text is, in characters of a fixed-width font."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)
