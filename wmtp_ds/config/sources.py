"""Where layers come from: TOML files and the file that each extends, ``WMTP_*`` variables, ``--override``."""

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wmtp_ds.config.errors import Origin, Problem
from wmtp_ds.config.keys import MOST_PARTS, KeyPath, as_part, declared_at, format_key, parse_key
from wmtp_ds.config.positions import toml_lines
from wmtp_ds.config.schema import RunConfig
from wmtp_ds.files import read_bytes
from wmtp_ds.masking import mask_urls

# Variables that begin like ours and belong to another part of the program, with the values that they may have.
OTHER_VARIABLES = {"WMTP_KERNELS": ("", "torch", "triton")}

_PREFIX = str(RunConfig.model_config["env_prefix"])
_DELIMITER = str(RunConfig.model_config["env_nested_delimiter"])
_TOML_POSITION = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
_TABLE = re.compile(r"\s*\[")
_NOT_THERE = "does not exist"
_EXAMPLE = "--override training.learning_rate=1e-5"
# More than any config has, and little enough that whatever it says is answered at once.
_MOST_BYTES, _MOST_VALUES = 2**20, 5000
_ENDLESS_KEY = re.compile(
    rf"""(?<![A-Za-z0-9_-])(?:(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){{{MOST_PARTS}}}"""
)


@dataclass
class FileLayer:
    """One TOML file: its values, and the line of each."""

    path: Path
    layer: Literal["file", "extends"]
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def origin(self, key: KeyPath) -> Origin:
        """The file and the line that set a key, or the value which holds it."""
        for length in range(len(key), 0, -1):
            if line := self.lines.get(key[:length]):
                return Origin(self.layer, f"{self.path}:{line}")
        return Origin(self.layer, str(self.path))


@dataclass(frozen=True)
class Assignment:
    """One value from a variable or an override."""

    path: KeyPath
    value: Any
    origin: Origin


def read_files(path: Path) -> tuple[list[FileLayer], list[Problem]]:
    """Read a config file and what it extends, lowest layer first."""
    files: list[FileLayer] = []
    problems: list[Problem] = []
    seen: list[str] = []
    layer: Literal["file", "extends"] = "file"
    asked: Problem | None = None  # what to say if the next file is not there
    while True:
        seen.append(os.path.realpath(path))
        found = FileLayer(path, layer)
        problem = _read_toml(found)
        if problem:
            problems.append(asked if asked and problem.message == _NOT_THERE else problem)
            break
        files.insert(0, found)
        base = found.values.pop("extends", None)
        if base is None:
            break
        where = str(found.origin(("extends",)))
        if not isinstance(base, str) or not base or "\0" in base:
            mend = 'name one file, relative to this one: extends = "../critic.toml"'
            problems.append(Problem("extends", where, f"must be a file's name, not {base!r}", mend))
            break
        following = Path(os.path.normpath(path.parent / base))
        if os.path.realpath(following) in seen:
            circle = " -> ".join([*(str(file.path) for file in reversed(files)), str(following)])
            mend = "remove one of these `extends`"
            problems.append(Problem("extends", where, f"the files extend each other in a circle: {circle}", mend))
            break
        asked = Problem("extends", where, f"{following} does not exist", "the name is relative to this file")
        path, layer = following, "extends"
    return files, problems


def _read_toml(file: FileLayer) -> Problem | None:
    """Fill a layer from its file, or say why not."""
    name = str(file.path)
    if os.path.isdir(file.path):
        inside = sorted(item.name for item in file.path.glob("*.toml"))
        return Problem(
            "",
            name,
            "is a folder, not a config file",
            f"name one of its files: {', '.join(inside)}" if inside else "",
        )
    try:
        text = read_bytes(file.path, _MOST_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        beside = sorted(str(item) for item in file.path.parent.glob("*.toml")) if file.path.name else []
        mend = f"there are: {', '.join(beside)}" if beside else "the configs lie in stage_configs/"
        return Problem("", name, _NOT_THERE, mend)
    except UnicodeDecodeError as error:
        return Problem(
            "", name, f"is not UTF-8 text (byte {error.start + 1})", "a config is a TOML file saved as UTF-8"
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return Problem("", name, f"cannot be read: {reason}", "check the file's name and its permissions")
    try:
        file.values = _parse_toml(text)
    except tomllib.TOMLDecodeError as error:
        return _syntax_problem(name, text, error)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets without end
        return Problem("", name, f"is not usable TOML: {str(error).splitlines()[0]}", "simplify the value")
    if what := excess(file.values):
        return Problem("", name, f"is no config: {what}", "start from a copy of a config in stage_configs/")
    if not file.values:
        return Problem("", name, "is empty", "start from a copy of a config in stage_configs/")
    file.lines = toml_lines(text)
    return None


def _parse_toml(text: str) -> dict[str, Any]:
    """As `tomllib.loads`, which takes hours over a key of a hundred thousand parts.

    Raises:
        ValueError: it is no TOML, or holds an integer of thousands of digits.
        RecursionError: it holds brackets without end.
    """
    if _ENDLESS_KEY.search(text):
        raise ValueError(f"a key has more than {MOST_PARTS} parts")
    return tomllib.loads(text)


def excess(value: Any) -> str:
    """What a table or list has more of than a config can need; "" where it has not."""
    level, count, depth = [value], 0, 0
    while level:
        depth += 1
        count += sum(map(len, level))
        if depth > MOST_PARTS or count > _MOST_VALUES:
            return f"more than {MOST_PARTS} levels" if depth > MOST_PARTS else f"more than {_MOST_VALUES} values"
        items = (item for held in level for item in (held.values() if isinstance(held, dict) else held))
        level = [item for item in items if isinstance(item, dict | list)]
    return ""


def _syntax_problem(name: str, text: str, error: tomllib.TOMLDecodeError) -> Problem:
    message = str(error)
    position = _TOML_POSITION.search(message)
    line = int(position[1]) if position and position[1] else text.rstrip().count("\n") + 1
    column = f", column {position[2]}" if position and position[2] else ""
    what = _TOML_POSITION.sub("", message)[:200]
    lines = text.split("\n")
    shown = mask_urls(lines[line - 1].strip())[:120] if line <= len(lines) else ""
    mend = f"look at line {line}{column}: {shown}" if shown else "correct the file's syntax"
    return Problem("", f"{name}:{line}", f"is not TOML: {what}", f"{mend} (texts need quotes, lists commas)")


def read_environment(environ: Mapping[str, str]) -> tuple[list[Assignment], list[Problem]]:
    """The ``WMTP_*`` variables, sorted by name so that a table comes before its keys."""
    assignments: list[Assignment] = []
    problems: list[Problem] = []
    for name in sorted(environ):
        if not name.startswith(_PREFIX):
            continue
        origin = Origin("environment", f"environment variable {name}")
        if name in OTHER_VARIABLES:
            if environ[name] not in OTHER_VARIABLES[name]:
                allowed = " or ".join(value for value in OTHER_VARIABLES[name] if value)
                message = f"must be {allowed}, not {environ[name]!r}"
                problems.append(Problem("", str(origin), message, "set one of them, or unset the variable"))
            continue
        parts = name.removeprefix(_PREFIX).lower().split(_DELIMITER)
        problem = None
        if not all(parts) or len(parts) > MOST_PARTS or not _is_text(name):
            mend = f"name a key, as in {_PREFIX}TRAINING{_DELIMITER}LEARNING_RATE, or unset the variable"
            problem = Problem(format_key(part for part in parts if part), str(origin), "names no key", mend)
        elif not _is_text(environ[name]):
            problem = Problem(format_key(parts), str(origin), "is not UTF-8 text", "set it to readable text")
        if problem:
            problems.append(problem)
            continue
        path: KeyPath = ()
        for part in parts:
            path = (*path, as_part(part, path))
        assignments.append(Assignment(path, parse_value(environ[name], path), origin))
    return assignments, problems


def read_overrides(overrides: Sequence[str]) -> tuple[list[Assignment], list[Problem]]:
    """What follows each ``--override``, in the order given."""
    assignments: list[Assignment] = []
    problems: list[Problem] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        shown = text if _is_text(text) else ascii(text)
        origin = Origin("override", f"--override {mask_urls(shown)}")
        path = parse_key(key)
        if not equals:
            name = format_key(path) if path else ""
            problems.append(Problem(name, str(origin), "has no '='", f"write key=value, as in {_EXAMPLE}"))
        elif path is None:
            message = f"{key!a} is not a key" if key else "names no key"
            mend = f"a key is dotted, list items have brackets: {_EXAMPLE} or data_sampling.curriculum_schedule[0]..."
            problems.append(Problem("", str(origin), message, mend))
        elif not _is_text(text):
            problems.append(Problem(format_key(path), str(origin), "is not UTF-8 text", "give readable text"))
        else:
            assignments.append(Assignment(path, parse_value(value, path), origin))
    return assignments, problems


def parse_value(text: str, path: KeyPath) -> Any:
    """The value that a variable or an override gives: as TOML, or as it stands where the schema wants text.

    What is neither stays text, and the schema says what should have been there.
    """
    declared = declared_at(path)
    text = text.strip()
    if declared and declared.is_text and not text.startswith(('"', "'")):
        return text
    if "\n" not in text and "\r" not in text:
        try:
            return _bounded(_parse_toml(f"value = {text}")["value"])
        except (ValueError, RecursionError):
            pass
    try:
        if text.startswith(("{", "[", '"')):
            return _bounded(json.loads(text))
        # Python's spelling of numbers, as in .5
        return float(text) if re.fullmatch(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?", text, re.ASCII) else text
    except (ValueError, RecursionError):
        return text


def _bounded(value: Any) -> Any:
    """The value.

    Raises:
        ValueError: it is nested beyond all need, or holds half a surrogate pair, which is no text.
    """
    if isinstance(value, dict | list) and (what := excess(value)):
        raise ValueError(what)
    json.dumps(value, ensure_ascii=False, default=str).encode()
    return value


def _is_text(text: str) -> bool:
    """Whether the text can be written: arguments and variables may hold bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
