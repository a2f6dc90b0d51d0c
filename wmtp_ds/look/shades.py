"""The colour of a token: how much more, or less, than an ordinary one it weighs."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

# Colours that the colour-blind tell apart (Okabe and Ito 2008): vermilion for less, bluish green for more.
LESS, MORE = (213, 94, 0), (0, 158, 115)
_LEAST = 1e-6  # weights below it are as this one


@dataclass(frozen=True)
class Scale:
    """Entries of a column to colours.

    Attributes:
        kind: "ratio" for weights around 1 (by their logarithm), "share" for entries in [0, 1], of which 0.5 is
            ordinary if they are values, and 0 if they are weights that select: each 0 or 1, and some 0.
        ordinary: the entry without colour.
        most: the largest distance from it, in the scale's own measure, that occurs.
    """

    kind: Literal["ratio", "share"]
    ordinary: float
    most: float

    @classmethod
    def of(cls, column: str, entries: Collection[float]) -> "Scale":
        """For the entries of a column, at least one."""
        if column == "weight" and 0.0 in entries and set(entries) <= {0.0, 1.0}:
            return cls("share", 0.0, 1.0)
        if column == "weight":
            farthest = max(abs(math.log(max(entry, _LEAST))) for entry in entries)
            return cls("ratio", 1.0, farthest or 1.0)
        return cls("share", 0.5, max(abs(entry - 0.5) for entry in entries) or 1.0)

    @property
    def selects(self) -> bool:
        """Whether entries say no more than which tokens count."""
        return (self.kind, self.ordinary) == ("share", 0.0)

    @property
    def words(self) -> tuple[str, str]:
        """What the colours MORE and LESS say; of weights that select, what MORE says, and no colour."""
        if self.selects:
            return "selected", "left out"
        return f"above {self.ordinary:g}", f"below {self.ordinary:g}"

    def strength(self, entry: float) -> float:
        """From −1 (least) over 0 (ordinary) to 1 (most)."""
        distance = math.log(max(entry, _LEAST)) if self.kind == "ratio" else entry - self.ordinary
        return max(-1.0, min(1.0, distance / self.most))

    def colour(self, entry: float) -> tuple[int, int, int, float]:
        """Red, green, blue (0 to 255) and opacity (0 to 1)."""
        strength = self.strength(entry)
        return (*(MORE if strength > 0 else LESS), round(abs(strength) * 0.75, 3))
