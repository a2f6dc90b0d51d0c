"""Lines of keys, against documents whose lines are known because the test wrote them."""

import json
import tomllib

from hypothesis import given
from hypothesis import strategies as st

from wmtp_ds.config.positions import json_lines, toml_lines
from wmtp_ds.config.toml_writer import format_name, format_value

NAMES = st.one_of(st.sampled_from(["a", "b1", "c-d", "0", "true"]), st.text(max_size=4))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.one_of(st.booleans(), st.integers(-(10**6), 10**6), st.floats(allow_nan=False), TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)
TABLES = st.dictionaries(NAMES, VALUES, max_size=4)


class Writer:
    """Writes TOML in many styles and remembers on which line each key and array item stands."""

    def __init__(self, draw):
        self.draw = draw
        self.text = ""
        self.lines = {}

    def line(self, path):
        self.lines.setdefault(path, self.text.count("\n") + 1)

    def noise(self):
        self.text += self.draw(st.sampled_from(["", "\n", "  \n", "# [x] = { \" ''' \n", "\n\n"]))

    def gap(self):
        self.text += self.draw(st.sampled_from(["", " ", "\n  ", " # ], } \n"]))

    def value(self, path, value, inline=False):
        if isinstance(value, dict):
            self.text += "{ "
            for index, (name, item) in enumerate(value.items()):
                self.text += ", " if index else ""
                self.pair(path, name, item, inline=True)
            self.text += " }"
        elif isinstance(value, list):
            self.text += "["
            for index, item in enumerate(value):
                if not inline:
                    self.gap()
                self.line((*path, index))
                self.value((*path, index), item, inline)
                self.text += ","
            self.text += "]"
        elif isinstance(value, str) and not inline and self.draw(st.booleans()):
            body = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")[1:-1]
            self.text += f'"""\n{body}\n"\n"""' if self.draw(st.booleans()) else f'"""{body}"""'
        elif isinstance(value, str) and value.isalnum() and self.draw(st.booleans()):
            self.text += f"'{value}'"
        else:
            self.text += format_value(value)

    def pair(self, path, name, value, inline=False):
        self.line((*path, name))
        self.text += format_name(name)
        if isinstance(value, dict) and len(value) == 1 and self.draw(st.booleans()):  # a dotted key
            ((inner, item),) = value.items()
            self.line((*path, name, inner))
            self.text += f" . {format_name(inner)} = "
            self.value((*path, name, inner), item, inline)
        else:
            self.text += " = "
            self.value((*path, name), value, inline)

    def table(self, path, values):
        for name, value in values.items():
            self.noise()
            self.pair(path, name, value)
            self.text += self.draw(st.sampled_from(["\n", "  # comment = 1\n"]))


@st.composite
def documents(draw):
    writer = Writer(draw)
    writer.table((), {f"x{name}": value for name, value in draw(TABLES).items()})
    for name in draw(st.lists(NAMES, max_size=3, unique=True)):
        writer.noise()
        path = (f"t{name}",)
        if draw(st.booleans()):
            for index in range(draw(st.integers(1, 3))):
                writer.line(path)
                writer.line((*path, index))
                writer.text += f"[[{format_name(path[0])}]]\n"
                writer.table((*path, index), draw(TABLES))
                if draw(st.booleans()):
                    writer.line((*path, index, "sub table"))
                    writer.text += f'[{format_name(path[0])}."sub table"]\n'
                    writer.table((*path, index, "sub table"), draw(TABLES) | {"last": 1})
        else:
            writer.line(path)
            writer.text += f"[ {format_name(path[0])} ] # [y]\n"
            writer.table(path, draw(TABLES))
    return writer.text, writer.lines


def paths(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths(item, (*path, key))


@given(documents())
def test_every_key_of_a_toml_document_is_found_on_its_line(document):
    text, expected = document
    parsed = tomllib.loads(text)  # the writer has written TOML
    found = toml_lines(text)
    assert set(found) == set(paths(parsed))
    assert {path: found[path] for path in expected} == expected
    assert toml_lines(text.replace("\n", "\r\n")) == found


def test_a_few_documents_by_hand():
    text = 'a.b = 1 # x\n\n[t."x y"]\n\'k\' = """\n[z]\nq = 1\n""""\nd = 1979-05-27 07:32:00\n'
    text += "[[l]]\n[[l.m]]\nv = {w = [1,\n2]}\n"
    assert toml_lines(text) == {
        ("a",): 1,
        ("a", "b"): 1,
        ("t",): 3,
        ("t", "x y"): 3,
        ("t", "x y", "k"): 4,
        ("t", "x y", "d"): 8,
        ("l",): 9,
        ("l", 0): 9,
        ("l", 0, "m"): 10,
        ("l", 0, "m", 0): 10,
        ("l", 0, "m", 0, "v"): 11,
        ("l", 0, "m", 0, "v", "w"): 11,
        ("l", 0, "m", 0, "v", "w", 0): 11,
        ("l", 0, "m", 0, "v", "w", 1): 12,
    }


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=4))
def test_keys_of_a_json_document_are_found_in_order_on_their_lines(values):
    text = json.dumps(values, indent=1)
    found = json_lines(text)
    objects = {path for path in paths(values) if not any(isinstance(part, int) for part in path)}
    assert set(found) == objects
    rows = text.split("\n")  # with an indent, every key has a line of its own
    for path, line in found.items():
        assert rows[line - 1].startswith(" " * len(path) + json.dumps(path[-1]) + ":")
    assert len(set(found.values())) == len(found)


@given(st.dictionaries(NAMES, VALUES, max_size=5))
def test_what_the_writer_writes_the_standard_library_reads(values):
    text = "".join(f"{format_name(name)} = {format_value(value)}\n" for name, value in values.items())
    assert tomllib.loads(text) == values
