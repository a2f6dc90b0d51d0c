"""What several seeds say together."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, and half the width of its 95 % interval (Student's t); None with a single seed."""

    mean: float
    half: float | None

    def text(self, digits: int = 3) -> str:
        """``0.123 ± 0.004``."""
        tail = "" if self.half is None else f" ± {self.half:.{digits}f}"
        return f"{self.mean:.{digits}f}{tail}"


def over_seeds(values: Sequence[float]) -> Mean:
    """Mean and interval of one value a seed."""
    count = len(values)
    if count < 2:
        return Mean(values[0], None)
    error = statistics.stdev(values) / count**0.5
    return Mean(statistics.fmean(values), float(student.ppf(0.975, count - 1)) * error)


def difference(values: Sequence[float], control: Sequence[float]) -> Mean:
    """Of two arms, paired by seed: what a seed makes easy or hard for both is not counted."""
    return over_seeds([a - b for a, b in zip(values, control, strict=True)])
