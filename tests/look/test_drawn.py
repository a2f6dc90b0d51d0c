"""What page and picture show, read without a browser."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from wmtp_ds.data.rows import Row
from wmtp_ds.look.columns import Solution, Token
from wmtp_ds.look.page import render
from wmtp_ds.look.picture import draw
from wmtp_ds.look.statistics import summary

SHORT = "def f(x):\n    return '$a$ $b$' — 1\n"
LONG = "x = 1  # 漢字 " + "long " * 60 + "\n" + "\ty\n" * 30
GREEN, ORANGE = (0, 158, 115), (213, 94, 0)


def solution(text: str, correct: bool, line: int, *, selects: bool = False) -> Solution:
    """Tokens are words; their weights go around 1, or are 0 and 1 in turn."""
    words = [*re.findall(r"\s|[^\s]+", text), ""]
    weights = [float(place % 2) if selects else (0.5, 1.0, 2.0)[place % 3] for place in range(len(words))]
    kinds = ["name"] * (len(words) - 1) + ["end"]
    tokens = [
        Token(word, kind, {"weight": weight} | ({} if selects else {"value": 0.5}))
        for word, kind, weight in zip(words, kinds, weights, strict=True)
    ]
    return Solution(Row("p", "Do it.", text, correct), line, tokens)


@pytest.fixture
def drawn(tmp_path: Path, saved_figures: list[Figure]) -> Callable[[list[Solution]], Figure]:
    """The picture of solutions."""

    def picture(solutions: list[Solution]) -> Figure:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw("verifiable: x", solutions, summary(solutions), tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        [figure] = saved_figures
        figure.set_dpi(160)  # as it was saved: extents are in pixels
        return figure

    return picture


def test_tokens_of_the_picture_are_beside_each_other_on_their_colours(
    drawn: Callable[[list[Solution]], Figure],
) -> None:
    right, wrong = solution(SHORT, True, 3), solution(SHORT.replace("1", "2"), False, 7)
    figure = drawn([right, wrong])
    assert figure.get_suptitle() == "verifiable: x"
    assert "green: above 1, orange: below 1" in figure.get_supxlabel()
    _, values, *sides = figure.axes
    assert values.get_ylabel() == "value V"
    assert [axis.get_title() for axis in sides] == ["correct, line 3", "incorrect, line 7"]
    for axis, one in zip(sides, (right, wrong), strict=True):
        lines = ["", ""]
        for text in axis.texts:
            column, middle = text.get_position()
            assert column == len(lines[int(middle)]), "no gap"
            lines[int(middle)] += text.get_text()
        assert "\n".join(lines) + "\n" == one.row.output
        shown = [token for token in one.tokens if token.text.strip("\n")]
        fields = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
        for token, field in zip(shown, fields, strict=True):
            weight, (*colour, opacity) = token.columns["weight"], field.get_facecolor()
            assert opacity == pytest.approx(0.0 if weight == 1 else 0.75)
            if weight != 1:
                assert np.round(np.array(colour) * 255).tolist() == list(GREEN if weight > 1 else ORANGE)
            assert field.get_width() == len(token.text)
    # As wide as it is drawn, or characters would lie over each other, or apart.
    [word] = [text for text in sides[0].texts if text.get_text() == "return"]
    begin, end = (sides[0].transData.transform((column, 0))[0] for column in (4, 10))
    assert word.get_window_extent().width == pytest.approx(end - begin, rel=0.05)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_long_lines_and_many_lines_are_cut(drawn: Callable[[list[Solution]], Figure]) -> None:
    figure = drawn([solution(LONG, True, 1), solution(SHORT, False, 2)])
    _, _, axis, short = figure.axes
    for text in axis.texts:
        assert text.get_window_extent().x1 <= axis.get_window_extent().x1 + 1
    first = "".join(text.get_text() for text in axis.texts if int(text.get_position()[1]) == 0)
    assert re.fullmatch(r"x = 1  # 漢字 (long )+l?o?n?g?…", first)
    assert len(first) > 60
    numbers = sorted({int(text.get_position()[1]) for text in axis.texts})
    assert numbers == list(range(18))
    assert [text.get_text() for text in axis.texts][-1] == "…"
    assert not any("…" in text.get_text() for text in short.texts)


def test_what_is_selected(drawn: Callable[[list[Solution]], Figure]) -> None:
    solutions = [solution(SHORT, kind, 1, selects=True) for kind in (True, False)]
    figure = drawn(solutions)
    assert "(green: selected)" in figure.get_supxlabel()
    kinds = figure.axes[1]
    assert [label.get_text() for label in kinds.get_yticklabels()] == ["name", "end"]
    expected = summary(solutions)["by_kind"]
    means = [bar.get_width() for side in kinds.containers for bar in side]
    assert means == [expected[kind][side] for side in ("correct", "incorrect") for kind in ("name", "end")]
    page = render("t", {}, solutions, summary(solutions))
    assert re.search(r"<b [^>]*>selected</b>; the others are <b>left out</b>", page)


def test_right_and_wrong_solutions_lie_beside_each_other() -> None:
    lines = [(1, True), (2, True), (3, True), (4, False), (5, False)]
    solutions = [solution(SHORT, correct, line) for line, correct in lines]
    page = render("t", {}, solutions, summary(solutions))
    assert re.findall(r"<h3>\w+, line (\d)</h3>", page) == ["1", "4", "2", "5", "3"]
    assert "darkest at 0.5 and 2" in page
