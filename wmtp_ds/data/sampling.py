"""Which row each draw of a run reads: balanced, repeated evenly, and by curriculum.

A run is ``total_steps * global_batch`` draws. The plan of all of them is made once, in numpy, as a pure function
of (index, config with its seed, length of the run): the same on every rank and after a resume, whatever the number of
ranks and the micro-batch. `wmtp_ds.data.pool` says which rows may be drawn.

Without a curriculum, an epoch is ``n_samples`` rows of the pool (default: all), chosen once; each epoch is a fresh
permutation of them, and the last one may be cut short. With a curriculum, the run is cut into phases, each with
exact counts for every difficulty bin and, in it, for correct and incorrect rows; rows are then drawn from the
whole pool, and ``n_samples`` only says how long an epoch is.

Where rows are too few they repeat, with a warning, and evenly: in an epoch or phase, and over all of them
together, the numbers of times that two rows of one kind are drawn differ by at most 1.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wmtp_ds.data.curriculum import draw_phases
from wmtp_ds.data.groups import Group, Rows, deal, exact, generator
from wmtp_ds.data.pool import IndexColumns, Pool, Sampling, find_pool


@dataclass(frozen=True, eq=False)
class SamplePlan:
    """Every draw of a run.

    Attributes:
        index: the data that the draws are rows of.
        draws: int64 [total_steps * global_batch], the row of each draw, in the order in which they are trained on.
        global_batch: draws of one optimizer step, over all ranks and accumulation steps.
        epoch_rows: draws of one epoch.
        phases: of each phase of the schedule its first draw and the one after its last; a single phase where
            there is no curriculum.
        warnings: what the user should know: rows that repeat, bins that are empty.
    """

    index: IndexColumns
    draws: Rows
    global_batch: int
    epoch_rows: int
    phases: tuple[tuple[int, int], ...]
    warnings: tuple[str, ...]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return len(self.draws) // self.global_batch

    def rows(self, step: int) -> Rows:
        """int64 [global_batch]: the rows of optimizer step ``step``, counted from 0."""
        start = self._first_draw(step)
        return self.draws[start : start + self.global_batch]

    def phase(self, step: int) -> int:
        """The phase of the first draw of ``step``, as a position in the schedule (0 without a curriculum)."""
        draw = self._first_draw(step)
        return next(p for p, (start, end) in enumerate(self.phases) if start <= draw < end)

    def summary(self) -> dict[str, Any]:
        """Counts over the run, ready for JSON: by correctness, by difficulty, repeats, and the same by phase."""
        uses = np.bincount(self.draws)
        return {
            "draws": len(self.draws),
            "epoch_rows": self.epoch_rows,
            "epochs": len(self.draws) / self.epoch_rows,
            "distinct_rows": int(np.count_nonzero(uses)),
            "most_uses_of_a_row": int(uses.max()),
            **self._counts(self.draws),
            "phases": [{"draws": end - start, **self._counts(self.draws[start:end])} for start, end in self.phases],
        }

    def _first_draw(self, step: int) -> int:
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} lies outside the plan's {self.total_steps} steps")
        return step * self.global_batch

    def _counts(self, rows: Rows) -> dict[str, Any]:
        correct = int(np.count_nonzero(self.index.is_correct[rows]))
        difficulties, counts = np.unique(self.index.difficulty[rows], return_counts=True)
        return {
            "correct": correct,
            "incorrect": len(rows) - correct,
            "difficulty": dict(zip(difficulties.tolist(), counts.tolist(), strict=True)),
        }


def sample_plan(
    index: IndexColumns,
    sampling: Sampling,
    *,
    total_steps: int,
    global_batch: int,
    eligible: npt.NDArray[np.bool_] | None = None,
) -> SamplePlan:
    """Plan every draw of a run: a pure function of its arguments.

    Args:
        index: the data's index.
        sampling: the config's table ``data_sampling``.
        total_steps: optimizer steps of the run, at least 1 (see `count_steps`).
        global_batch: draws of one optimizer step, at least 1.
        eligible: bool [rows], the rows that may be drawn; None = all.

    Raises:
        UserError: there are no rows of a kind that the config asks for; names the file and the key.
    """
    if total_steps < 1 or global_batch < 1:
        raise ValueError(f"a run has at least one draw, not {total_steps} steps of {global_batch}")
    total = total_steps * global_batch
    pool = find_pool(index, sampling, eligible)
    if sampling.curriculum_learning:
        draws, phases, warnings = draw_phases(pool, total)
    else:
        draws, warnings = _draw_epochs(pool, total)
        phases = [(0, total)]
    return SamplePlan(index, draws, global_batch, pool.epoch_rows, tuple(phases), tuple(warnings))


def epoch_size(index: IndexColumns, sampling: Sampling, eligible: npt.NDArray[np.bool_] | None = None) -> int:
    """Draws of one epoch: ``n_samples``, or else the number of rows that may be drawn.

    Raises:
        UserError: no row may be drawn; names the file and the key.
    """
    return find_pool(index, sampling, eligible).epoch_rows


def count_steps(n_epochs: float, epoch_rows: int, global_batch: int, max_steps: int | None = None) -> int:
    """Optimizer steps of a run: enough for ``n_epochs`` (in decimal arithmetic), at least 1, at most ``max_steps``."""
    steps = max(1, math.ceil(exact(n_epochs) * epoch_rows / global_batch))
    return steps if max_steps is None else min(steps, max_steps)


def _draw_epochs(pool: Pool, total: int) -> tuple[Rows, list[str]]:
    """The row of each draw, int64 [total], epoch by epoch; and warnings."""
    [full] = pool.balance.counts([pool.epoch_rows])
    rows_of_class = pool.balance.split(pool.rows, pool.index.is_correct)
    groups = [
        Group(rows, generator(pool.sampling.seed, "rows", k), at_most=count)
        for k, (rows, count) in enumerate(zip(rows_of_class, full, strict=True))
    ]
    [first] = pool.balance.counts([min(pool.epoch_rows, total)])
    warnings = []
    for kind, group, count in zip(pool.balance.classes, groups, first, strict=True):
        if count and not len(group.rows):
            raise pool.no_rows(kind)
        if count > len(group.rows):
            warnings.append(pool.repeats(count, len(group.rows), kind))
    parts = []
    for epoch, start in enumerate(range(0, total, pool.epoch_rows)):
        [counts] = pool.balance.counts([min(pool.epoch_rows, total - start)])
        parts.append(deal(groups, counts, generator(pool.sampling.seed, "epoch", epoch)))
    return np.concatenate(parts), warnings
