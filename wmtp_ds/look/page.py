"""One page of HTML that needs nothing else: solutions shaded token by token, and what that amounts to."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby, zip_longest
from typing import Any

from wmtp_ds.look.columns import Solution, Token
from wmtp_ds.look.shades import LESS, MORE, Scale

NAMES = {
    "weight": "weight",
    "value": "value V",
    "td": "TD error δ",
    "excess": "excess loss",
    "loss": "loss (nats)",
    "reference": "reference loss (nats)",
}
END_MARK = "□"
_WIDTH, _HEIGHT, _MARGIN = 420, 180, 34
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } h3 { font-size: 1rem; }
pre { background: #fafafa; border: 1px solid #ddd; border-left-width: 5px; padding: .6rem; overflow-x: auto; }
pre.correct { border-left-color: #009e73; } pre.incorrect { border-left-color: #d55e00; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
p, figcaption { overflow-wrap: anywhere; }
.note { color: #555; } td, th { padding: .1rem .8rem .1rem 0; text-align: right; } td:first-child { text-align: left; }
span.t:empty { padding-left: .35em; }
span.t:hover { outline: 1px solid #222; }
#tip { position: fixed; display: none; background: #222; color: #fff; font: 13px/1.4 monospace; padding: .4rem .6rem;
  white-space: pre; pointer-events: none; border-radius: 3px; }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; max-width: 100%; }
svg { max-width: 100%; height: auto; } table { display: block; overflow-x: auto; }
svg text { font-size: 11px; fill: #444; }
"""
_SCRIPT = """
const tip = document.getElementById("tip");
document.addEventListener("mouseover", event => {
  const token = event.target.closest("span.t");
  tip.style.display = token ? "block" : "none";
  if (token) tip.textContent = token.dataset.tip;
});
document.addEventListener("mousemove", event => {
  const below = event.clientY + 18 + tip.offsetHeight <= innerHeight;
  tip.style.left = Math.max(0, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = Math.max(0, below ? event.clientY + 18 : event.clientY - 8 - tip.offsetHeight) + "px";
});
"""


def render(title: str, facts: Mapping[str, str], solutions: Sequence[Solution], figures: Mapping[str, Any]) -> str:
    """The page.

    Args:
        title: of the page.
        facts: what it shows, a line each.
        solutions: in the order of their problems.
        figures: `wmtp_ds.look.statistics.summary` of them.
    """
    main = figures["shaded_by"]
    scale = Scale.of(main, [token.columns[main] for solution in solutions for token in solution.tokens])
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<p class=note>" + "<br>".join(f"{escape(name)}: {escape(value)}" for name, value in facts.items()) + "</p>",
        _legend(main, scale),
        "<div class=charts>",
        _histogram(figures["distribution"], NAMES[main]),
        _lines(figures["trajectory"], NAMES["value"]) if "trajectory" in figures else "",
        "</div>",
        _kinds(figures["by_kind"], NAMES[main]),
    ]
    for problem_id, group in groupby(solutions, key=lambda solution: solution.row.problem_id):
        members = _beside(list(group))
        parts.append(f"<h2>{escape(problem_id)}</h2><p>{escape(members[0].row.instruction)}</p><div class=pair>")
        parts += [_solution(solution, main, scale) for solution in members]
        parts.append("</div>")
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style></head><body>\n{body}\n<div id=tip></div>\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _legend(main: str, scale: Scale) -> str:
    more, less = scale.words
    more_colour, less_colour = (f"rgb({red},{green},{blue})" for red, green, blue in (MORE, LESS))
    if scale.selects:
        told = f'<b style="color:{more_colour}">{more}</b>; the others are <b>{less}</b>'
    else:
        told = (
            f'<b style="color:{more_colour}">{more}</b>, <b style="color:{less_colour}">{less}</b>, {_darkest(scale)}'
        )
    return f"<p>Shaded by {NAMES[main]}: {told}. Point at a token for its numbers.</p>"


def _darkest(scale: Scale) -> str:
    if scale.kind == "ratio":
        factor = math.exp(scale.most)
        return f"darker the farther by ratio, darkest at {1 / factor:.3g} and {factor:.3g}"
    return f"darker the farther, darkest at {scale.ordinary:g} ± {scale.most:.3g}"


def _beside(solutions: Sequence[Solution]) -> list[Solution]:
    """Right and wrong ones in turn: two columns show them beside each other."""
    sides = [[one for one in solutions if one.row.is_correct is kind] for kind in (True, False)]
    return [one for pair in zip_longest(*sides) for one in pair if one is not None]


def _solution(solution: Solution, main: str, scale: Scale) -> str:
    kind = "correct" if solution.row.is_correct else "incorrect"
    spans = "".join(_span(token, main, scale) for token in solution.tokens)
    return f"<div><h3>{kind}, line {solution.line}</h3><pre class={kind}>{spans}</pre></div>"


def _span(token: Token, main: str, scale: Scale) -> str:
    red, green, blue, opacity = scale.colour(token.columns[main])
    told = [f"{NAMES.get(name, name)}: {value:.4f}" for name, value in token.columns.items()]
    what = f"part of {token.part_of!r}" if token.part_of else repr(token.text)
    tip = escape("\n".join(["end of the solution" if token.kind == "end" else what, token.kind, *told]), quote=True)
    text = END_MARK if token.kind == "end" else escape(token.text)
    # A line end alone would show nothing.
    shown = text.replace("\n", "↵\n") if not token.text.strip() and "\n" in token.text else text
    return f'<span class=t style="background:rgba({red},{green},{blue},{opacity})" data-tip="{tip}">{shown}</span>'


def _kinds(table: Mapping[str, Mapping[str, Any]], name: str) -> str:
    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    rows = "".join(
        f"<tr><td>{kind}</td><td>{entry['tokens']}</td><td>{shown(entry['correct'])}</td>"
        f"<td>{shown(entry['incorrect'])}</td></tr>"
        for kind, entry in table.items()
    )
    head = f"<tr><th></th><th>tokens</th><th>mean {name}, correct</th><th>mean {name}, incorrect</th></tr>"
    return f"<h2>By kind of token</h2><table>{head}{rows}</table>"


def _frame(content: str, title: str, left: str, right: str, top: str) -> str:
    base, end = _HEIGHT - _MARGIN, _WIDTH - _MARGIN
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg {size} role="img">'
        f'<path d="M{_MARGIN} 10V{base}H{end}" fill="none" stroke="#888"/>{content}'
        f'<text x="{_MARGIN}" y="{base + 15}">{left}</text>'
        f'<text x="{end}" y="{base + 15}" text-anchor="end">{right}</text>'
        f'<text x="{_MARGIN - 4}" y="16" text-anchor="end">{top}</text></svg></figure>'
    )


def _histogram(found: Mapping[str, Sequence[float]], name: str) -> str:
    edges, bars = found["edges"], []
    shares = {kind: [count / max(1.0, sum(found[kind])) for count in found[kind]] for kind in ("correct", "incorrect")}
    highest = max(max(values) for values in shares.values()) or 1.0
    width = (_WIDTH - 2 * _MARGIN) / (len(edges) - 1) / 2
    for shift, (kind, colour) in enumerate((("correct", MORE), ("incorrect", LESS))):
        for place, share in enumerate(shares[kind]):
            height = share / highest * (_HEIGHT - _MARGIN - 10)
            x, y = _MARGIN + (2 * place + shift) * width, _HEIGHT - _MARGIN - height
            fill = f"rgb({colour[0]},{colour[1]},{colour[2]})"
            bars.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>')
    title = f"Share of tokens by {name}: correct (green), incorrect (orange)"
    return _frame("".join(bars), title, f"{edges[0]:.3g}", f"{edges[-1]:.3g}", f"{highest:.2f}")


def _lines(found: Mapping[str, Sequence[float | None]], name: str) -> str:
    known = [value for values in found.values() for value in values if value is not None]
    low, high = min(known), max(known)
    high = high if high > low else low + 1e-9
    lines = []
    for kind, colour in (("correct", MORE), ("incorrect", LESS)):
        points = " ".join(
            f"{_MARGIN + place / (len(found[kind]) - 1) * (_WIDTH - 2 * _MARGIN):.1f},"
            f"{10 + (high - value) / (high - low) * (_HEIGHT - _MARGIN - 10):.1f}"
            for place, value in enumerate(found[kind])
            if value is not None
        )
        stroke = f"rgb({colour[0]},{colour[1]},{colour[2]})"
        lines.append(f'<polyline points="{points}" fill="none" stroke="{stroke}" stroke-width="2"/>')
    title = f"{name} along a solution, {low:.3f} to {high:.3f}: correct (green), incorrect (orange)"
    return _frame("".join(lines), title, "first token", "last token", "")
