"""The batches of a run, one optimizer step at a time, read ahead by a thread."""

import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wmtp_ds.data.batches import Batch, Collator, micro_batches
from wmtp_ds.data.groups import Rows
from wmtp_ds.data.index import DataIndex
from wmtp_ds.data.packing import fewest_micro_batches, pack
from wmtp_ds.data.sampling import SamplePlan
from wmtp_ds.data.text_encoder import Pair
from wmtp_ds.data.token_cache import TokenCache


def load_batch(index: DataIndex, collator: Collator, row_ids: Rows, cache: TokenCache | None = None) -> Batch:
    """Read and collate rows; no rows make a batch in which nothing is to be learned.

    Args:
        index: of the data file.
        collator: makes batches.
        row_ids: int64 [batch].
        cache: has the rows' tokens; None reads the data file.

    Raises:
        RunError: the data file has changed since it was indexed.
    """
    return collator.collate(*read_pairs(index, collator, row_ids, cache), row_ids)


class Ranks(NamedTuple):
    """One of the ranks that read together, and the rows that each reads at once."""

    rank: int
    world_size: int
    batch_size: int


def load_packed(
    index: DataIndex,
    collator: Collator,
    row_ids: Rows,
    cache: TokenCache | None,
    ranks: Ranks,
    accumulation: int | None = None,
) -> list[Batch]:
    """One rank's micro-batches of rows that are packed all together, so that every rank has an equal share of work.

    Micro-batch ``a`` of the ranks are neighbours in width, because they are computed at the same time.

    Args:
        index, collator, cache: as in `load_batch`. Without a cache every rank tokenises all the rows.
        row_ids: of all ranks, int64 [rows].
        ranks: which share is wanted.
        accumulation: micro-batches of each rank; None for the fewest in which the rows have room.

    Raises:
        RunError: the data file has changed since it was indexed.
    """
    if cache is not None:
        prompts, solutions = cache.lengths(row_ids)
        known = None
    else:
        known = read_pairs(index, collator, row_ids, None)
        prompts, solutions = (np.array([len(ids) for ids in part], np.int64) for part in zip(*known[0], strict=True))
    lengths, capacity = collator.lengths(prompts, solutions).tolist(), collator.max_length
    if accumulation is None:
        count = fewest_micro_batches(
            lengths, capacity=capacity, most_rows=ranks.batch_size, multiple_of=ranks.world_size
        )
    else:
        count = accumulation * ranks.world_size
    batches = []
    for rows in pack(lengths, capacity=capacity, micro_batches=count, most_rows=ranks.batch_size)[
        ranks.rank :: ranks.world_size
    ]:
        places = [place for row in rows for place in row]
        if known is None:
            pairs, labels = read_pairs(index, collator, row_ids[places], cache)
        else:
            pairs, labels = [known[0][place] for place in places], known[1][places]
        batches.append(collator.pack(pairs, labels, row_ids[places], [len(row) for row in rows]))
    return batches


def read_pairs(
    index: DataIndex, collator: Collator, row_ids: Rows, cache: TokenCache | None
) -> tuple[list[Pair], npt.NDArray[np.bool_]]:
    """Token ids of rows' prompts and solutions, and their is_correct; arguments as of `load_batch`."""
    if cache is not None:
        return cache.read(row_ids), index.is_correct[row_ids]
    rows = [index.read_row(int(i)) for i in row_ids]
    return collator.encode(rows), np.array([row.is_correct for row in rows], np.bool_)


def load_windows(
    index: DataIndex,
    plan: SamplePlan,
    collator: Collator,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    accumulation: int,
    start: int = 0,
    ahead: int = 2,
    cache: TokenCache | None = None,
    packed: bool = False,
) -> Generator[list[Batch], None, None]:
    """Yield one rank's micro-batches of each optimizer step, ``accumulation`` of them, from ``start`` to the last.

    One thread keeps ``ahead`` steps ready, in order, and what it raises is raised here. Close the generator (or
    run it to its end) to end the thread. ``packed`` rows hold several sequences; the ranks together read the same.
    """

    def load(step: int) -> list[Batch]:
        if packed:
            ranks = Ranks(rank, world_size, batch_size)
            return load_packed(index, collator, plan.rows(step), cache, ranks, accumulation)
        cut = micro_batches(plan, step, rank, world_size, batch_size, accumulation)
        return [load_batch(index, collator, row_ids, cache) for row_ids in cut]

    steps = iter(range(start, plan.total_steps))
    executor = ThreadPoolExecutor(1, thread_name_prefix="wmtp-data")
    try:
        waiting: deque[Future[list[Batch]]] = deque(executor.submit(load, step) for step in islice(steps, ahead))
        while waiting:
            window = waiting.popleft().result()
            waiting.extend(executor.submit(load, step) for step in islice(steps, 1))
            yield window
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def timed(windows: Iterator[list[Batch]]) -> Iterator[tuple[list[Batch], float]]:
    """Each window, and the seconds that were spent waiting for it."""
    while True:
        began = time.monotonic()
        window = next(windows, None)
        if window is None:
            return
        yield window, time.monotonic() - began
