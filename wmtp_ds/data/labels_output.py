"""How the standard output of a program is compared with the one that a test wants."""

import math
from dataclasses import dataclass

WHITE_SPACE = ("lines", "tokens")


@dataclass(frozen=True)
class Comparison:
    """What differences do not count.

    ``white_space``: "lines": white space at the ends of lines and empty lines at the end; "tokens": all of it,
    as most judges of programming contests have it. ``tolerance``: how far a number may be off, absolutely or
    relatively, where the test wants one with a decimal point or an exponent; 0 compares all numbers as text.
    """

    white_space: str = "lines"
    tolerance: float = 0.0

    def same(self, wanted: str, written: bytes) -> bool:
        """Whether what was written is as good as what was wanted. Bytes that are no UTF-8 equal nothing."""
        found, expected = self._split(written.decode("utf-8", "surrogateescape")), self._split(wanted)
        if found == expected:
            return True
        if not self.tolerance or len(found) != len(expected):
            return False
        return all(
            one == other or (len(one) == len(other) and all(map(self._same_token, one, other)))
            for one, other in zip(expected, found, strict=True)
        )

    def _split(self, text: str) -> list[list[str]]:
        if self.white_space == "tokens":
            return [text.split()]
        return [self._fields(line.rstrip()) for line in text.rstrip().splitlines()]

    def _fields(self, line: str) -> list[str]:
        """A line's parts: the whole of it unless numbers in it are to be looked at."""
        return line.split(" ") if self.tolerance else [line]

    def _same_token(self, wanted: str, written: str) -> bool:
        if wanted == written:
            return True
        if not any(mark in wanted for mark in ".eE"):
            return False
        try:
            return math.isclose(float(wanted), float(written), rel_tol=self.tolerance, abs_tol=self.tolerance)
        except ValueError:
            return False
