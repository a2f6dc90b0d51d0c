"""Messages that the documentation quotes are messages of the program, and claims about other tools have sources."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest
from doc_pages import DOCS, REPOSITORY, cells_of, fenced
from doc_pages import tables as tables_of

TROUBLE = DOCS / "troubleshooting.md"

# --- troubleshooting ---


def template(node: ast.AST) -> str | None:
    """A text of the program with … for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sdr]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


@cache
def said_by_the_program() -> list[str]:
    files = [*(REPOSITORY / "wmtp_ds").rglob("*.py"), *(REPOSITORY / "kernels/wmtp_kernels").rglob("*.py")]
    found = []
    for file in files:
        tree = ast.parse(file.read_text())
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        found += [template(node) for node in ast.walk(tree) if id(node) not in documentation]
    return [" ".join(text.split()) for text in found if text]


def occurs(message: str, text: str) -> bool:
    """Whether the parts of a message between … stand in a text in their order."""
    at = 0
    for part in (part.strip() for part in message.split("…")):
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return at > 0


def messages(*header: str) -> list[tuple[str, list[str]]]:
    """Each message that the page quotes, and its row."""
    rows = [row for table in tables_of(TROUBLE, *header) for row in table]
    return [(quoted, row) for row in rows for quoted in re.findall(r"`([^`]+)`", row[0])]


@pytest.mark.parametrize("message", [message for message, _ in messages("message", "what to do")])
def test_a_message_of_the_troubleshooting_page_is_one_of_the_program(message: str) -> None:
    assert any(occurs(message, text) for text in said_by_the_program()), f"nothing says {message!r}"


@pytest.mark.parametrize("row", [row for _, row in messages("message", "of", "what to do")], ids=lambda row: row[0])
def test_a_message_of_another_program_is_marked_as_its(row: list[str]) -> None:
    message, owner, mend = row[0].strip("`"), row[1], row[2]
    assert owner
    assert mend
    for path in re.findall(r"`([\w/]+\.py)`", owner):
        package, _, inner = path.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            continue  # Triton is not installed everywhere
        source = Path(next(iter(spec.submodule_search_locations)), inner).read_text()
        texts = [found for node in ast.walk(ast.parse(source)) if (found := template(node))]
        assert any(occurs(message, " ".join(text.split())) for text in texts), f"{path} does not say {message!r}"


def test_troubleshooting_begins_with_the_doctor_and_quotes_enough() -> None:
    assert fenced(TROUBLE)[0].startswith("wmtp-ds doctor")
    assert len(messages("message", "what to do")) > 60
    assert not any(occurs("the moon is made of … cheese", text) for text in said_by_the_program())


# --- comparison ---


def test_every_claim_about_another_tool_has_a_source() -> None:
    page = DOCS / "comparison.md"
    text, sources = page.read_text().split("## Sources")
    listed = dict(re.findall(r"^- \[(\d+)\] (.*)$", sources, re.MULTILINE))
    cited = set(re.findall(r"\[(\d+)\]", text))
    assert cited == set(listed)
    for number, source in listed.items():
        files = re.findall(r"`([\w./-]+\.(?:py|md|json))` at `([0-9a-f]{7,40})`", source)
        address = re.search(r"\b(github\.com|huggingface\.co)/\S+", source)
        assert files or address, f"[{number}] names neither file and commit nor an address"
    titles = next(cells_of(line) for line in text.splitlines() if line.startswith("|"))
    [table] = tables_of(page, *titles)
    assert table[0][0] == "**wmtp-ds**"
    for tool, *cells in table[1:]:
        assert len(cells) == len(titles) - 1, tool
        for cell in cells:
            unsaid = cell in ("", "not looked at")
            assert unsaid or re.search(r"\[\d+\]", cell), f"{tool}: {cell!r} has no source"
