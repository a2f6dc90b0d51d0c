"""The pages as a person sees them: in a real browser, without a network."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import Browser, Page, UnavailableError, find_browser

from wmtp_ds.data.rows import Row
from wmtp_ds.look.columns import Solution, Token
from wmtp_ds.look.kinds import kinds_of
from wmtp_ds.look.page import render
from wmtp_ds.look.statistics import summary

TEXTS = {
    True: "def f(x):\n    return '<b>&amp;' if x > 1 else x\n",
    False: 'def f(x):\n    # ↵ "quoted" — \U0001f600 ' + "long " * 60 + "\n    return x - 1\n",
}
WIDTHS = (1280, 800, 360)


def parts(text: str) -> list[tuple[int, int]]:
    """Like a tokenizer's: words with the space before them, line ends and indentation."""
    spans = [match.span() for match in re.finditer(r"\n+|[ ]{2,}|[ ]?\w+|[ ]?[^\w\s]|\s", text)]
    return [*spans, (len(text), len(text))]


def solution(correct: bool, column: str, problem: int) -> Solution:
    text = TEXTS[correct]
    spans = parts(text)
    tokens = []
    for place, ((begin, end), kind) in enumerate(zip(spans, kinds_of(text, spans), strict=True)):
        share = place / (len(spans) - 1)
        entries = {"weight": 0.2 + 2.5 * share, "value": share, "td": share - 0.5}
        if column == "value":
            del entries["weight"]
        elif column == "selected":
            entries = {"weight": float(place % 2), "excess": share - 0.3, "loss": share, "reference": 0.3}
        tokens.append(Token(text[begin:end], kind, entries))
    row = Row(f"problem <{problem}>", "Do <i>it</i> & do it well", text, correct)
    return Solution(row, problem, tokens)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        executable = find_browser()
    except UnavailableError as reason:
        pytest.skip(str(reason))
    running = Browser(executable)
    yield running
    running.close()


@pytest.fixture(scope="module")
def show(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Page]]:
    """A page of two problems, each with a right and a wrong solution, shaded by a kind of column."""
    pages: dict[str, Page] = {}

    def made(column: str) -> Page:
        if column not in pages:
            solutions = [solution(correct, column, problem) for problem in (1, 2) for correct in (True, False)]
            file = tmp_path_factory.mktemp("pages") / f"{column}.html"
            facts = {"checkpoint": "a/very/long/path/" * 20, "data": "x.jsonl"}
            file.write_text(render(f"verifiable: <{column}>", facts, solutions, summary(solutions)), encoding="utf-8")
            pages[column] = Page(browser, file)
        pages[column].resize(1280, 900)
        return pages[column]

    yield made
    for page in pages.values():
        page.close()


COLUMNS = pytest.mark.parametrize("column", ["weight", "selected", "value"])


@COLUMNS
def test_solutions_are_shown_as_text(show: Callable[[str], Page], column: str) -> None:
    page = show(column)
    assert page.evaluate("document.title") == f"verifiable: <{column}>"
    shown = page.evaluate("[...document.querySelectorAll('pre')].map(pre => [pre.className, pre.textContent])")
    assert [kind for kind, _ in shown] == ["correct", "incorrect"] * 2
    for kind, text in shown:
        expected = TEXTS[kind == "correct"]
        assert re.sub("↵(?=\n)", "", text).removesuffix("□") == expected
        assert text.count("↵\n") == expected.count("\n"), "line ends are seen"
    counts = page.evaluate("[...document.querySelectorAll('pre')].map(pre => pre.querySelectorAll('span.t').length)")
    assert counts == [len(parts(TEXTS[kind == "correct"])) for kind, _ in shown]
    headings = page.evaluate("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert headings[1:] == ["problem <1>", "problem <2>"]
    assert page.evaluate("document.querySelectorAll('b, i').length") == 2, "of the legend alone"


@COLUMNS
def test_tokens_are_shaded_by_their_weights(show: Callable[[str], Page], column: str) -> None:
    colours = show(column).evaluate(
        "[...document.querySelectorAll('pre')].map(pre => [...pre.querySelectorAll('span.t')]"
        ".map(token => getComputedStyle(token).backgroundColor))"
    )
    for place, found in enumerate(colours):
        tokens = solution(place % 2 == 0, column, 1).tokens
        seen = []
        for token, colour in zip(tokens, found, strict=True):
            red, green, blue, *opacity = (float(part) for part in re.findall(r"[\d.]+", colour))
            seen.append((opacity or [1.0])[0])
            entry = token.columns["value" if column == "value" else "weight"]
            ordinary = {"weight": 1.0, "selected": 0.0, "value": 0.5}[column]
            if abs(entry - ordinary) > 0.02:
                expected = (0, 158, 115) if entry > ordinary else (213, 94, 0)
                assert (red, green, blue) == expected
        if column == "selected":
            assert seen == pytest.approx([0.75 * (number % 2) for number in range(len(tokens))], abs=0.01)
        else:
            lightest = seen.index(min(seen))
            assert seen[: lightest + 1] == sorted(seen[: lightest + 1], reverse=True)
            assert seen[lightest:] == sorted(seen[lightest:])
            assert max(seen) == pytest.approx(0.75, abs=0.01)
            assert min(seen) < 0.05


TIP = """(() => { const tip = document.getElementById('tip'), r = tip.getBoundingClientRect();
return {shown: getComputedStyle(tip).display != 'none', text: tip.textContent,
  inside: r.left >= 0 && r.top >= 0 && r.right <= innerWidth && r.bottom <= innerHeight}; })()"""


@COLUMNS
@pytest.mark.parametrize("size", [(1280, 900), (800, 300)])
def test_pointing_at_a_token_shows_its_numbers(show: Callable[[str], Page], column: str, size: tuple[int, int]) -> None:
    page = show(column)
    page.resize(*size)
    tokens = [t for problem in (1, 2) for correct in (True, False) for t in solution(correct, column, problem).tokens]
    in_a_long_line = len(solution(True, column, 1).tokens) + 50
    for number in (0, 1, 4, in_a_long_line, len(tokens) // 2, len(tokens) - 2, len(tokens) - 1):
        page.evaluate(f"document.querySelectorAll('span.t')[{number}].scrollIntoView({{block: 'end', inline: 'end'}})")
        x, y = page.evaluate(
            f"(() => {{ const r = document.querySelectorAll('span.t')[{number}].getClientRects()[0];"
            "return [r.left + r.width / 2, r.top + r.height / 2]; })()"
        )
        assert number != in_a_long_line or x > size[0] - 100, "at the right edge"
        page.point(x, y)
        tip = page.evaluate(TIP)
        assert tip["shown"]
        assert tip["inside"], f"token {number} at {x}, {y}"
        token = tokens[number]
        lines = tip["text"].split("\n")
        assert lines[0] == (repr(token.text) if token.text else "end of the solution")
        assert lines[1] == token.kind
        assert [float(line.rpartition(": ")[2]) for line in lines[2:]] == pytest.approx(
            list(token.columns.values()), abs=1e-4
        )
    page.evaluate("scrollTo(0, 0)")
    page.point(3, 3)
    assert not page.evaluate(TIP)["shown"]


@COLUMNS
def test_it_needs_no_network_and_nothing_is_wrong(show: Callable[[str], Page], column: str) -> None:
    page = show(column)
    assert page.requests() == [page.url]
    assert page.complaints() == []


def test_complaints_and_requests_would_be_seen(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text("<!doctype html><img src='http://example.org/x.png'><script>console.log(1); nothing.here</script>")
    page = Page(browser, file)
    assert page.requests() == [page.url, "http://example.org/x.png"]
    assert len(page.complaints()) >= 2
    page.close()


@COLUMNS
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_the_window(show: Callable[[str], Page], column: str, width: int) -> None:
    page = show(column)
    page.resize(width, 900)
    assert page.evaluate("innerWidth") == width
    wide = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
        " && !e.closest('pre, table')).map(e => e.tagName)"
    )
    assert (page.evaluate("document.documentElement.scrollWidth"), wide) == (width, [])


@COLUMNS
def test_charts_are_drawn(show: Callable[[str], Page], column: str) -> None:
    page = show(column)
    expected = summary([solution(correct, column, 1) for correct in (True, False)])
    heights = page.evaluate(
        "[...document.querySelectorAll('svg')[0].querySelectorAll('rect')].map(bar => bar.getBBox().height)"
    )
    edges = expected["distribution"]["edges"]
    assert len(heights) == 2 * (len(edges) - 1)
    for kind, bars in (("correct", heights[: len(heights) // 2]), ("incorrect", heights[len(heights) // 2 :])):
        counts = expected["distribution"][kind]
        assert [height > 0 for height in bars] == [count > 0 for count in counts]
        if len({count for count in counts if count}) > 1:
            assert bars.index(max(bars)) == counts.index(max(counts))
    lines = page.evaluate("[...document.querySelectorAll('polyline')].map(line => line.getBBox().width)")
    assert len(lines) == (0 if column == "selected" else 2)
    assert all(width > 300 for width in lines)
    assert json.loads(page.evaluate("JSON.stringify([...document.querySelectorAll('td:first-child')].length)")) == len(
        expected["by_kind"]
    )


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        ({}, "npm and node are needed"),
        ({"npm": "exit 1", "node": "exit 1"}, "returned non-zero exit status 1"),
        ({"npm": "echo something else > x.tgz", "node": ""}, "what was fetched is not what is pinned"),
    ],
)
def test_why_there_is_no_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: dict[str, str], said: str
) -> None:
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UnavailableError, match=said):
        find_browser()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
