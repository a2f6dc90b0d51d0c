"""The curriculum: a run cut into phases, each with its own mix of difficulties."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import chain

import numpy as np

from wmtp_ds.data.groups import Group, Rows, deal, exact, generator, round_half_up, round_to_total
from wmtp_ds.data.pool import Phase, Pool, bin_of_each
from wmtp_ds.errors import UserError

_ROUNDING = Fraction(1, 10**6)  # a third, written as 0.333333, leaves no gap


def draw_phases(pool: Pool, total: int) -> tuple[Rows, list[tuple[int, int]], list[str]]:
    """Draw a run by curriculum.

    Returns:
        The row of each draw, int64 [total]; the span of draws of each phase, in the schedule's order; warnings.

    Raises:
        UserError: draws without a phase, a phase without rows, or no (in)correct rows in a bin that needs some.
    """
    names = list(pool.sampling.difficulty_bins)
    groups = _groups(pool)
    rows_in_bin = [sum(len(group.rows) for group in of_bin) for of_bin in groups]
    spans = cut_phases(pool.sampling.curriculum_schedule, total)
    warnings = _unbinned(pool)
    draws = np.empty(total, np.int64)
    most = np.zeros((len(names), len(pool.balance.classes)), np.int64)
    for p in sorted(range(len(spans)), key=lambda p: spans[p]):
        start, end = spans[p]
        if start == end:
            warnings.append(
                f"data_sampling.curriculum_schedule[{p}] has no draws: the run is too short for it, or earlier "
                "phases cover its epoch_range"
            )
            continue
        of_bins, empty = _draws_of_bins(pool, p, rows_in_bin, end - start)
        warnings += empty
        counts = pool.balance.counts(of_bins)
        for name, of_bin, needed in zip(names, groups, counts, strict=True):
            _require(pool, name, of_bin, needed)
        draws[start:end] = deal([*chain(*groups)], [*chain(*counts)], generator(pool.sampling.seed, "phase", p))
        an_epoch = [[math.ceil(Fraction(n * pool.epoch_rows, end - start)) for n in needed] for needed in counts]
        most = np.maximum(most, an_epoch)
    return draws, spans, warnings + _repeats(pool, names, groups, most.tolist())


def cut_phases(schedule: Sequence[Phase], total: int) -> list[tuple[int, int]]:
    """Of each phase its first draw and the one after its last, in the schedule's order.

    Borders are rounded half up. Where phases overlap, the one that begins earlier wins.

    Raises:
        UserError: draws that no phase covers.
    """
    spans = [(0, 0)] * len(schedule)
    covered = Fraction(0)
    for p in sorted(range(len(schedule)), key=lambda p: tuple(schedule[p].epoch_range)):
        begin, end = (exact(border) for border in schedule[p].epoch_range)
        if begin > covered + _ROUNDING:
            break
        end = Fraction(1) if end > 1 - _ROUNDING else max(covered, end)
        spans[p] = round_half_up(covered * total), round_half_up(end * total)
        covered = end
    if covered < 1:
        raise UserError(
            f"data_sampling.curriculum_schedule: no phase covers the run from {float(covered):.3g} on: let the "
            "phases' epoch_range cover [0, 1] without a gap"
        )
    return spans


def _groups(pool: Pool) -> list[list[Group]]:
    """The pool's rows by [bin][class]."""
    bins = pool.sampling.difficulty_bins
    bin_of_row = bin_of_each(pool.index.difficulty[pool.rows], bins)
    return [
        [
            Group(rows, generator(pool.sampling.seed, "bin", b, k))
            for k, rows in enumerate(pool.balance.split(pool.rows[bin_of_row == b], pool.index.is_correct))
        ]
        for b in range(len(bins))
    ]


def _draws_of_bins(pool: Pool, p: int, rows_in_bin: Sequence[int], draws: int) -> tuple[list[int], list[str]]:
    """How many of a phase's draws fall on each bin, by largest remainder; and a warning if bins are empty."""
    where = f"{pool.index.path}: data_sampling.curriculum_schedule[{p}]"
    weights = pool.sampling.curriculum_schedule[p].difficulty_weights
    wanted = [exact(weights.get(name, 0)) for name in pool.sampling.difficulty_bins]
    usable = [weight if rows else Fraction(0) for weight, rows in zip(wanted, rows_in_bin, strict=True)]
    names = zip(pool.sampling.difficulty_bins, wanted, usable, strict=True)
    empty = ", ".join(name for name, weight, left in names if weight != left)
    if not any(usable):
        raise UserError(
            f"{where}: no rows to draw in the difficulty bins that have a weight ({empty or 'none has'}): weigh "
            "other bins, or correct data_sampling.difficulty_bins"
        )
    warnings = [f"{where}: no rows to draw in difficulty bin {empty}: the others get its weight"] if empty else []
    return round_to_total([weight / sum(usable) * draws for weight in usable], draws), warnings


def _require(pool: Pool, name: str, groups: Sequence[Group], counts: Sequence[int]) -> None:
    for kind, group, count in zip(pool.balance.classes, groups, counts, strict=True):
        if count and not len(group.rows):
            raise pool.no_rows(kind, _place(name))


def _repeats(
    pool: Pool, names: Sequence[str], groups: Sequence[Sequence[Group]], most: Sequence[Sequence[int]]
) -> list[str]:
    """A warning for each group of whose rows an epoch, in the phase that takes most, draws some twice."""
    return [
        pool.repeats(needed, len(group.rows), kind, _place(name))
        for name, of_bin, needs in zip(names, groups, most, strict=True)
        for kind, group, needed in zip(pool.balance.classes, of_bin, needs, strict=True)
        if min(needed, group.taken) > len(group.rows)
    ]


def _unbinned(pool: Pool) -> list[str]:
    difficulty = pool.index.difficulty
    count = int(np.count_nonzero(bin_of_each(difficulty, pool.sampling.difficulty_bins) < 0))
    if not count:
        return []
    unknown = int(np.count_nonzero(difficulty == 0))
    return [
        f"{pool.index.path}: {count} rows lie in none of data_sampling.difficulty_bins ({unknown} of unknown "
        "difficulty), and the curriculum never draws them"
    ]


def _place(name: str) -> str:
    return f" of difficulty bin {name}"
