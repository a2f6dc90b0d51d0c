"""Texts as sets of numbers: shingles, by which their likeness is measured, and MinHash signatures of them.

A shingle is ``size`` tokens in a row, and a number is its 64-bit hash: two different shingles get the same one with a
probability of 5e-20, so that what is computed on the numbers is computed on the shingles. All is a function of the
text alone, the same on every machine and in every run.
"""

import hashlib
import re

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint32]

PERMUTATIONS = 128

# Names, numbers and words are tokens, and so is every other character but white space.
_TOKEN = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"\w+")

_BASE = 0x9E3779B97F4A7C15  # odd: multiplying by it loses nothing
_KNOWN = 1 << 18  # tokens whose hashes are kept
_ROWS = 1 << 12  # shingles of which signatures are computed at once


class _TokenHashes(dict[str, int]):
    """The 64-bit hash of each token, kept for the next time."""

    def __missing__(self, token: str) -> int:
        if len(self) >= _KNOWN:
            self.clear()
        digest = hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = self[token] = int.from_bytes(digest, "little")
        return value


_HASHES = _TokenHashes()


def code_tokens(text: str) -> list[str]:
    """Names, numbers, words, and every other character that is no white space."""
    return _TOKEN.findall(text)


def words(text: str) -> list[str]:
    """Lower-case words, without punctuation and white space, as in GPT-3's contamination study."""
    return _WORD.findall(text.lower())


def same_prompt(text: str) -> str:
    """A problem's text without what does not tell it from another: white space."""
    return " ".join(text.split())


def same_code(text: str) -> str:
    """A solution without what does not tell it from another: white space at line ends, and empty lines.

    White space at the beginning of a line is what a Python program says, so it stays.
    """
    lines = (line.rstrip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def digest(text: str) -> bytes:
    """16 bytes that are another text's only by a collision of BLAKE2b."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def shingles(tokens: list[str], size: int) -> Hashes:
    """The distinct shingles of ``size`` tokens, sorted: uint64 [shingles].

    Fewer tokens than that are one shingle; none are none.
    """
    if not tokens:
        return np.empty(0, np.uint64)
    values = np.fromiter(map(_HASHES.__getitem__, tokens), np.uint64, len(tokens))
    size = min(size, len(tokens))
    count = len(tokens) - size + 1
    mixed = np.full(count, size, np.uint64)
    for place in range(size):
        mixed = (mixed ^ values[place : place + count]) * np.uint64(_BASE)
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed)


class MinHash:
    """Signatures whose share of equal entries estimates the Jaccard similarity of the sets they are of.

    Broder 1997, "On the resemblance and containment of documents". The estimate of a similarity J has a standard error
    of sqrt(J (1 − J) / 128), at most 0.044.
    """

    def __init__(self, seed: int = 0) -> None:
        """``seed`` draws the hash functions: multiply-add-shift (Dietzfelbinger 1996), 64 bits to 32."""
        random = np.random.default_rng([seed, 0x4D48])
        self._factors_P = random.integers(0, 2**64, PERMUTATIONS, np.uint64) | np.uint64(1)
        self._offsets_P = random.integers(0, 2**64, PERMUTATIONS, np.uint64)

    def __call__(self, hashes: Hashes) -> Signatures:
        """The signature of a set: uint32 [128]; of an empty one, all ones."""
        least = np.full(PERMUTATIONS, 2**32 - 1, np.uint32)
        for start in range(0, len(hashes), _ROWS):
            mixed = hashes[start : start + _ROWS, None] * self._factors_P + self._offsets_P
            least = np.minimum(least, (mixed >> np.uint64(32)).min(axis=0).astype(np.uint32))
        return least


def standard_error(similarity: float) -> float:
    """Of the estimate of a Jaccard similarity by signatures."""
    return float(np.sqrt(similarity * (1 - similarity) / PERMUTATIONS))


def jaccard(a: Hashes, b: Hashes) -> float:
    """The size of the intersection by that of the union; both are sorted and without repeats. Of two empty sets, 1."""
    if not len(a) and not len(b):
        return 1.0
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)
