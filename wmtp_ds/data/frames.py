"""Reads what the harness in the sandbox wrote, which the checked code may have tried to forge.

Values arrive as JSON of tagged lists (``harness.encode``) and become plain Python values, so that a comparison
with an expected value out here calls no method of the checked code.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

MAX_INTEGER_DIGITS = 100_000  # hexadecimal; larger integers are compared with nothing


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """A value of a type that has no literal: equal to nothing."""

    type_name: str

    def __repr__(self) -> str:
        return f"<{self.type_name}>"


@dataclass(frozen=True, slots=True)
class StepReport:
    """What came of one step: its values (one, or both sides of a comparison), or an exception."""

    values: tuple[Any, ...] = ()
    error: str = ""  # the exception's name; "MemoryError" when out of memory
    message: str = ""


@dataclass(slots=True)
class RunReport:
    """What came of one run.

    ``ended`` is "exit", "signal" or "wall" with ``code`` the exit code or the signal, or "" where the sandbox
    itself ended first. ``complete``: the run went through all of its steps, and proved it with its nonce.
    ``damaged``: frames that the harness would not have written.
    """

    steps: dict[int, StepReport] = field(default_factory=dict)
    ended: str = ""
    code: int = 0
    complete: bool = False
    damaged: bool = False
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False


def _text(hexadecimal: str) -> str:
    return bytes.fromhex(hexadecimal).decode("utf-8", "surrogatepass")


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise ValueError("the integer is too large")
    return int(digits, 16)


_LEAVES: dict[str, Callable[..., Any]] = {
    "n": lambda: None,
    "b": bool,
    "i": _integer,
    "f": float.fromhex,
    "c": lambda real, imaginary: complex(float.fromhex(real), float.fromhex(imaginary)),
    "s": _text,
    "y": bytes.fromhex,
    "q": lambda above, below: Fraction(_integer(above), _integer(below)),
    "o": lambda name: Opaque(_text(name)[:80]),
}
_CONTAINERS: dict[str, Callable[..., Any]] = {"l": list, "t": tuple, "e": set, "z": frozenset}


def _build(node: list[Any]) -> Any:
    tag, *parts = node
    if tag in _LEAVES:
        return _LEAVES[tag](*parts)
    items = [_build(part) for part in parts]
    if tag == "d":
        return dict(zip(items[::2], items[1::2], strict=True))
    return _CONTAINERS[tag](items)


def decode(encoded: str) -> Any:
    """The Python value of an encoded one; ``Opaque`` within it stands for what has no literal.

    Raises:
        ValueError: this is no encoded value.
    """
    try:
        return _build(json.loads(encoded))
    except (TypeError, KeyError, ValueError, OverflowError, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"not an encoded value: {type(error).__name__}") from None


def _read_step(fields: list[str]) -> StepReport:
    if fields[0] == "v":
        return StepReport(values=(decode(fields[3]),))
    if fields[0] == "p":
        return StepReport(values=(decode(fields[3]), decode(fields[4])))
    if fields[0] == "t":
        return StepReport(values=(bool(int(fields[3])),))
    if fields[0] == "m":
        return StepReport(error="MemoryError")
    if fields[0] == "x":
        message = "" if fields[4] == "-" else _text(fields[4])
        return StepReport(error=_text(fields[3])[:80], message=message)
    raise ValueError("no such frame")


def _apply(fields: list[str], reports: list[RunReport], nonces: list[str], current: int) -> int:
    """Enter one frame; the run that is going on after it."""
    if int(fields[1]) != current:  # one run at a time, in order
        raise ValueError("a frame of another run")
    report = reports[current]
    if fields[0] == "e":
        report.complete = fields[2] == nonces[current]
        report.damaged |= not report.complete
    elif fields[0] == "o":
        report.truncated = fields[2] == "1"
        report.stdout, report.stderr = (b"" if part == "-" else bytes.fromhex(part) for part in fields[3:5])
    elif fields[0] == "w":
        report.ended, report.code = fields[2], int(fields[3])
        return current + 1
    else:
        step = int(fields[2])
        if step in report.steps:
            raise ValueError("a step told twice")
        report.steps[step] = _read_step(fields)
    return current


def parse_frames(data: bytes, nonces: list[str]) -> list[RunReport]:
    """The reports of all runs of a job, in order; a run that is not told of stays empty.

    Args:
        data: what the harness wrote after its "ready".
        nonces: one a run; a run is complete if its last frame carries its own.
    """
    reports = [RunReport() for _ in nonces]
    current = 0
    for line in data.split(b"\n")[:-1]:  # what has no line end was cut off
        if current >= len(reports):
            reports[-1].damaged = True
            break
        try:
            current = _apply(line.decode("ascii").split(" "), reports, nonces, current)
        except (ValueError, IndexError):
            reports[current].damaged = True
    return reports
