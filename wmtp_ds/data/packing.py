"""Which sequences share a row: rows of several solutions leave little room for padding."""

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

LITTLE = 0.01  # padding to a token that is none, for which fewer and longer rows are not worth their attention

# Rows of a micro-batch, each a list of sequences by their place in what was packed.
PackedRows = list[list[int]]


def pack(lengths: Sequence[int], *, capacity: int, micro_batches: int, most_rows: int) -> list[PackedRows]:
    """Share sequences out over micro-batches of equally many rows, with about as many tokens in each row.

    Longest first, each sequence goes to the row that has the fewest tokens (Graham 1969, "LPT"). Then the fullest rows
    are put together, and so on down: a micro-batch is as wide as its longest row, so what is wasted is only what
    neighbours in that order differ by. Over all micro-batches, that is at most ``rows − 1`` times what the fullest and
    the emptiest row differ by; with one row a micro-batch it is nothing.

    Attention costs the square of a row's width, so a micro-batch has as many rows as leave at most ``LITTLE`` to
    padding; where none do, as many as leave the least.

    Args:
        lengths: tokens of each sequence, each at most ``capacity``.
        capacity: tokens of a row at most.
        micro_batches: how many to make.
        most_rows: rows of a micro-batch at most.

    Returns:
        ``micro_batches`` of them, widest first; each sequence is in one of them, whole. A function of the arguments
        alone. Where there are fewer sequences than micro-batches, the last ones are empty.

    Raises:
        ValueError: there is no room; never where each sequence can have a row of its own.
    """
    least, found = math.inf, None
    for rows in range(most_rows, 0, -1):
        cut = _cut(lengths, micro_batches, rows)
        if cut.width > capacity:
            break
        if cut.padding < least:
            least, found = cut.padding, cut.micro_batches
        if cut.padding <= LITTLE * sum(lengths):
            break
    if found is None:
        raise ValueError(f"{len(lengths)} sequences have no room in {micro_batches} x {most_rows} rows of {capacity}")
    return found


class _Cut(NamedTuple):
    micro_batches: list[PackedRows]
    width: int  # of the widest row
    padding: int


def _cut(lengths: Sequence[int], micro_batches: int, rows: int) -> _Cut:
    """Micro-batches of so many rows, whatever the rows' widths."""
    # Descending by tokens; the order of equals is that of their first sequences. Rows without any come last.
    filled = sorted(_longest_first(lengths, rows * micro_batches), key=lambda row: (-row[0], row[1][:1]))
    found = [[row for row in filled[start : start + rows] if row[1]] for start in range(0, len(filled), rows)]
    padding = sum(batch[0][0] - tokens for batch in found for tokens, _ in batch)
    return _Cut([[members for _, members in batch] for batch in found], filled[0][0], padding)


def _longest_first(lengths: Sequence[int], rows: int) -> list[tuple[int, list[int]]]:
    """Tokens and sequences of each row."""
    members: list[list[int]] = [[] for _ in range(rows)]
    heap = [(0, row) for row in range(rows)]
    for sequence in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, row = heap[0]
        members[row].append(sequence)
        heapq.heapreplace(heap, (tokens + lengths[sequence], row))
    return [(tokens, members[row]) for tokens, row in heap]


def fewest_micro_batches(lengths: Sequence[int], *, capacity: int, most_rows: int, multiple_of: int) -> int:
    """The smallest multiple of ``multiple_of`` with which `pack` finds room for every sequence."""
    tokens = sum(lengths)
    count = max(1, -(-tokens // (capacity * most_rows * multiple_of)))
    while True:
        filled = _longest_first(lengths, count * multiple_of * most_rows)
        if max(tokens for tokens, _ in filled) <= capacity:
            return count * multiple_of
        count += 1
