"""Reads what the harness in the sandbox wrote, which the checked code may have tried to forge.

Values arrive as JSON of tagged lists (``harness_values.encode``) and become plain Python values, so that a comparison
with an expected value out here calls no method of the checked code.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from wmtp_ds.data import harness_values


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


def decode(encoded: str) -> Any:
    """The Python value of an encoded one; ``Opaque`` within it stands for what is no data.

    Raises:
        ValueError: this is no encoded value.
    """
    return harness_values.decode(encoded, lambda name, *rest: Opaque(name))


def _read_step(fields: list[str]) -> StepReport:
    if fields[0] == "v":
        return StepReport(values=(decode(fields[3]),))
    if fields[0] == "p":
        return StepReport(values=(decode(fields[3]), decode(fields[4])))
    if fields[0] == "t":
        return StepReport(values=(bool(int(fields[3])),))
    if fields[0] == "x":
        message = "" if fields[4] == "-" else _text(fields[4])
        return StepReport(error=_text(fields[3])[:80], message=message)
    raise ValueError("no such frame")


class FrameReader:
    """Makes reports of frames, as they come.

    Args:
        nonces: one a run; a run is complete if its last frame carries its own.

    Attributes:
        reports: of all runs of the job, in order; a run that is not told of stays empty.
        ended: how many runs have ended.
        ready: the fields of the line that comes before any frame; None until it has come.
    """

    def __init__(self, nonces: Sequence[str]):
        self.reports = [RunReport() for _ in nonces]
        self.ended = 0
        self.ready: list[str] | None = None
        self._nonces = nonces
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Read on; what has no line end yet waits for it."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if self.ready is None:
                self.ready = line.decode("ascii", "replace").split(" ")
                continue
            if self.ended >= len(self.reports):
                self.reports[-1].damaged = True
                continue
            report = self.reports[self.ended]
            try:
                self._apply(line.decode("ascii").split(" "), report)
            except (ValueError, IndexError):
                report.damaged = True

    def _apply(self, fields: list[str], report: RunReport) -> None:
        if int(fields[1]) != self.ended:  # one run at a time, in order
            raise ValueError("a frame of another run")
        if fields[0] == "e":
            report.complete = fields[2] == self._nonces[self.ended]
            report.damaged |= not report.complete
        elif fields[0] == "o":
            report.truncated = fields[2] == "1"
            report.stdout, report.stderr = (b"" if part == "-" else bytes.fromhex(part) for part in fields[3:5])
        elif fields[0] == "w":
            report.ended, report.code = fields[2], int(fields[3])
            self.ended += 1
        else:
            step = int(fields[2])
            if step in report.steps:
                raise ValueError("a step told twice")
            report.steps[step] = _read_step(fields)
