"""Reads the documentation as tests need it: pages, what is fenced in them, tables, and commands."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
README = REPOSITORY / "README.md"
PAGES = [README, REPOSITORY / "kernels/README.md", *sorted(DOCS.rglob("*.md"))]
PAGES += [path for path in [REPOSITORY / "experiments/README.md"] if path.exists()]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_PROGRAMS = ("wmtp-ds ", "deepspeed bin/train_stage.py ", "python -m wmtp_ds ")


@dataclass(frozen=True)
class Command:
    """A command that a page shows."""

    page: str
    text: str
    fenced: bool  # a line of its own, and so complete


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def fenced(page: Path, language: str | None = None) -> list[str]:
    """What stands between fences, of one language ("" for none) or of all."""
    return [text for kind, text in _FENCE.findall(page.read_text()) if language in (None, kind)]


def prose(page: Path) -> str:
    """A page without what is fenced in it."""
    return _FENCE.sub("", page.read_text())


def inline_code(page: Path) -> list[str]:
    """What stands between single backticks, outside of fences."""
    return _CODE.findall(prose(page))


def commands(page: Path) -> Iterator[Command]:
    """Commands of this project that a page shows."""
    for text in fenced(page):
        for line in text.replace("\\\n", " ").splitlines():
            # What explains it stands behind a # or far to the right.
            typed = re.split(r"\s#\s|\s{4,}", line.strip())[0].strip()
            if typed.startswith(_PROGRAMS):
                yield Command(name_of(page), typed, True)
    for code in inline_code(page):
        if code.startswith(_PROGRAMS):
            yield Command(name_of(page), code, False)


def cells_of(line: str) -> list[str]:
    """The cells of a table's line."""
    return [cell.strip() for cell in line.strip()[1:-1].split("|")]


def tables(page: Path, *header: str) -> list[list[list[str]]]:
    """The rows of each table with this header, cell by cell."""
    found, rows, inside = [], [], False
    for line in [*page.read_text().splitlines(), ""]:
        cells = cells_of(line) if line.startswith("|") else []
        if inside and cells:
            rows.append(cells)
        elif inside:
            found.append(rows[1:])  # less the line under the header
            rows, inside = [], False
        elif cells == list(header):
            inside = True
    return found


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
