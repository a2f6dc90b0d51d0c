"""Exact counts, and dealing rows evenly: what `sampling` and `curriculum` are made of."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


def exact(value: float) -> Fraction:
    """The decimal number that was typed: 0.1 is one tenth, not the nearest binary fraction."""
    return Fraction(str(value))


def round_half_up(value: Fraction) -> int:
    """The nearest whole number; halves go up."""
    return math.floor(value + Fraction(1, 2))


def round_to_total(shares: Sequence[Fraction], total: int) -> list[int]:
    """Round each share up or down so that they add up to ``total``: largest remainder, ties to the earlier.

    ``total`` must be the shares' sum, rounded up or down.
    """
    rounded = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: rounded[i] - shares[i])
    for i in by_remainder[: total - sum(rounded)]:
        rounded[i] += 1
    return rounded


def generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """A random generator of its own for each purpose and key, so that no draw depends on the order of the others."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *key])


@dataclass(frozen=True)
class Balance:
    """The exact share of correct rows, or None to take rows as they come.

    It parts rows into classes: correct and incorrect ones, or a single class where there is no share to keep.
    """

    ratio: Fraction | None

    @property
    def classes(self) -> tuple[str, ...]:
        """What each class is called in a message, with the space that follows it."""
        return ("",) if self.ratio is None else ("correct ", "incorrect ")

    def split(self, rows: Rows, is_correct: npt.NDArray[np.bool_]) -> list[Rows]:
        """The rows of each class. ``is_correct``: bool [all rows of the file]."""
        if self.ratio is None:
            return [rows]
        return [rows[is_correct[rows]], rows[~is_correct[rows]]]

    def counts(self, totals: Sequence[int]) -> list[list[int]]:
        """How many draws of each class: [bin][class] for ``totals`` draws of each bin.

        The share is exact (to rounding half up) over all bins, and as near to it as whole numbers can be in each.
        """
        if self.ratio is None:
            return [[total] for total in totals]
        shares = [self.ratio * total for total in totals]
        correct = round_to_total(shares, round_half_up(sum(shares, Fraction(0))))
        return [[count, total - count] for count, total in zip(correct, totals, strict=True)]


class Group:
    """Rows of one kind, dealt round and round in an order that is drawn once.

    Any one taking, and all takings together, hold each row equally often, or once more. Within a taking, every
    full round is shuffled anew.
    """

    def __init__(self, rows: Rows, random: np.random.Generator, at_most: int | None = None) -> None:
        """Shuffle ``rows``, and keep ``at_most`` of them."""
        self.rows = random.permutation(rows)[:at_most]
        self.taken = 0

    def take(self, count: int, random: np.random.Generator) -> Rows:
        """The next ``count`` rows, int64 [count]."""
        if not count:
            return self.rows[:0]
        taken = self.rows[(self.taken + np.arange(count)) % len(self.rows)]
        in_full_rounds = count - count % len(self.rows)
        full_rounds = taken[:in_full_rounds].reshape(-1, len(self.rows))
        random.permuted(full_rounds, axis=1, out=full_rounds)
        random.shuffle(taken[in_full_rounds:])
        self.taken += count
        return taken


def deal(groups: Sequence[Group], counts: Sequence[int], random: np.random.Generator) -> Rows:
    """Take ``counts[g]`` rows of each group, in a random order of the groups: int64 [sum of counts]."""
    group_of_draw = random.permutation(np.repeat(np.arange(len(groups)), counts))
    drawn = np.empty(len(group_of_draw), np.int64)
    for g, group in enumerate(groups):
        drawn[group_of_draw == g] = group.take(counts[g], random)
    return drawn
