"""Makes rows of JSON objects that have other names for things: ``output=solution``, ``problem_id=task.id``."""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wmtp_ds.data.labels import FunctionTests, plan_checks
from wmtp_ds.errors import UserError

TARGETS = (
    "problem_id",
    "instruction",
    "input",
    "output",
    "is_correct",
    "difficulty",
    "tests",
    "test_setup",
    "metadata",
)
TRUE = ("true", "yes", "y", "1", "pass", "passed", "correct", "accepted", "ok")
FALSE = ("false", "no", "n", "0", "fail", "failed", "incorrect", "wrong", "rejected")

_MISSING = object()


class UnfitError(Exception):
    """An object of which no row can be made. ``reason`` is what such lines are counted by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Mapped:
    """A row, the tests of its problem if it has any, and the targets that were found in the object."""

    row: dict[str, Any]
    tests: dict[str, Any] | None
    found: frozenset[str]


@dataclass(frozen=True)
class FieldMapping:
    """Where the parts of a row come from.

    Attributes:
        paths: target -> dotted path in the object. A target that is not named comes from the key of its own name.
        constants: target -> value.
        id_from: parts of the row of whose texts ``problem_id`` is the hash; empty where the data has one.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    id_from: tuple[str, ...] = ()

    def apply(self, record: Mapping[str, Any]) -> Mapped:
        """Make a row.

        Raises:
            UnfitError: a part is missing, or is not what it must be.
        """
        found = {target: value for target in self._targets() if (value := self._get(record, target)) is not _MISSING}
        output = found.get("output")
        if not isinstance(output, str) or not output.strip():
            raise UnfitError("rows_without_output", f"{self._name('output')} must be a text that is not empty")
        row: dict[str, Any] = {"instruction": self._text(found, "instruction")}
        if found.get("input") is not None:
            row["input"] = self._text(found, "input")
        own_id = self._problem_id(found, row)
        row = {"problem_id": own_id, **row, "output": output, "is_correct": self._is_correct(found)}
        difficulty = self._difficulty(found)
        if difficulty:
            row["difficulty"] = difficulty
        row["metadata"] = self._metadata(found, row["is_correct"])
        return Mapped(row, self._tests(found), frozenset(found))

    def _targets(self) -> list[str]:
        return list(dict.fromkeys([*TARGETS, *self.paths, *self.constants]))

    def _get(self, record: Mapping[str, Any], target: str) -> Any:
        if target in self.constants:
            return self.constants[target]
        if "." in target and target not in self.paths:
            return _MISSING
        return look_up(record, self.paths.get(target, target))

    def _name(self, target: str) -> str:
        """A target and where it comes from, for messages."""
        path = self.paths.get(target, target)
        return f'"{target}"' if path == target else f'"{target}" (from {path})'

    def _text(self, found: Mapping[str, Any], target: str) -> str:
        value = found.get(target)
        if not isinstance(value, str):
            what = "is missing" if value is None else f"must be a text, not {_show(value)}"
            raise UnfitError("rows_unfit", f"{self._name(target)} {what}")
        return value

    def _problem_id(self, found: Mapping[str, Any], row: Mapping[str, Any]) -> str:
        if self.id_from:
            text = "\0".join(" ".join(row.get(part, "").split()) for part in self.id_from)
            return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        value = found.get("problem_id")
        if type(value) is int:
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise UnfitError(
                "rows_unfit",
                f"{self._name('problem_id')} must be a text or a whole number; --id-from instruction makes one",
            )
        return value

    def _is_correct(self, found: Mapping[str, Any]) -> bool:
        value = found.get("is_correct")
        text = str(value).strip().lower() if isinstance(value, (bool, int, str)) else ""
        if text in TRUE or text in FALSE:
            return text in TRUE
        raise UnfitError(
            "rows_unfit",
            f"{self._name('is_correct')} {'is missing' if value is None else f'says neither: {_show(value)}'}; "
            f"yes is {', '.join(TRUE)}; no is {', '.join(FALSE)}",
        )

    def _difficulty(self, found: Mapping[str, Any]) -> int:
        value = found.get("difficulty")
        if value in (None, ""):
            return 0
        try:
            number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else 0.5
        except (ValueError, OverflowError):
            number = 0.5
        if number < 0 or not number.is_integer():
            raise UnfitError(
                "rows_unfit", f"{self._name('difficulty')} must be a whole number of at least 1, not {_show(value)}"
            )
        return int(number)

    def _metadata(self, found: Mapping[str, Any], is_correct: bool) -> dict[str, Any]:
        whole = found.get("metadata")
        if whole is not None and not isinstance(whole, dict):
            raise UnfitError("rows_unfit", f"{self._name('metadata')} must be an object, not {_show(whole)}")
        told: dict[str, Any] = {"source": "jsonl"}
        if "is_correct" not in self.constants:
            told["source_label"] = is_correct
        parts = {target.partition(".")[2]: value for target, value in found.items() if "." in target}
        return {**told, **(whole or {}), **parts}

    def _tests(self, found: Mapping[str, Any]) -> dict[str, Any] | None:
        value = found.get("tests")
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = [value]
        if not value:
            return None
        setup = found.get("test_setup") or ""
        if not isinstance(setup, str):
            raise UnfitError("rows_unfit", f"{self._name('test_setup')} must be a text, not {_show(setup)}")
        try:
            return read_tests(value, setup)
        except ValueError as error:
            raise UnfitError("rows_unfit", f"{self._name('tests')} {error}") from None


def read_tests(value: Any, setup: str = "") -> dict[str, Any]:
    """Tests in any of the usual forms, as problems.jsonl has them.

    Args:
        value: a list of asserts; a list of [stdin, stdout]; or an object with the lists ``input`` and ``output``
            (or ``inputs`` and ``outputs``).
        setup: code that runs before the asserts.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        plan_checks(FunctionTests(tuple(value), setup))
        return {"kind": "function", "asserts": value, "setup": setup}
    cases = value
    if isinstance(value, dict):
        inputs, outputs = (value.get(name, value.get(f"{name}s")) for name in ("input", "output"))
        if isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs):
            cases = list(zip(inputs, outputs, strict=True))
    if (
        isinstance(cases, list)
        and cases
        and all(
            isinstance(case, (list, tuple)) and len(case) == 2 and all(isinstance(side, str) for side in case)
            for case in cases
        )
    ):
        return {"kind": "stdio", "cases": [list(case) for case in cases]}
    raise ValueError("must be a list of asserts, a list of [stdin, stdout], or lists of input and output")


def look_up(record: Any, path: str) -> Any:
    """What stands at a dotted path; numbers count a list's items from 0. A key may itself contain the dots."""
    if isinstance(record, Mapping) and path in record:
        return record[path]
    at = record
    for part in path.split("."):
        if isinstance(at, Mapping) and part in at:
            at = at[part]
        elif isinstance(at, list) and part.isdecimal() and int(part) < len(at):
            at = at[int(part)]
        else:
            return _MISSING
    return at


def parse_mapping(maps: Sequence[str], sets: Sequence[str], id_from: Sequence[str]) -> FieldMapping:
    """Read the options ``--map TARGET=PATH``, ``--set TARGET=VALUE`` and ``--id-from PART``.

    Raises:
        UserError: one of them is wrong.
    """
    paths: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for option, texts in (("--map", maps), ("--set", sets)):
        for text in texts:
            target, equals, value = (part.strip() for part in text.partition("="))
            if not equals or not target or (option == "--map" and not value):
                raise UserError(f"{option} {text}: write TARGET={'PATH' if option == '--map' else 'VALUE'}")
            if target not in TARGETS and not (target.startswith("metadata.") and len(target) > len("metadata.")):
                close = difflib.get_close_matches(target, TARGETS, n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(TARGETS)} and metadata.NAME"
                raise UserError(f"{option} {text}: there is no target {target}: {hint}")
            if target in paths or target in constants:
                raise UserError(f"{option} {text}: {target} is given twice: keep one")
            if option == "--map":
                paths[target] = value
            else:
                constants[target] = _constant(target, value)
    if id_from and ("problem_id" in paths or "problem_id" in constants):
        raise UserError("--id-from makes the problem_id: give no --map or --set of it as well")
    return FieldMapping(paths, constants, tuple(dict.fromkeys(id_from)))


def _constant(target: str, text: str) -> Any:
    """A value as JSON where it is some and the target is no text."""
    if target in ("problem_id", "instruction", "input", "output", "test_setup"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
