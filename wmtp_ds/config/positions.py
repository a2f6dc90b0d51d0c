"""Lines of keys: which line of a TOML or JSON file sets which key. Neither parser of the standard library tells.

Both functions read text that the real parser has accepted already, so they only have to follow its structure, not
to check it.
"""

import json
import re
import tomllib
from bisect import bisect_left
from collections.abc import Callable

Path = tuple[str | int, ...]

_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'  # a multi-line string may end in up to two quotes of its own
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_BLANK = re.compile(r"(?:\s|#[^\n]*)*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}#\n]+")


def _line_counter(text: str) -> Callable[[int], int]:
    """Tells the line, counted from 1, of a position in a text."""
    ends = [match.start() for match in re.finditer("\n", text)]
    return lambda position: bisect_left(ends, position) + 1


class _TomlReader:
    """Walks over a valid TOML document and notes the line of each key and of each item of an array."""

    def __init__(self, text: str):
        self.text = text
        self.at = 0
        self.lines: dict[Path, int] = {}
        self.arrays: dict[Path, int] = {}  # arrays of tables -> how many items so far
        self.line_of = _line_counter(text)

    def read(self) -> dict[Path, int]:
        table: Path = ()
        while self._skip_blank():
            if self._peek("[["):
                self.at += 2
                name = self._resolve(self._key())
                self._note(name)
                self.arrays[name] = self.arrays.get(name, -1) + 1
                table = (*name, self.arrays[name])
                self._note(table)
                self.at += 2
            elif self._peek("["):
                self.at += 1
                table = self._resolve(self._key())
                self._note(table)
                self.at += 1
            else:
                self._pair(table)
        return self.lines

    def _pair(self, table: Path) -> None:
        start = self.at
        key = self._key()
        for depth in range(1, len(key) + 1):
            self._note((*table, *key[:depth]), start)
        self.at += 1  # the equals sign
        self._value((*table, *key))

    def _resolve(self, name: Path) -> Path:
        """The table that a header means: it names the last item of an array of tables by the array's name."""
        found: Path = ()
        for part in name[:-1]:
            found = (*found, part)
            self._note(found)  # a table that only this header mentions
            if found in self.arrays:
                found = (*found, self.arrays[found])
        return (*found, *name[-1:])

    def _key(self) -> Path:
        parts: list[str] = []
        while True:
            self._skip_blank()
            if string := _STRING.match(self.text, self.at):
                parts.append(tomllib.loads(f"v = {string.group()}")["v"])
                self.at = string.end()
            else:
                bare = _BARE.match(self.text, self.at)
                assert bare, f"no key at character {self.at}"
                parts.append(bare.group())
                self.at = bare.end()
            self._skip_blank()
            if not self._peek("."):
                return tuple(parts)
            self.at += 1

    def _value(self, path: Path) -> None:
        self._skip_blank()
        if self._peek("["):
            self._items(path, "]")
        elif self._peek("{"):
            self._items(path, "}")
        elif string := _STRING.match(self.text, self.at):
            self.at = string.end()
        else:
            scalar = _SCALAR.match(self.text, self.at)
            assert scalar, f"no value at character {self.at}"
            self.at = scalar.end()

    def _items(self, path: Path, end: str) -> None:
        self.at += 1
        index = 0
        while self._skip_blank() and not self._peek(end):
            if end == "]":
                self._note((*path, index))
                self._value((*path, index))
                index += 1
            else:
                self._pair(path)
            self._skip_blank()
            if self._peek(","):
                self.at += 1
        self.at += 1

    def _note(self, path: Path, at: int | None = None) -> None:
        position = self.at if at is None else at
        self.lines.setdefault(path, self.line_of(position))

    def _peek(self, text: str) -> bool:
        return self.text.startswith(text, self.at)

    def _skip_blank(self) -> bool:
        blank = _BLANK.match(self.text, self.at)
        assert blank
        self.at = blank.end()
        return self.at < len(self.text)


def toml_lines(text: str) -> dict[Path, int]:
    """The line, counted from 1, of each key and each array item of a valid TOML document."""
    return _TomlReader(text.replace("\r\n", "\n")).read()


_JSON_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[{}\[\]:,]|[^\s{}\[\]:,"]+')


def json_lines(text: str) -> dict[Path, int]:
    """The line, counted from 1, of each key of a valid JSON document (keys below an array are left out)."""
    lines: dict[Path, int] = {}
    line_of = _line_counter(text)
    stack: list[str | None] = []  # the key under which each open object stands; None for an array
    key: str | None = None
    previous: re.Match[str] | None = None
    for token in _JSON_TOKEN.finditer(text):
        word = token.group()
        if word == ":":
            assert previous, "a colon follows a key"
            key = json.loads(previous.group())
            if None not in stack:
                path = (*[part for part in stack[1:] if part is not None], key)
                lines.setdefault(path, line_of(previous.start()))
        elif word == "{":
            stack.append(key or "")
        elif word == "[":
            stack.append(None)
        elif word in "}]":
            stack.pop()
        previous = token
    return lines
