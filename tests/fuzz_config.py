"""Near-valid configurations: the real ones with one thing changed, and what is known to come of that."""

import json
import os
import re
import string
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config_workspace import Workspace
from hypothesis import strategies as st
from in_process import Done, command

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = ("baseline", "critic", "verifiable", "rho1")

# Of DESIGN's table of fields, by hand: this is what the schema is compared with.
REQUIRED = {
    "experiment": ("name", "stage"),
    "models.policy": ("path",),
    "dataset": ("name", "train", "validation"),
    "training": ("n_epochs", "batch_size", "learning_rate"),
}
REQUIRED_OF = {
    "verifiable": ("beta", "value_coef", "weight_clip_min", "weight_clip_max"),
    "rho1": ("temperature", "k_percent"),
}
FREE_TABLES = ("tags", "difficulty_weights")
# No number of a configuration may be negative; these may not be 0 or above 1, either.
POSITIVE = (
    *("n_epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "value_lr"),
    *("log_interval", "eval_interval", "beta", "weight_clip_max", "temperature", "k_percent", "n_samples"),
    *("patience", "grad_norm_threshold", "grad_norm_window_size", "save_total_limit", "grad_norm_threshold_ratio"),
)
AT_MOST_1 = (
    *("learning_rate", "value_lr", "correct_ratio", "warmup_ratio", "td_lambda", "gamma", "gae_lambda", "k_percent"),
    "grad_norm_threshold_ratio",
)
_SETTING = re.compile(r"(?P<key>\w+) = (?P<value>.*?)(?P<comment>  #.*)?")
_HEADER = re.compile(r"\[+(?P<table>[\w.]+)\]+(  #.*)?")


@dataclass(frozen=True)
class Setting:
    """One line of a file: its number, counted from 1, the table, the dotted key, and the value as written."""

    line: int
    table: str
    key: str
    value: str

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def parsed(self) -> Any:
        return tomllib.loads(f"v = {self.value}")["v"]


@dataclass(frozen=True)
class Case:
    """A changed file.

    ``verdict``: "refused" (must be), "same" (must mean what it did), or "any". ``says``: each must be in the message.
    """

    what: str
    verdict: str
    content: bytes
    says: tuple[str, ...] = ()


def make_world(root: Path) -> Workspace:
    """The repository's own configurations, and tiny models, data and a critic at the places that they name."""
    world = Workspace(root)
    for folder in ("stage_configs", "stage_configs/local", "ds_configs"):
        for file in (REPOSITORY / folder).iterdir():
            if file.is_file():
                world.write(f"{folder}/{file.name}", file.read_text())
    for file in sorted(root.glob("stage_configs/**/*.toml")):
        config = tomllib.loads(file.read_text())
        for name, model in config.get("models", {}).items():
            if "path" in model:
                world.write_model(model["path"], heads=2 if name == "policy" else 1)
        if "train" in config.get("dataset", {}):
            world.write_rows(config["dataset"]["train"], 30)
            world.write_rows(config["dataset"]["validation"], 3)
        if critic := config["experiment"].get("critic_checkpoint"):
            world.write_critic(f"{critic}/value_head.safetensors", type="mlp")
            world.write(f"{Path(critic).parent}/run.json", "{}")
    world.write("circle.toml", 'extends = "run.toml"\n')
    world.write("empty.toml", "")
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to("loop")
    return world


def settings_of(text: str) -> list[Setting]:
    """The settings of a file of this project's own style, which has one on each line."""
    table, counts, found = "", {}, []
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.fullmatch(line):
            table = header["table"]
            if line.startswith("[["):
                counts[table] = counts.get(table, -1) + 1
                table = f"{table}[{counts[table]}]"
        elif setting := _SETTING.fullmatch(line):
            found.append(Setting(number, table, f"{table}.{setting['key']}".lstrip("."), setting["value"]))
    return found


def _with_line(text: str, line: int, new: str) -> str:
    lines = text.splitlines()
    lines[line - 1] = new
    return "\n".join(lines) + "\n"


def _set(text: str, setting: Setting, value: str) -> str:
    return _with_line(text, setting.line, f"{setting.name} = {value}")


def _near(a: str, b: str) -> bool:
    """Whether one edit (or one exchange of neighbours) makes one of the other."""
    if abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[start:], b[start:]
    swapped = rest_a[1:2] + rest_a[:1] + rest_a[2:] == rest_b
    return swapped or rest_a[1:] == rest_b[1:] or rest_a[1:] == rest_b or rest_a == rest_b[1:]


@st.composite
def misspelt(draw: Any, name: str) -> str:
    """A name with one edit."""
    place, letter = draw(st.integers(0, len(name) - 1)), draw(st.sampled_from(string.ascii_lowercase))
    forms = [
        name[:place] + name[place + 1 :],
        name[:place] + letter + name[place:],
        name[:place] + letter + name[place + 1 :],
        name[:place] + name[place + 1 : place + 2] + name[place] + name[place + 2 :],
    ]
    return draw(st.sampled_from([form for form in forms if form and form != name] or [name + letter]))


# --- what must be refused ---


def _other_types(value: Any) -> list[str]:
    """Values, in TOML, of types that a key which has this one can never take."""
    always = ["1979-05-27", "07:32:00", "[{ zz = 1 }]", "[[[]]]"]
    if isinstance(value, bool):
        return [*always, "1", "0", '"true"', "[true]"]
    if isinstance(value, int):
        return [*always, "1.5", '"1"', "true", "[1]", "{ a = 1 }"]
    if isinstance(value, float):
        return [*always, '"1.0"', "true", "[1.0]", "{ a = 1 }"]
    if isinstance(value, list):
        return [*always, "1", "true", '"a"', '["a", true]']
    return [*always, "1", "2.5", "true", "[1]"]


@st.composite
def wrong_type(draw: Any, file: str, text: str, found: list[Setting]) -> Case:
    setting = draw(
        st.sampled_from([s for s in found if not s.key.startswith("experiment.tags") and "${" not in s.value])
    )
    value = draw(st.sampled_from(_other_types(setting.parsed)))
    where = f"{file}:{setting.line}"
    return Case(f"{setting.key} = {value}", "refused", _set(text, setting, value).encode(), (setting.key, where))


@st.composite
def unknown_key(draw: Any, file: str, text: str, found: list[Setting]) -> Case:
    setting = draw(st.sampled_from([s for s in found if not s.table.endswith("difficulty_bins")]))
    known = {other.name for other in found}
    name = draw(misspelt(setting.name).filter(lambda name: name not in known | {"max_steps", "cache_dir", "path"}))
    lines = text.splitlines()
    lines.insert(setting.line, f"{name} = 1")
    where = f"{file}:{setting.line + 1}"
    case = f"{setting.table}.{name}"
    return Case(f"unknown {case}", "refused", ("\n".join(lines) + "\n").encode(), (case, where, "did you mean"))


@st.composite
def missing_key(draw: Any, file: str, text: str, found: list[Setting], stage: str) -> Case:
    keys = [f"{table}.{name}" for table, names in REQUIRED.items() for name in names]
    keys += [f"training.{name}" for name in REQUIRED_OF.get(stage, ())]
    keys += ["experiment.critic_checkpoint"] if stage == "verifiable" else []
    key = draw(st.sampled_from(keys))
    line = next(setting.line for setting in found if setting.key == key)
    return Case(f"without {key}", "refused", _with_line(text, line, "").encode(), (key, file, "required"))


@st.composite
def out_of_range(draw: Any, file: str, text: str, found: list[Setting]) -> Case:
    numbers = [s for s in found if type(s.parsed) in (int, float)]
    setting = draw(st.sampled_from(numbers))
    values = [
        "nan",
        "inf",
        "-inf",
        "+nan",
        "-1",
        "-0.5",
        "-1e300",
        "1e999",
        "-1e999",
        "1" + "0" * 400,
        "1" + "0" * 5000,
    ]
    values += ["0x" + "f" * 5000, "-9223372036854775809", "9223372036854775808"]
    values += ["0", "0.0", "-0.0"] if setting.name in POSITIVE else []
    values += ["1.0000001", "2", "1e308"] if setting.name in AT_MOST_1 else []
    value = draw(st.sampled_from(values))
    big = len(value) == 5001  # which no parser of Python's takes: there is no line then
    says = (file,) if big else (setting.key, f"{file}:{setting.line}")
    return Case(f"{setting.key} = {value[:30]}", "refused", _set(text, setting, value).encode(), says)


@st.composite
def wrong_structure(draw: Any, file: str, text: str, found: list[Setting]) -> Case:
    tables = sorted({s.table for s in found if "[" not in s.table})
    setting, table = draw(st.sampled_from(found)), draw(st.sampled_from(tables))
    kind = draw(st.sampled_from(["value for table", "array for table", "table for value", "key twice", "table twice"]))
    if kind.endswith("for table"):
        cut = re.sub(rf"^\[{re.escape(table)}\].*\n(?:(?!\[).*\n)*", "", text, count=1, flags=re.MULTILINE)
        value = "3" if kind == "value for table" else '["a"]'
        # Whatever lies in tables below it then stands against it.
        return Case(f"{table} = {value}", "refused", (f"{table} = {value}\n" + cut).encode(), (file,))
    if kind == "table for value":
        table = re.sub(r"\[[0-9]+\]", "", setting.key)
        new = _with_line(text, setting.line, "") + f"\n[{table}]\nzz = 1\n"
        return Case(f"[{setting.key}]", "refused", new.encode(), (file,))
    if kind == "key twice":
        lines = text.splitlines()
        lines.insert(setting.line, lines[setting.line - 1])
        return Case(f"{setting.key} twice", "refused", "\n".join(lines).encode(), (f"{file}:{setting.line + 1}",))
    return Case(f"[{table}] twice", "refused", (text + f"\n[{table}]\n").encode(), (file,))


_GARBAGE = [
    *("???", "key", "= 3", "[[[", "[a", 'x = "abc', "x = 'abc", "x = [1, 2", "x = {a = 1", "x = 1 2", "x = tru", "x ="),
    *(
        "x = 01",
        "x = 1__0",
        "x = 1.",
        "x = .5",
        "x = 2020-13-01",
        'x = "\\q"',
        'x = "\\ud800"',
        'x = "\\udfff"',
        "x y = 1",
    ),
    *(
        "x = \0",
        "\0",
        "x = '\x01'",
        "# \x07",
        "x = 'a\rb'",
        "\rx",
        'x = """',
        "x = '''",
        "\ufeffx = 1",
        "\u202ex = 1",
        "…",
    ),
    *(
        "x..y = 1",
        ".x = 1",
        "x. = 1",
        "[]",
        "[a.]",
        "[[a]",
        "[a]]",
        "x = {a = 1,\nb = 2",
        "x = 0b2",
        "x = 0xg",
        "é = 1",
    ),
]


@st.composite
def bad_syntax(draw: Any, file: str, text: str, found: list[Setting]) -> Case:
    lines = text.splitlines()
    place = draw(st.integers(0, len(lines)))
    garbage = draw(st.sampled_from(_GARBAGE))
    lines.insert(place, garbage)
    return Case(f"syntax {garbage!r}", "refused", "\n".join(lines).encode(), (file,))


@st.composite
def bad_bytes(draw: Any, file: str, text: str, found: list[Setting]) -> Case:
    content = text.encode()
    place = draw(st.integers(0, len(content)))
    junk = draw(st.sampled_from([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\x80", b"\xf4\x90\x80\x80", b"\0"]))
    return Case(f"bytes {junk!r}", "refused", content[:place] + junk + content[place:], (file,))


@st.composite
def bad_reference(draw: Any, file: str, text: str, found: list[Setting]) -> Case:
    texts = [s for s in found if isinstance(s.parsed, str) and s.name not in ("stage",)]
    setting = draw(st.sampled_from(texts))
    other = draw(st.sampled_from([s for s in texts if s != setting]))
    where = f"{file}:{setting.line}"
    kind = draw(st.sampled_from(["self", "nothing", "near", "open", "table", "pair", "malformed"]))
    if kind == "pair":
        new = _set(_set(text, setting, f'"${{{other.key}}}"'), other, f'"a${{{setting.key}}}"')
        return Case(f"{setting.key} <-> {other.key}", "refused", new.encode(), ("refers to itself", where))
    value, says = {
        "self": (f"x${{{setting.key}}}", "refers to itself"),
        "nothing": ("${zz.zz}", "not set"),
        "near": ("${experiment.nmae}", 'did you mean "experiment.name"'),
        "open": ("a${experiment.name", "without its '}'"),
        "table": ("${training}", "is a table"),
        "malformed": ("${a b}", "malformed"),
    }[kind]
    return Case(
        f"{setting.key}: {value}", "refused", _set(text, setting, f'"{value}"').encode(), (setting.key, where, says)
    )


@st.composite
def bad_extends(draw: Any, file: str, text: str, found: list[Setting]) -> Case:
    value, says = draw(
        st.sampled_from(
            [
                (f'"{Path(file).name}"', "circle"),
                ('"circle.toml"', "circle"),
                ('"nothing.toml"', "does not exist"),
                ('"."', "is a folder"),
                ('""', "must be a file's name"),
                ("3", "must be a file's name"),
                ('["a.toml"]', "must be a file's name"),
                ('"a\\u0000b"', "must be a file's name"),
                (f'"{"a" * 300}"', "cannot be read"),
                ('"pipe"', "pipe"),
                ('"/dev/zero"', "pipe"),
                ('"loop"', "symbolic links"),
                ('"empty.toml"', "is empty"),
            ]
        )
    )
    return Case(f"extends {value[:20]}", "refused", f"extends = {value}\n{text}".encode(), (says,))


@st.composite
def too_much(draw: Any, file: str, text: str, found: list[Setting]) -> Case:
    n = draw(st.sampled_from([10_000, 100_000]))
    lines = [f't{i} = "${{experiment.tags.t{i + 1}}}${{experiment.tags.t{i + 1}}}"' for i in range(40)]
    chain = [f't{i} = "${{experiment.tags.t{i + 1}}}"' for i in range(600)]
    form = draw(
        st.sampled_from(
            [
                "x = " + "[" * n,
                "x = " + "[" * n + "]" * n,
                "x = " + "{a=" * n + "1" + "}" * n,
                ".".join("a" * n) + " = 1",
                "[" + ".".join("a" * n) + "]",
                "x = {" + ".".join("a" * n) + " = 1}",
                "[" + ".".join("a" * 40) + "]\nb = 1",
                "x = " + "[" * 40 + "]" * 40,
                "#" * 2**20,
                'x = "' + "a" * 2**20 + '"',
                "x = 1" + "0" * n,
                "\n".join(f"k{i} = {i}" for i in range(n // 10)),
                "[experiment.tags]\n" + "\n".join([*lines, 't40 = ""']),
                "[experiment.tags]\n" + "\n".join([*lines, 't40 = "ab"']),
                "[experiment.tags]\n" + "\n".join([*chain, 't600 = "a"']),
                "[experiment.tags]\n" + "\n".join(f'{name} = "a"' for name in ("a", "a")),
                "y = " + json.dumps("://" * 100_000),
            ]
        )
    )
    body = re.sub(r"^tags = .*\n", "", text, flags=re.MULTILINE)
    return Case(
        f"too much: {form[:30]!r}", "refused", (body + "\n[zz]\n" * form.startswith("x") + form).encode(), (file,)
    )


# --- what must mean the same ---


@st.composite
def same_layout(draw: Any, file: str, text: str, found: list[Setting]) -> Case:
    """Comments, blank lines, white space, line ends, a byte order mark."""
    lines = []
    for line in text.splitlines():
        if draw(st.integers(0, 3)) == 0:
            lines.append(draw(st.sampled_from(["", "# x = [", "   # \u202e ünï 中 \U0001f600", "\t", "#"])))
        if _SETTING.fullmatch(line) and draw(st.booleans()):
            line = draw(st.sampled_from([" ", "\t", ""])) + line.replace(
                " = ", draw(st.sampled_from(["=", " =\t", "  =  "])), 1
            )
        lines.append(line)
    new = draw(st.sampled_from(["\n", "\r\n"])).join(lines) + draw(st.sampled_from(["", "\n", "\n\n# end"]))
    return Case("layout", "same", draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + new.encode())


def _spellings(value: Any) -> list[str]:
    if isinstance(value, bool | list | dict):
        return []
    if isinstance(value, int):
        return [f"+{value}", hex(value), oct(value), bin(value), *([f"{value:_}"] if value > 999 else [])]
    if isinstance(value, float):
        return [f"{value:.20e}", f"+{value!r}", f"{value:.30f}"] if value else ["0.0", "+0.0", "0e0"]
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in value)
    return [f'"{escaped}"', f"'{value}'", f'"""{value}"""', f"'''\n{value}'''", f'"""\\\n   {value}"""']


@st.composite
def same_spelling(draw: Any, file: str, text: str, found: list[Setting]) -> Case:
    """Values written in another way."""
    chosen = draw(st.lists(st.sampled_from([s for s in found if _spellings(s.parsed)]), min_size=1, max_size=6))
    new = text
    shift = 0
    for setting in sorted(set(chosen), key=lambda setting: setting.line):
        form = draw(st.sampled_from(_spellings(setting.parsed)))
        lines = new.splitlines()
        lines[setting.line - 1 + shift] = f"{setting.name} = {form}"
        shift += form.count("\n")
        new = "\n".join(lines) + "\n"
    return Case(f"spelling of {', '.join(s.key for s in chosen)}", "same", new.encode())


@st.composite
def same_order(draw: Any, file: str, text: str, found: list[Setting]) -> Case:
    """Tables, and keys within a table, in another order; or all of a table's keys dotted."""
    blocks = re.split(r"^(?=\[)", text, flags=re.MULTILINE)
    head, arrays = blocks[0], [block for block in blocks[1:] if block.startswith("[[")]
    tables = draw(st.permutations([block for block in blocks[1:] if not block.startswith("[[")]))
    shuffled = []
    for block in tables:
        first, *rest = block.splitlines()
        rest = [line for line in rest if _SETTING.fullmatch(line)]
        shuffled.append("\n".join([first, *draw(st.permutations(rest)), ""]))
    dotted = ""
    if draw(st.booleans()):
        place = draw(
            st.sampled_from([i for i, block in enumerate(shuffled) if "." not in block.splitlines()[0].split("#")[0]])
        )
        name = shuffled[place].splitlines()[0].split("#")[0].strip("[] ")
        below = any(block.startswith(f"[{name}.") for block in shuffled) or any(name in block[:60] for block in arrays)
        if not below:
            dotted = "".join(f"{name}.{line}\n" for line in shuffled.pop(place).splitlines()[1:] if line)
    return Case("order", "same", "".join([head, dotted, *(f"{block}\n" for block in shuffled), *arrays]).encode())


# --- anything ---


@st.composite
def anything(draw: Any, file: str, text: str, found: list[Setting]) -> Case:
    """Edits anywhere: only that it ends well is known."""
    content = text
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["delete", "insert", "replace", "copy"]))
        size = draw(st.sampled_from([1, 1, 2, 5, 40, 400]))
        piece = draw(
            st.one_of(
                st.text(max_size=5),
                st.sampled_from(
                    ['"', "'", "[", "]", "{", "}", "=", "#", "\n", ".", ",", "\\", "${", "}", "\0", "\r", "1", "-"]
                ),
                st.sampled_from(
                    ["\u202e", "\ufeff", "\u2028", "\x85", "é", "\U0001f600", "\\u0000", '"""', "nan", "inf"]
                ),
            )
        )
        if kind == "copy":
            start = draw(st.integers(0, len(content)))
            piece = content[start : start + size]
        content = (
            content[:at] + ("" if kind == "delete" else piece) + content[at + size * (kind in ("delete", "replace")) :]
        )
    return Case("anything", "any", content.encode("utf-8", "surrogatepass"))


REFUSED = (
    wrong_type,
    unknown_key,
    out_of_range,
    wrong_structure,
    bad_syntax,
    bad_bytes,
    bad_reference,
    bad_extends,
    too_much,
)
SAME = (same_layout, same_spelling, same_order)


@st.composite
def cases(draw: Any, stage: str, file: str, text: str) -> Case:
    """One change of a stage's configuration."""
    found = settings_of(text)
    kinds = [*REFUSED, *SAME, *SAME, anything, anything, anything, missing_key]
    kind = draw(st.sampled_from(kinds))
    return draw(kind(file, text, found, stage) if kind is missing_key else kind(file, text, found))


# --- DeepSpeed's JSON ---

_OWNED = (
    "train_batch_size",
    "gradient_clipping",
    "fp16",
    "bf16",
    "optimizer",
    "scheduler",
    "gradient_accumulation_steps",
)


@st.composite
def deepspeed_cases(draw: Any, file: str, text: str) -> Case:
    """One change of a DeepSpeed file that a configuration names."""
    values = json.loads(text)
    zero = values["zero_optimization"]
    numbers = [name for name, value in zero.items() if type(value) is int and name != "stage"]
    number = draw(st.sampled_from(numbers))
    bad_number = draw(
        st.sampled_from(["NaN", "Infinity", "-1", "1e999", '"auto"', '"1"', "true", "[]", "1.5", "1" + "0" * 400])
    )
    near = draw(misspelt(number))
    refused = {
        "number": text.replace(f'"{number}": {zero[number]}', f'"{number}": {bad_number}'),
        "flag": text.replace('"overlap_comm": ', '"overlap_comm": 5, "_": '),
        "near": text.replace(f'"{number}": ', f'"{near}": '),
        "twice": text.replace(f'"{number}": ', f'"{number}": 1, "{number}": '),
        "owned": text.replace("{", f'{{"{draw(st.sampled_from(_OWNED))}": 1, ', 1),
        "stage": text.replace(
            '"stage": 3', f'"stage": {draw(st.sampled_from(["2", "0", "4", "true", "null", "[3]", "-3"]))}'
        ),
        "surrogate": text.replace("{", '{"\\ud800": 1, ', 1),
        "direction": text.replace("{", '{"\u202e": 1, ', 1),
        "section": json.dumps(draw(st.sampled_from([[], 1, None, "a", {}, {"zero_optimization": 3}]))),
        "cut": text[: draw(st.integers(0, len(text) - 3))],
        "bytes": text + "\0",
        "nested": text.replace("{", '{"aio": ' + draw(st.sampled_from(["[" * 100_000, "[" * 40 + "]" * 40])) + ", ", 1),
        "digits": text.replace("{", '{"aio": 1' + "0" * draw(st.sampled_from([5000, 1_000_000])) + ", ", 1),
        "long": text + " " * 2**20,
        "many": text.replace("{", "{" + "".join(f'"k{i}": 1, ' for i in range(20_000)), 1),
    }
    same = {
        "compact": json.dumps(values),
        "order": json.dumps({**values, "zero_optimization": dict(draw(st.permutations(list(zero.items()))))}),
        "layout": text.replace("\n", "\r\n"),
        "mark": "\ufeff" + text,
        "floats": text.replace(f": {zero[number]}", f": {zero[number]}.0"),
    }
    what = draw(st.sampled_from([*refused, *same]))
    if what in same:
        return Case(what, "same", same[what].encode())
    content = refused[what]
    if content == text:  # a file without that key
        return Case(what, "same", content.encode())
    return Case(what, "refused", content.encode(), (file, "deepspeed.config"))


# --- what must hold ---

_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def check_end(done: Done, *says: str) -> None:
    """Exit code 0 or 2, and nothing on a terminal but what can be read."""
    assert done.code in (0, 2), done
    assert "Traceback" not in done.err
    assert done.code == 0 or re.search("^(error|Usage): ", done.err, re.MULTILINE), done.err[:500]
    assert not _ODD.search(done.err), ascii(done.err[:500])
    for text in says:
        assert text in done.err, f"{text!r} is not in: {done.err[:1000]}"


def meaning(file: str) -> Any:
    """What ``show`` prints of a configuration's values."""
    done = command("show", file, "--json")
    assert done.code == 0, done.err[:1000]
    return json.loads(done.out)["config"]


def check_case(world: Workspace, file: str, case: Case, before: Any) -> bool:
    """Check what is known of a case, and that what validates can be printed and means the same again.

    Returns:
        whether it was valid.
    """
    world.path(file).write_bytes(case.content)
    done = command("validate", file)
    check_end(done, *case.says)
    if case.verdict == "refused":
        assert done.code == 2, f"{case.what} passed as valid"
    if case.verdict == "same":
        assert done.code == 0, f"{case.what}: {done.err[:1000]}"
    if done.code == 0:
        now = meaning(file)
        assert case.verdict != "same" or now == before, case.what
        check_prints(world, file, now)
    return done.code == 0


def check_prints(world: Workspace, file: str, now: Any, *options: str, environ: dict[str, str] | None = None) -> None:
    """What `show` prints as TOML is valid and means the same (but for masked passwords)."""
    printed = command("show", file, *options, environ=environ)
    assert printed.code == 0, printed.err
    if "***" not in printed.out:
        world.write("printed.toml", printed.out)
        assert command("validate", "printed.toml").code == 0, printed.out
        assert meaning("printed.toml") == now


# --- variables and overrides ---

VALUES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "1", "-1", "1.5", "nan", "inf", "true", "2024-01-01", "'", '"', "\udc80", "9" * 400, "9" * 5000]
    ),
    st.sampled_from(
        ["0x" + "f" * 5000, "1e400", "-0", "1_0", "[]", "[[]]", "[0.0, 1.0]", "{}", "{a=1}", '{"a": null}']
    ),
    st.sampled_from(
        [
            '["\\ud800"]',
            '{"\\ud800": 1}',
            '"\\ud800"',
            "[" * 50_000,
            "{" + "a." * 20_000 + "a = 1}",
            "[" * 40 + "]" * 40,
        ]
    ),
    st.sampled_from(
        ["${experiment.name}", "${", "${training}", "${dataset.name}", "~/x", "/", "runs:/a/b", "http://[", "\u202e"]
    ),
    st.sampled_from(
        ["mlflow://1/2/artifacts/..", "../../../x", "file:x", "a\nb", "a\rb", "\x1b[2J", "\x7f", "a" * 5000]
    ),
    st.integers().map(str),
    st.floats().map(str),
)


def overrides(keys: list[str]) -> st.SearchStrategy[str]:
    """What may follow ``--override``, of any form."""
    key = st.sampled_from(keys)
    odd = st.sampled_from(
        ["", ".", "a..b", "a[", "a[0", "a[x]", "a[-1]", "a[99999999999]", ".".join("a" * 5000), "a" * 5000, "é", "a\nb"]
    )
    return st.one_of(
        st.text(max_size=16),
        st.builds("{}={}".format, st.one_of(key, key, odd, st.text(max_size=10)), VALUES),
        st.builds("{}[{}]={}".format, key, st.integers(0, 3), VALUES),
        st.builds("{}.{}={}".format, key, st.sampled_from(["x", "0", "low", "a.b.c"]), VALUES),
        st.builds("{}={}".format, key.flatmap(misspelt), VALUES),
    ).filter(lambda text: "\0" not in text)


def variables(keys: list[str]) -> st.SearchStrategy[dict[str, str]]:
    """``WMTP_*`` variables, of any form."""
    names = st.one_of(
        st.sampled_from(keys).map(lambda key: key.replace("[", ".").replace("]", "").replace(".", "__").upper()),
        st.text(string.ascii_uppercase + "_0", max_size=12),
        st.sampled_from(["A__" * 5000 + "A", "__", "TRAINING", "TRAINING__", "__TRAINING", "KERNELS", "é"]),
    )
    return st.dictionaries(
        names.map(lambda name: f"WMTP_{name}"), VALUES.filter(lambda text: "\0" not in text), max_size=3
    )
