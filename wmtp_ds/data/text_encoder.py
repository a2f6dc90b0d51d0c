"""Rows and their texts to token ids."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from wmtp_ds.data.rows import Row
from wmtp_ds.data.templates import Template
from wmtp_ds.errors import UserError

Pair = tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]  # token ids of a prompt and of a solution


class TextEncoder:
    """Text to token ids, without special tokens, from a private copy of a fast tokenizer's core.

    A copy, because settings of the shared one (truncation, padding) are state that another thread may be changing.
    Text that looks like a special token ("<s>" is HTML, too) is encoded as the text it is.
    """

    def __init__(self, tokenizer: Any, *, needs_bos: bool = True) -> None:
        """``tokenizer``: a transformers `PreTrainedTokenizerFast` with an EOS token, and a BOS if ``needs_bos``.

        Raises:
            UserError: it lacks one of them.
        """
        for name in ("bos_token", "eos_token") if needs_bos else ("eos_token",):
            if getattr(tokenizer, f"{name}_id") is None:
                raise UserError(
                    f"{tokenizer.name_or_path or 'the tokenizer'}: it has no {name}, which every sequence needs: set "
                    f"{name} in tokenizer_config.json, or choose another models.policy.tokenizer_path"
                )
        self.bos_id: int = tokenizer.bos_token_id
        # What a sequence begins with.
        self.beginning: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._core.no_truncation()
        self._core.no_padding()
        self._core.encode_special_tokens = True

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text."""
        return [found.ids for found in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where each token of a text begins and ends in it, in characters."""
        found: list[tuple[int, int]] = self._core.encode(text, add_special_tokens=False).offsets
        return found

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id that a text can get."""
        return max(self._core.get_vocab(with_added_tokens=True).values(), default=0) + 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that token ids depend on: vocabulary, merges, normalisation, and how they are used."""
        return hashlib.sha256(self._core.to_str().encode()).hexdigest()


def encode_rows(encoder: TextEncoder, template: Template, rows: Sequence[Row]) -> list[Pair]:
    """Token ids of prompt and solution of each row, tokenised separately, without special tokens."""
    prompts = encoder([template(row) for row in rows])
    solutions = encoder([row.output for row in rows])
    return [(np.array(p, np.int64), np.array(s, np.int64)) for p, s in zip(prompts, solutions, strict=True)]
