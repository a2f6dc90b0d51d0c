"""What a data file holds: counts, difficulties, and lengths of prompts and solutions, in bytes and in tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wmtp_ds.data.index import DataIndex
from wmtp_ds.data.templates import Template
from wmtp_ds.data.text_encoder import TextEncoder, encode_rows
from wmtp_ds.data.token_cache import TokenCache

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_CHUNK = 512  # rows that are tokenised together

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenLengths:
    """Tokens of each row, and what becomes of them at a ``max_length``.

    Attributes:
        prompts: int64 [rows], without BOS.
        solutions: int64 [rows], without EOS.
        max_length: tokens of a sequence.
    """

    prompts: Lengths
    solutions: Lengths
    max_length: int

    @property
    def fits(self) -> npt.NDArray[np.bool_]:
        """Whether the solution fits, with BOS and EOS; rows where it does not are never drawn: bool [rows]."""
        return self.solutions + 2 <= self.max_length

    @property
    def truncated(self) -> npt.NDArray[np.bool_]:
        """Whether the prompt loses its left: bool [rows]."""
        return self.fits & (self.prompts + self.solutions + 2 > self.max_length)

    @property
    def sequences(self) -> Lengths:
        """Tokens of the sequence, BOS and EOS included, as it is trained on; 0 where the solution does not fit."""
        return np.where(self.fits, np.minimum(self.prompts + self.solutions + 2, self.max_length), 0)

    @property
    def supervised(self) -> Lengths:
        """Tokens to learn: the solution's and EOS; 0 where it does not fit."""
        return np.where(self.fits, self.solutions + 1, 0)


def count_tokens(
    index: DataIndex, encoder: TextEncoder, template: Template, max_length: int, cache: TokenCache | None
) -> TokenLengths:
    """Tokens of every row: from the cache, or by tokenising the rows where there is none.

    Raises:
        RunError: the file has changed since it was indexed.
    """
    if cache is not None:
        return TokenLengths(*cache.lengths(), max_length)
    lengths = []
    for start in range(0, len(index), _CHUNK):
        rows = [index.read_row(i) for i in range(start, min(start + _CHUNK, len(index)))]
        lengths += [(len(prompt), len(solution)) for prompt, solution in encode_rows(encoder, template, rows)]
    prompts, solutions = np.array(lengths, np.int64).T
    return TokenLengths(prompts, solutions, max_length)


def prompt_bytes(index: DataIndex, template: Template, on_done: Callable[[int], None] = lambda count: None) -> Lengths:
    """The length of each row's prompt in UTF-8 bytes: int64 [rows].

    Raises:
        RunError: the file has changed since it was indexed.
    """
    found = np.empty(len(index), np.int64)
    for i in range(len(index)):
        found[i] = len(template(index.read_row(i)).encode())
        on_done(1)
    return found


def spread(values: npt.NDArray[np.integer]) -> dict[str, float]:
    """Smallest, percentiles, largest and mean of whole numbers, of which there is at least one.

    The percentile p is the smallest of them that at least p % do not exceed: one of the values, no mean of two.
    """
    found = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return {
        "min": int(values.min()),
        **{f"p{p}": int(value) for p, value in zip(PERCENTILES, found, strict=True)},
        "max": int(values.max()),
        "mean": round(float(values.mean()), 1),
    }


def count_rows(index: DataIndex) -> dict[str, Any]:
    """Rows and problems by correctness and difficulty, ready for JSON; a difficulty of 0 is an unknown one."""
    rows_of_problem = np.bincount(index.problem, minlength=len(index.problem_names))
    right = np.bincount(index.problem[index.is_correct], minlength=len(index.problem_names))
    difficulties = np.unique(index.difficulty)
    return {
        "rows": len(index),
        "correct": int(index.is_correct.sum()),
        "incorrect": int((~index.is_correct).sum()),
        "problems": len(index.problem_names),
        "problems_without_correct": int((right == 0).sum()),
        "problems_without_incorrect": int((right == rows_of_problem).sum()),
        "rows_per_problem": spread(rows_of_problem),
        "by_difficulty": {
            str(level): {
                "correct": int((index.is_correct & (index.difficulty == level)).sum()),
                "incorrect": int((~index.is_correct & (index.difficulty == level)).sum()),
                "problems": len(np.unique(index.problem[index.difficulty == level])),
            }
            for level in difficulties.tolist()
        },
    }


def describe_tokens(lengths: TokenLengths) -> dict[str, Any]:
    """Lengths in tokens and what ``max_length`` does to them, ready for JSON."""
    return {
        "max_length": lengths.max_length,
        "prompt": spread(lengths.prompts),
        "solution": spread(lengths.solutions),
        "sequence": spread(lengths.prompts + lengths.solutions + 2),
        "prompts_truncated": int(lengths.truncated.sum()),
        "solutions_skipped": int((~lengths.fits).sum()),
        "tokens": int(lengths.sequences.sum()),
        "supervised_tokens": int(lengths.supervised.sum()),
    }
