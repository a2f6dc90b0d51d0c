"""The batches of a run, one optimizer step at a time, read ahead by a thread."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from wmtp_ds.data.batches import Batch, Collator, micro_batches
from wmtp_ds.data.groups import Rows
from wmtp_ds.data.index import DataIndex
from wmtp_ds.data.sampling import SamplePlan


def load_batch(index: DataIndex, collator: Collator, row_ids: Rows) -> Batch:
    """Read and collate rows; no rows make a batch in which nothing is to be learned.

    Raises:
        RunError: the data file has changed since it was indexed.
    """
    return collator([index.read_row(int(i)) for i in row_ids], row_ids)


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
) -> Generator[list[Batch], None, None]:
    """Yield one rank's micro-batches of each optimizer step, ``accumulation`` of them, from ``start`` to the last.

    One thread keeps ``ahead`` steps ready, in order, and what it raises is raised here. Close the generator (or
    run it to its end) to end the thread.
    """

    def load(step: int) -> list[Batch]:
        cut = micro_batches(plan, step, rank, world_size, batch_size, accumulation)
        return [load_batch(index, collator, row_ids) for row_ids in cut]

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
