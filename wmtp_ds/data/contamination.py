"""Training texts that say what evaluation texts say: exactly, nearly, or by long n-grams that they share.

The n-grams are those of Brown et al. 2020, "Language Models are Few-Shot Learners" (GPT-3), appendix C: 13 lower-case
words in a row without punctuation, fewer (but at least 8) where the evaluation text is shorter. There a single one
counts; here, as in Chowdhery et al. 2022, "PaLM", section 8, a share of the evaluation text's n-grams, 70 %, because
programs share idioms. A share of 0 is GPT-3's rule.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wmtp_ds.data.contamination_sources import PROBLEM, SOLUTION, EvaluationText
from wmtp_ds.data.duplicates_shingles import Hashes, code_tokens, digest, same_code, same_prompt, shingles, words
from wmtp_ds.data.groups import exact

LEAST_NGRAM = 8


class Overlap(NamedTuple):
    """What a training text shares with an evaluation text.

    ``rule`` is "exact" (the same but for white space), "near" (a Jaccard similarity of at least the threshold) or
    "ngram" (a share of its n-grams); ``similarity`` is that Jaccard similarity, or that share.
    """

    rule: str
    similarity: float
    of: EvaluationText


class ContainedSets:
    """Sets of hashes, to be asked which of them lie in another set for at least a share of theirs.

    Exact, by prefix filtering (Chaudhuri et al. 2006; Bayardo et al. 2007): of a set of m hashes of which k must be
    shared, one of any m − k + 1 is shared, so only its rarest m − k + 1 are looked up.
    """

    def __init__(self, sets: Sequence[Hashes], share: float) -> None:
        """``share``: in [0, 1]; of 0, one hash must be shared. An empty set lies in none."""
        self.sets = sets
        self._needed = [max(1, math.ceil(exact(share) * len(one))) for one in sets]
        every, uses = np.unique(np.concatenate([*sets, np.empty(0, np.uint64)]), return_counts=True)
        prefixes = [np.empty(0, np.uint64)]
        owners = [np.empty(0, np.int64)]
        for i, (one, needed) in enumerate(zip(sets, self._needed, strict=True)):
            rarest = one[np.argsort(uses[np.searchsorted(every, one)], kind="stable")][: len(one) - needed + 1]
            prefixes.append(rarest)
            owners.append(np.full(len(rarest), i))
        hashes, owner = np.concatenate(prefixes), np.concatenate(owners)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._owners = hashes[order], owner[order]

    def shared(self, hashes: Hashes) -> list[tuple[int, int]]:
        """Number, and count of shared hashes, of each set that lies in ``hashes`` (sorted, distinct) for its share."""
        begins = np.searchsorted(self._hashes, hashes, "left")
        ends = np.searchsorted(self._hashes, hashes, "right")
        candidates: npt.NDArray[np.int64] = np.unique(
            np.concatenate([np.empty(0, np.int64)] + [self._owners[a:b] for a, b in _spans(begins, ends)])
        )
        found = []
        for i in candidates.tolist():
            count = len(np.intersect1d(self.sets[i], hashes, assume_unique=True))
            if count >= self._needed[i]:
                found.append((i, count))
        return found


def _spans(begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    some = np.flatnonzero(ends > begins)
    return list(zip(begins[some].tolist(), ends[some].tolist(), strict=True))


@dataclass(frozen=True)
class _NGrams:
    size: int
    texts: list[int]
    sets: ContainedSets


class EvaluationSet:
    """Evaluation texts, ready to be compared to. They are held in memory as hashes."""

    def __init__(
        self, texts: Iterable[EvaluationText], *, threshold: float, shingle: int, ngram: int | None, share: float
    ) -> None:
        """Read the texts.

        Args:
            texts: problems and solutions.
            threshold: the Jaccard similarity of a near duplicate.
            shingle: tokens of a shingle.
            ngram: words of an n-gram; None compares none.
            share: of an evaluation text's n-grams, how many a training text must have.
        """
        self.texts: list[EvaluationText] = []
        self._threshold, self._shingle = threshold, shingle
        self._same: dict[tuple[str, bytes], int] = {}
        found: list[Hashes] = []
        by_size: dict[int, list[tuple[int, Hashes]]] = {}
        for text in texts:
            key = (text.part, digest(normalised(text.part, text.text)))
            if not text.text.strip() or key in self._same:
                continue
            self._same[key] = number = len(self.texts)
            self.texts.append(text._replace(text=""))
            found.append(shingles(code_tokens(text.text), shingle))
            if ngram is not None and len(said := words(text.text)) >= min(LEAST_NGRAM, ngram):
                size = min(ngram, len(said))
                by_size.setdefault(size, []).append((number, shingles(said, size)))
        self._near = ContainedSets(found, threshold)
        self._ngrams = [
            _NGrams(size, [number for number, _ in of_size], ContainedSets([one for _, one in of_size], share))
            for size, of_size in sorted(by_size.items())
        ]

    def compare(self, part: str, text: str) -> Overlap | None:
        """What a training text shares with them, by the first rule that finds something; None if none does.

        Args:
            part: ``PROBLEM`` or ``SOLUTION``. Exact and near duplicates are those of the same part; n-grams are looked
                for in all, because a problem may be quoted in a solution.
            text: the training text.
        """
        same = self._same.get((part, digest(normalised(part, text))))
        if same is not None:
            return Overlap("exact", 1.0, self.texts[same])
        own = shingles(code_tokens(text), self._shingle)
        near = [
            (count / (len(own) + len(self._near.sets[i]) - count), -i)
            for i, count in self._near.shared(own)
            if self.texts[i].part == part
        ]
        similarity, place = max(near, default=(0.0, 0))
        if near and similarity >= self._threshold:
            return Overlap("near", similarity, self.texts[-place])
        return self._by_ngrams(text)

    def _by_ngrams(self, text: str) -> Overlap | None:
        said = words(text)
        best: tuple[float, int] | None = None
        for of_size in self._ngrams:
            if len(said) < of_size.size:
                break
            for i, count in of_size.sets.shared(shingles(said, of_size.size)):
                share, number = count / len(of_size.sets.sets[i]), of_size.texts[i]
                if best is None or (share, -number) > (best[0], -best[1]):
                    best = share, number
        return None if best is None else Overlap("ngram", best[0], self.texts[best[1]])


def normalised(part: str, text: str) -> str:
    """A text without the white space that does not tell it from another of its part."""
    return {PROBLEM: same_prompt, SOLUTION: same_code}[part](text)
