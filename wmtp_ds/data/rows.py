"""One line of a data file: its schema, and what is said about a line that does not keep to it.

A data file is JSONL: one solution of one problem a line. This module reads bytes; it needs neither torch nor a
tokenizer.
"""

import difflib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from wmtp_ds.errors import UserError
from wmtp_ds.files import twice

UNKNOWN_DIFFICULTY = 0
MAX_DIFFICULTY = 2**31 - 1  # what an index column holds
MAX_LINE_BYTES = 64 * 2**20  # a file without line ends must not be read into memory whole

_REQUIRED = ("problem_id", "instruction", "output", "is_correct")
_TEXT = ("problem_id", "instruction", "input", "output")
_KEYS = ("problem_id", "instruction", "input", "output", "is_correct", "difficulty", "metadata")


@dataclass(frozen=True, slots=True)
class Row:
    """One solution of one problem.

    ``difficulty`` is at least 1, or ``UNKNOWN_DIFFICULTY`` (0) where the file does not say; ``input`` is ""
    and ``metadata`` empty where absent.
    """

    problem_id: str
    instruction: str
    output: str
    is_correct: bool
    input: str = ""
    difficulty: int = UNKNOWN_DIFFICULTY
    metadata: dict[str, Any] = field(default_factory=dict)


class _DuplicateKeyError(ValueError):
    """A key that occurs twice in one object: JSON readers would silently keep the last."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _DuplicateKeyError(twice([key for key, _ in pairs]))
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # which would be written out again as no JSON
        raise ValueError(f"{text[:20]} is beyond all numbers")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite)


def parse_row(line: bytes, path: str | Path, line_number: int) -> Row:
    """Parse and check one line of a data file.

    Args:
        line: the line's bytes (UTF-8), with or without its line end.
        path: the file, for messages.
        line_number: the line's number, counted from 1, for messages.

    Raises:
        UserError: the line is not a row; the message names file, line and key, and how to mend it.
    """
    where = f"{path}:{line_number}"
    found = decode_object(line, where)
    for key in _REQUIRED:
        if found.get(key) is None:
            raise UserError(f'{where}: "{key}" is missing: every line needs {", ".join(_REQUIRED)}')
    if len(found) > len(_KEYS) or not found.keys() <= set(_KEYS):
        _refuse_unknown_key(found, where)
    for key in _TEXT:
        _check_text(key, found, where)
    for key in ("problem_id", "output"):
        if not found[key].strip():
            raise UserError(f'{where}: "{key}" is empty: give it a text, or remove the line')
    if not isinstance(found["is_correct"], bool):
        raise UserError(
            f'{where}: "is_correct" must be true or false, not {_show(found["is_correct"])}: write true where '
            "the solution passed its tests, without quotes"
        )
    if b"\\u" in line:
        check_pairs(found.get("metadata"), f'{where}: "metadata"')
    return Row(
        problem_id=found["problem_id"],
        instruction=found["instruction"],
        output=found["output"],
        is_correct=found["is_correct"],
        input=found.get("input") or "",
        difficulty=_difficulty(found.get("difficulty"), where),
        metadata=_metadata(found.get("metadata"), where),
    )


def read_lines(handle: BinaryIO, path: str | Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield ``(offset, line number, line)`` of every line of an open file: bytes from its start, counted from 1.

    Raises:
        UserError: a line is longer than ``MAX_LINE_BYTES``, so this is no JSONL file; or, at the end, somebody has
            written to the file meanwhile.
    """
    offset = 0
    line_number = 0
    before = _version_of(handle)
    while line := handle.readline(MAX_LINE_BYTES + 1):
        line_number += 1
        if len(line) > MAX_LINE_BYTES:
            raise UserError(
                f"{path}:{line_number}: the line is longer than {MAX_LINE_BYTES >> 20} MiB: a data file is JSONL, "
                "one JSON object a line"
            )
        yield offset, line_number, line
        offset += len(line)
    if _version_of(handle) != before:
        raise UserError(f"{path}: the file is still being written: wait until that is done, then start again")


def _version_of(handle: BinaryIO) -> tuple[int, int]:
    """Size and time of change of an open file; of what is none, always the same."""
    try:
        status = os.fstat(handle.fileno())
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def decode_object(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object on a line of a file.

    Args:
        line: the line's bytes.
        where: file and line, for messages.

    Raises:
        UserError: it is none; the message says why.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 text (byte {error.start + 1} of the line): a data file is UTF-8 JSONL, not compressed"
        ) from None
    if text.startswith("\ufeff"):
        raise UserError(f"{where}: starts with a byte order mark: save the file as UTF-8 without one")
    try:
        found = _DECODER.decode(text)
    except _DuplicateKeyError as error:
        raise UserError(f'{where}: "{_shorten(str(error))}" occurs twice in one object: keep one of them') from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON: {error.msg} (column {error.colno}): write one complete JSON object a line"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply: flatten the line's metadata") from None
    except ValueError as error:  # NaN, or an integer of thousands of digits
        raise UserError(f"{where}: not JSON: {error}: write one complete JSON object a line") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: must be a JSON object {{...}}, not {_show(found)}")
    return found


def check_pairs(value: Any, where: str) -> None:
    """Check that all texts in an object can be encoded.

    Raises:
        UserError: one holds half a surrogate pair, which JSON can write and nothing else.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: holds half a surrogate pair (\\ud800 to \\udfff), which is no text: escape the whole pair, or "
            "write the character itself"
        ) from None


def _refuse_unknown_key(found: dict[str, Any], where: str) -> NoReturn:
    key = next(key for key in found if key not in _KEYS)
    close = difflib.get_close_matches(key, _KEYS, n=1)
    hint = f'did you mean "{close[0]}"?' if close else 'move it into "metadata"'
    raise UserError(f'{where}: unknown key "{_shorten(key)}": {hint} (keys: {", ".join(_KEYS)})')


def _check_text(key: str, found: dict[str, Any], where: str) -> None:
    value = found.get(key)
    if value is None:  # only "input" gets here: the others are required
        return
    if not isinstance(value, str):
        hint = f': write "{value}", in quotes' if key == "problem_id" and type(value) is int else ": write a string"
        raise UserError(f'{where}: "{key}" must be a text, not {_show(value)}{hint}')
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f'{where}: "{key}" holds half a surrogate pair (character {error.start + 1}), which is no text: '
                "escape the whole pair, or write the character itself"
            ) from None


def _difficulty(value: Any, where: str) -> int:
    if value is None:
        return UNKNOWN_DIFFICULTY
    if type(value) is not int or not 1 <= value <= MAX_DIFFICULTY:
        raise UserError(
            f'{where}: "difficulty" must be a whole number of at least 1, not {_show(value)}: leave the key out '
            "where the difficulty is unknown"
        )
    return value


def _metadata(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f'{where}: "metadata" must be a JSON object {{...}}, not {_show(value)}')
    return value


def _show(value: Any) -> str:
    """A value as it stands in the file, short enough for a message."""
    return _shorten(json.dumps(value, ensure_ascii=True))


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
