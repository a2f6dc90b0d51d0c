"""Data files with one thing wrong, and what is known to come of that."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_config import check_end
from hypothesis import strategies as st
from in_process import command

from wmtp_ds.data.index import build_index

DIGITS = "1" + "0" * 1_000_000
DEEP = "[" * 100_000


@dataclass(frozen=True)
class Data:
    """A file's bytes; ``bad`` is the number of the first line that is no row, or 0; ``rows`` are those there are."""

    what: str
    content: bytes
    bad: int = 0
    rows: tuple[dict[str, Any], ...] = ()


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda text: text.strip())


@st.composite
def a_row(draw: Any) -> dict[str, Any]:
    """A row as the format has it, of whatever texts."""
    row: dict[str, Any] = {
        "problem_id": draw(texts),
        "instruction": draw(texts),
        "output": draw(texts),
        "is_correct": draw(st.booleans()),
    }
    if draw(st.booleans()):
        row["input"] = draw(st.one_of(st.just(""), texts))
    if draw(st.booleans()):
        row["difficulty"] = draw(st.integers(1, 2**31 - 1))
    if draw(st.booleans()):
        values = st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), texts),
            lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
            max_leaves=6,
        )
        row["metadata"] = draw(st.dictionaries(texts, values, max_size=3))
    return row


def written(row: dict[str, Any], *, ascii_only: bool) -> bytes:
    return json.dumps(row, ensure_ascii=ascii_only).encode()


def _wrong_values(key: str) -> list[str]:
    """JSON that the key can never have."""
    always = [
        "[]",
        "[1]",
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "-Infinity",
        DIGITS,
        "-" + DIGITS,
        DEEP,
        "1" + "0" * 5000,
    ]
    if key == "is_correct":
        return [*always, "null", "0", "1", '"true"', "1.0", "{}"]
    if key == "difficulty":
        return [*always, "0", "-1", "1.5", "1e400", '"1"', "true", "{}", "2147483648", "1" + "0" * 400]
    if key == "metadata":
        return [*always, "1", '"a"', "true", '{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 2}', '{"a": ' + DEEP + "}"]
    wrong = [*always, "1", "true", "{}", '"\\ud800"', '"\\udfff\\ud800"']
    return (
        wrong if key == "input" else [*wrong, "null", *(['""', '" \\n "'] if key in ("problem_id", "output") else [])]
    )


@st.composite
def a_bad_line(draw: Any) -> tuple[str, bytes]:
    """A line that is no row."""
    row = draw(a_row())
    line = written(row, ascii_only=draw(st.booleans()))
    kind = draw(
        st.sampled_from(
            ["value", "value", "value", "cut", "bytes", "missing", "unknown", "twice", "junk", "not an object"]
        )
    )
    if kind == "value":
        key = draw(
            st.sampled_from(["problem_id", "instruction", "input", "output", "is_correct", "difficulty", "metadata"])
        )
        value = draw(st.sampled_from(_wrong_values(key)))
        rest = written({name: item for name, item in row.items() if name != key}, ascii_only=True).decode()
        return f"{key} = {value[:12]}", f'{rest[:-1]}, "{key}": {value}}}'.encode()
    if kind == "cut":
        return kind, line[: draw(st.integers(1, len(line) - 1))]
    if kind == "bytes":
        at = draw(st.integers(0, len(line)))
        junk = draw(st.sampled_from([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\0", b"\x1f\x8b\x08", b"\x01", b"\x0b"]))
        return kind, line[:at] + junk + line[at:] + b"\xff"
    if kind == "missing":
        del row[draw(st.sampled_from(["problem_id", "instruction", "output", "is_correct"]))]
        return kind, written(row, ascii_only=True)
    if kind == "unknown":
        key = draw(st.sampled_from(["outpt", "Output", "x", "", "\u202e", "a" * 10_000, "is_corect"]))
        return kind, written({**row, key: 1}, ascii_only=draw(st.booleans()))
    if kind == "twice":
        return kind, line[:-1] + b', "output": "again"}'
    if kind == "junk":
        junk = draw(st.sampled_from([b"x", b"{}", b",", b"\xef\xbb\xbf", b"]", b"1", b"//", line]))
        return kind, line + junk if draw(st.booleans()) or junk == line else junk + line
    other = [
        b"1",
        b"[]",
        b"null",
        b'"a"',
        b"true",
        DEEP.encode(),
        DIGITS.encode(),
        b"{",
        b"}",
        b"[{}]",
        b'{"a":' * 50_000,
    ]
    return kind, draw(st.sampled_from(other))


@st.composite
def data_files(draw: Any) -> Data:
    """A data file, good or bad in one line."""
    rows = draw(st.lists(a_row(), min_size=1, max_size=5))
    lines = [written(row, ascii_only=draw(st.booleans())) for row in rows]
    what, bad = "good", 0
    if draw(st.integers(0, 2)):
        at = draw(st.integers(0, len(lines)))
        what, line = draw(a_bad_line())
        lines.insert(at, line)
    blanks = 0
    spread: list[bytes] = []
    for number, line in enumerate(lines):
        while draw(st.integers(0, 4)) == 0:
            spread.append(draw(st.sampled_from([b"", b" ", b"\t", b"\r"])))
            blanks += 1
        if what != "good" and number == at:
            bad = len(spread) + 1
        spread.append(line)
    end = draw(st.sampled_from([b"\n", b"\r\n"]))
    content = end.join(spread) + draw(st.sampled_from([b"", end, end * 3]))
    return Data(what, content, bad, () if bad else tuple(rows))


# --- what must hold ---


def check_file(data: Data, file: Path) -> None:
    """`data stats` and `validate` refuse a bad file by its line, and a good one gives all of its rows, unchanged."""
    file.write_bytes(data.content)
    done = command("data", "stats", file, "--json")
    check_end(done)
    if data.bad:
        assert done.code == 2, f"{data.what} passed as rows"
        assert f"{file}:{data.bad}: " in done.err, (data.what, done.err[:500])
        assert len(done.err) < 2000
        return
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows"] == len(data.rows)
    index = build_index(file)
    for number, row in enumerate(data.rows):
        found = index.read_row(number)
        assert [found.problem_id, found.instruction, found.output, found.is_correct] == [
            row[key] for key in ("problem_id", "instruction", "output", "is_correct")
        ]
        assert found.metadata == row.get("metadata", {})
        assert (found.input, found.difficulty) == (row.get("input", ""), row.get("difficulty", 0))


# --- what stands where a file should ---

KINDS = (
    "folder",
    "pipe",
    "zero",
    "link to zero",
    "loop",
    "socket",
    "missing",
    "empty",
    "newlines",
    "long name",
    "dangling",
)


@contextmanager
def odd_thing(kind: str, place: Path) -> Iterator[Path]:
    """Put something that is no proper file at ``place``; a path where nothing can be put is given back instead."""
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "zero":
        place = Path("/dev/zero")
    elif kind == "link to zero":
        place.symlink_to("/dev/zero")
    elif kind == "loop":
        place.symlink_to(place.name)
    elif kind == "dangling":
        place.symlink_to("nothing")
    elif kind == "empty":
        place.write_bytes(b"")
    elif kind == "newlines":
        place.write_bytes(b"\n\r\n\n")
    elif kind == "long name":
        place = place.with_name("a" * 300)
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            here = os.getcwd()
            os.chdir(place.parent)  # a socket's name may have a hundred characters
            try:
                listener.bind(place.name)
            finally:
                os.chdir(here)
            yield place
    else:
        yield place


def remove(place: Path) -> None:
    """Make room for the next one."""
    if place.is_dir() and not place.is_symlink():
        place.rmdir()
    elif os.path.lexists(place):
        place.unlink()
