"""Kinds of tokens, also of solutions that are no Python."""

import pytest

from wmtp_ds.look.kinds import KINDS, kinds_of


def spans_of(text: str, parts: list[str]) -> list[tuple[int, int]]:
    spans, place = [], 0
    for part in parts:
        begin = text.index(part, place)
        spans.append((begin, begin + len(part)))
        place = begin + len(part)
    return spans


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["def", " f", "(", "x", "):"], ["keyword", "name", "operator", "name", "operator"]),
        (["\n", "    ", "return", " 12", "."], ["white space", "indentation", "keyword", "number", "number"]),
        (["if", " x", " in", " (", "1", ",)"], ["keyword", "name", "keyword", "operator", "number", "operator"]),
        (["s", " =", ' "a', ' b"', "  # ", "note"], ["name", "operator", "string", "string", "comment", "comment"]),
        (["x", "\n        ", "y"], ["name", "indentation", "name"]),
        (["x", "   ", "\n"], ["name", "white space", "white space"]),
        (["a", " ", "b"], ["name", "white space", "name"]),
        (["x\n", "    ", "\n", "y"], ["name", "white space", "white space", "name"]),
        (["x\n", "    "], ["name", "white space"]),
        (["def", " ((", " $", " ?"], ["keyword", "operator", "other", "other"]),
    ],
)
def test_kinds(parts: list[str], expected: list[str]) -> None:
    text = "".join(parts)
    assert kinds_of(text, spans_of(text, parts)) == expected
    assert set(expected) <= set(KINDS)


def test_the_end() -> None:
    assert kinds_of("x", [(0, 1), (1, 1)]) == ["name", "end"]
    assert kinds_of("", [(0, 0)]) == ["end"]
    assert kinds_of("x", [(0, 0), (0, 1), (1, 1)]) == ["other", "name", "end"], "a token of no character"
