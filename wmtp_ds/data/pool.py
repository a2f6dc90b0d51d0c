"""The pool: the rows of a data file that a run may draw, as the config's table ``data_sampling`` says.

Those are the eligible rows (`wmtp_ds.data.batches.eligible_rows`) within ``difficulty_range``; a range leaves
unknown difficulties out, without one they stay. ``correct_ratio`` 1.0 keeps correct rows only and 0.0 incorrect
rows only. Any other ratio holds where ``balance_correct`` is true, and then exactly; where it is false, rows come
as they are in the file. A curriculum draws no row that lies in none of its difficulty bins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from wmtp_ds.data.groups import Balance, Rows, exact
from wmtp_ds.errors import UserError


class IndexColumns(Protocol):
    """What sampling reads of a `wmtp_ds.data.index.DataIndex`."""

    @property
    def path(self) -> Path:
        """The data file, for messages."""

    @property
    def is_correct(self) -> npt.NDArray[np.bool_]:
        """Bool [rows]."""

    @property
    def difficulty(self) -> npt.NDArray[np.int32]:
        """int32 [rows], 0 where unknown."""


class Phase(Protocol):
    """One entry of ``data_sampling.curriculum_schedule``."""

    @property
    def epoch_range(self) -> Sequence[float]:
        """Where the phase begins and ends, in fractions of the run."""

    @property
    def difficulty_weights(self) -> Mapping[str, float]:
        """The weight of each difficulty bin; they need not add up to 1, and a bin left out weighs 0."""


class Sampling(Protocol):
    """What sampling reads of the config's table ``data_sampling``."""

    @property
    def n_samples(self) -> int | None:
        """Draws of one epoch; None = as many as the pool has rows."""

    @property
    def correct_ratio(self) -> float:
        """The share of correct rows, in [0, 1]."""

    @property
    def balance_correct(self) -> bool:
        """Whether the share is kept exactly."""

    @property
    def difficulty_range(self) -> Sequence[int] | None:
        """The lowest and the highest difficulty drawn; None = all."""

    @property
    def seed(self) -> int:
        """Of every random choice, at least 0."""

    @property
    def curriculum_learning(self) -> bool:
        """Whether the mix of difficulties follows the schedule."""

    @property
    def difficulty_bins(self) -> Mapping[str, Sequence[int]]:
        """The lowest and the highest difficulty of each bin."""

    @property
    def curriculum_schedule(self) -> Sequence[Phase]:
        """The phases of the run."""


@dataclass(frozen=True, eq=False)
class Pool:
    """The rows that may be drawn: int64 [rows of the pool], in the file's order."""

    index: IndexColumns
    sampling: Sampling
    rows: Rows

    @property
    def balance(self) -> Balance:
        """The share of correct rows to keep, if any. At 1.0 and 0.0 the pool has only one kind of rows."""
        ratio = exact(self.sampling.correct_ratio)
        return Balance(ratio if self.sampling.balance_correct and 0 < ratio < 1 else None)

    @property
    def epoch_rows(self) -> int:
        """Draws of one epoch."""
        return len(self.rows) if self.sampling.n_samples is None else self.sampling.n_samples

    def no_rows(self, kind: str, place: str = "") -> UserError:
        """The error that there are no rows of a kind ("correct ", "incorrect ") where some must be drawn."""
        return UserError(
            f"{self.index.path}: there are no {kind}rows{place} to draw, and data_sampling.correct_ratio = "
            f"{self.sampling.correct_ratio} needs some: add {kind}rows, or change data_sampling.correct_ratio"
        )

    def repeats(self, count: int, available: int, kind: str, place: str = "") -> str:
        """The warning that an epoch draws ``count`` rows of a kind of which only ``available`` are there."""
        return (
            f"{self.index.path}: an epoch of {self.epoch_rows} rows draws {count} {kind}rows{place} and only "
            f"{available} are there, so rows repeat: lower data_sampling.n_samples, or change the ratio or the "
            "weights, to avoid it"
        )


def find_pool(index: IndexColumns, sampling: Sampling, eligible: npt.NDArray[np.bool_] | None) -> Pool:
    """Find the rows that may be drawn. ``eligible``: bool [rows], None = all.

    Raises:
        UserError: there are none; names the file and the key that leaves none.
    """
    allowed = np.ones(len(index.is_correct), np.bool_) if eligible is None else eligible.copy()
    if not allowed.any():
        raise UserError(f"{index.path}: every solution is longer than dataset.max_length: raise it")
    if sampling.difficulty_range is not None:
        low, high = sampling.difficulty_range
        allowed &= (index.difficulty >= low) & (index.difficulty <= high)
        if not allowed.any():
            raise UserError(
                f"{index.path}: no rows with a difficulty within data_sampling.difficulty_range = [{low}, {high}]: "
                f"widen it ({_difficulties(index)})"
            )
    if sampling.curriculum_learning:
        allowed &= bin_of_each(index.difficulty, sampling.difficulty_bins) >= 0
        if not allowed.any():
            raise UserError(
                f"{index.path}: no rows to draw in any of data_sampling.difficulty_bins: correct the bins, or set "
                f"data_sampling.curriculum_learning = false ({_difficulties(index)})"
            )
    if sampling.correct_ratio in (0, 1):
        allowed &= index.is_correct == (sampling.correct_ratio == 1)
    pool = Pool(index, sampling, np.flatnonzero(allowed).astype(np.int64))
    if not len(pool.rows):
        raise pool.no_rows("correct " if sampling.correct_ratio == 1 else "incorrect ")
    return pool


def bin_of_each(difficulty: npt.NDArray[np.int32], bins: Mapping[str, Sequence[int]]) -> npt.NDArray[np.int64]:
    """The position of each row's bin in ``bins``, or -1: int64 [rows]. Where bins overlap, the earlier wins.

    Unknown difficulties (0) belong to no bin.
    """
    found = np.full(len(difficulty), -1, np.int64)
    for position, (low, high) in enumerate(bins.values()):
        found[(found < 0) & (difficulty >= max(low, 1)) & (difficulty <= high)] = position
    return found


def _difficulties(index: IndexColumns) -> str:
    known = index.difficulty[index.difficulty > 0]
    if not len(known):
        return "the file states no difficulties"
    return f"the file's difficulties go from {known.min()} to {known.max()}"
