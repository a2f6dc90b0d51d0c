"""Near duplicates among many texts: candidates by locality-sensitive hashing, then verified exactly."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wmtp_ds.data.duplicates_shingles import (
    PERMUTATIONS,
    Hashes,
    Signatures,
    jaccard,
    standard_error,
)

LEAST_THRESHOLD = 0.3
MISSED = 1e-3  # of the pairs that are exactly as similar as the threshold, the share that may escape
_ERRORS = 4.0  # standard errors below the threshold at which a candidate is not worth verifying
_KEPT = 256  # sets of shingles in memory


class Duplicate(NamedTuple):
    """A text and the earlier one that it repeats, by their positions, and the Jaccard similarity of their shingles."""

    text: int
    of: int
    similarity: float


def repeats(
    members: npt.NDArray[np.int64],
    digests: npt.NDArray[np.void],
    groups: npt.NDArray[np.int64],
    signatures: Signatures,
    threshold: float,
    read: Callable[[int], Hashes],
    owners: npt.NDArray[np.int64] | None = None,
) -> list[Duplicate]:
    """The members that repeat an earlier one, exactly or nearly, in order.

    Args:
        members: int64 [members], the texts that are compared, ascending.
        digests: 16 bytes [texts], the same for the same texts, whose shingles are the same, too.
        groups: as for `near_duplicates`, like the following, but over all texts.
        signatures: likewise.
        threshold: likewise.
        read: likewise.
        owners: likewise.
    """
    first: dict[tuple[int, bytes], int] = {}
    copies, rest = [], []
    for member in members.tolist():
        # A copy of a text needs no search. Between owners it does: the first may not be one to compare it to.
        known = member if owners is not None else first.setdefault((groups[member], digests[member].tobytes()), member)
        if known == member:
            rest.append(member)
        else:
            copies.append((member, known))
    places = np.array(rest, np.int64)
    nearly = near_duplicates(
        signatures[places],
        groups[places],
        threshold,
        lambda place: read(rest[place]),
        None if owners is None else owners[places],
    )
    found = {rest[pair.text]: Duplicate(rest[pair.text], rest[pair.of], pair.similarity) for pair in nearly}
    for member, known in copies:
        # What repeats a near duplicate exactly repeats what that one repeats.
        found[member] = found[known]._replace(text=member) if known in found else Duplicate(member, known, 1.0)
    return [found[text] for text in sorted(found)]


def rows_of_band(threshold: float) -> int:
    """Entries of a band: the most with which at most ``MISSED`` of the pairs at the threshold are no candidates.

    With r entries in each of b = 128 // r bands, a pair of similarity s is a candidate with 1 − (1 − s^r)^b
    (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4).
    """
    fitting = [r for r in range(1, 17) if missed(threshold, r) <= MISSED]
    return max(fitting, default=1)


def missed(similarity: float, rows: int) -> float:
    """The probability that a pair of that similarity is no candidate."""
    return float((1 - similarity**rows) ** (PERMUTATIONS // rows))


def near_duplicates(
    signatures: Signatures,
    groups: npt.NDArray[np.int64],
    threshold: float,
    read: Callable[[int], Hashes],
    owners: npt.NDArray[np.int64] | None = None,
) -> list[Duplicate]:
    """The texts that are near duplicates of an earlier text that is none.

    Texts are taken in order. One is a duplicate if its similarity to a text that was kept is at least ``threshold``;
    of several, the most similar is named, and the earliest of those. So no duplicate is less similar than that to the
    one it repeats, as it may be in chains of duplicates, and among the kept ones none is left that was a candidate.

    Args:
        signatures: uint32 [texts, 128].
        groups: int64 [texts]; only texts of the same group are compared.
        threshold: a Jaccard similarity, at least ``LEAST_THRESHOLD``.
        read: the shingles of a text, by its position.
        owners: int64 [texts]; texts of the same owner are not compared. None: each has its own.

    Returns:
        The duplicates, in order. Without false ones: each similarity is that of the sets, not of the signatures.
    """
    buckets = _buckets(signatures, groups, rows_of_band(threshold))
    floor = (threshold - _ERRORS * standard_error(threshold)) * PERMUTATIONS
    members: dict[int, list[int]] = {}
    cached = _Cache(read)
    found = []
    for text, of_text in enumerate(buckets):
        shared = [int(bucket) for bucket in of_text[of_text >= 0]]
        candidates = sorted({other for bucket in shared for other in members.get(bucket, ())})
        if owners is not None:
            candidates = [other for other in candidates if owners[other] != owners[text]]
        best = _best(text, candidates, signatures, floor, cached)
        if best is not None and best.similarity >= threshold:
            found.append(best)
        else:
            for bucket in shared:
                members.setdefault(bucket, []).append(text)
    return found


def _best(
    text: int, candidates: Sequence[int], signatures: Signatures, floor: float, read: Callable[[int], Hashes]
) -> Duplicate | None:
    """The candidate that is most similar, if any may reach the threshold."""
    if not candidates:
        return None
    equal = np.count_nonzero(signatures[candidates] == signatures[text], axis=1)
    likely = [other for other, count in zip(candidates, equal.tolist(), strict=True) if count >= floor]
    own = read(text) if likely else None
    best = None
    for other in likely:
        assert own is not None
        similarity = jaccard(own, read(other))
        if best is None or similarity > best.similarity:
            best = Duplicate(text, other, similarity)
    return best


def _buckets(signatures: Signatures, groups: npt.NDArray[np.int64], rows: int) -> npt.NDArray[np.int32]:
    """The buckets of each text, int32 [texts, bands]; -1 where no other text is in it, as in most."""
    bands = PERMUTATIONS // rows
    buckets = np.full((len(signatures), bands), -1, np.int32)
    count = 0
    for band in range(bands):
        keys = groups.astype(np.uint64)
        for column in range(band * rows, (band + 1) * rows):
            keys = (keys ^ signatures[:, column]) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
        _, inverse, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        shared = np.flatnonzero(sizes > 1)
        names = np.full(len(sizes), -1, np.int32)
        names[shared] = count + np.arange(len(shared))
        buckets[:, band] = names[inverse]
        count += len(shared)
    return buckets


class _Cache:
    """The shingles of the texts that were asked for last."""

    def __init__(self, read: Callable[[int], Hashes]) -> None:
        self._read = read
        self._kept: OrderedDict[int, Hashes] = OrderedDict()

    def __call__(self, text: int) -> Hashes:
        if text in self._kept:
            self._kept.move_to_end(text)
        else:
            self._kept[text] = self._read(text)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._kept[text]
