"""Rows become tensors: tokenisation, batches, and how a global batch is cut over ranks and micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from wmtp_ds.data.groups import Rows
from wmtp_ds.data.index import DataIndex
from wmtp_ds.data.rows import Row
from wmtp_ds.data.sampling import SamplePlan
from wmtp_ds.data.templates import Template
from wmtp_ds.errors import UserError

NO_ROW = -1  # the row id of a sequence that only fills up a batch

_PREFIX_TOKENS = 8  # more than any tokenizer puts in front of a text


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of B sequences of S tokens, padded on the right.

    Attributes:
        input_ids: int64 [B, S].
        supervised: bool [B, S], the tokens to learn: the solution and its end token.
        decisions: bool [B, S], the positions that emit them: ``decisions[:, i] == supervised[:, i + 1]``.
        rewards: float32 [B], in [0, 1].
        segment_ids: int32 [B, S], 0 for padding and 1 and up for tokens; positions of one id in a sequence belong
            together, and nothing reaches from one id into another.
        row_ids: int64 [B], the rows of the data file, ``NO_ROW`` for a sequence that only fills up.
    """

    input_ids: torch.Tensor
    supervised: torch.Tensor
    decisions: torch.Tensor
    rewards: torch.Tensor
    segment_ids: torch.Tensor
    row_ids: torch.Tensor

    @property
    def host(self) -> "Batch":
        """The batch where it was made, on the CPU: what is counted there need not be waited for on a GPU."""
        return getattr(self, "_host", self)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The batch on another device."""
        moved = Batch(*(getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self)))
        object.__setattr__(moved, "_host", self.host)  # no field: a batch is its tensors
        return moved


class TextEncoder:
    """Text to token ids, without special tokens, from a private copy of a fast tokenizer's core.

    A copy, because settings of the shared one (truncation, padding) are state that another thread may be changing.
    Text that looks like a special token ("<s>" is HTML, too) is encoded as the text it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        """``tokenizer``: a transformers `PreTrainedTokenizerFast` with a BOS and an EOS token.

        Raises:
            UserError: it lacks one of them.
        """
        for name in ("bos_token", "eos_token"):
            if getattr(tokenizer, f"{name}_id") is None:
                raise UserError(
                    f"{tokenizer.name_or_path or 'the tokenizer'}: it has no {name}, which every sequence needs: set "
                    f"{name} in tokenizer_config.json, or choose another models.policy.tokenizer_path"
                )
        self.bos_id: int = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._core.no_truncation()
        self._core.no_padding()
        self._core.encode_special_tokens = True

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text."""
        return [found.ids for found in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]


class Collator:
    """Makes a `Batch` of rows: BOS, prompt, solution, EOS.

    Prompt and solution are tokenised separately. A row longer than ``max_length`` loses the left of its prompt
    (BOS stays), never a part of the solution; a solution that is too long by itself becomes a sequence without
    anything to learn. Both are counted.

    Attributes:
        truncated: prompts cut so far.
        skipped: solutions left out so far; `eligible_rows` keeps them from being drawn at all.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        max_length: int,
        *,
        pad_to_multiple_of: int = 1,
        rewards: npt.NDArray[np.floating] | None = None,
    ) -> None:
        """Args as in `TextEncoder`; ``rewards``: [rows of the file] in [0, 1], None = is_correct."""
        self.encoder = TextEncoder(tokenizer)
        self.template = template
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.rewards = rewards
        self.truncated = 0
        self.skipped = 0

    def __call__(self, rows: Sequence[Row], row_ids: Sequence[int] | Rows) -> Batch:
        """Collate rows; without any, a batch of one sequence of BOS alone, in which nothing is to be learned."""
        prompts = self.encoder([self.template(row) for row in rows])
        solutions = self.encoder([row.output for row in rows])
        sequences = [self._sequence(*pair) for pair in zip(prompts, solutions, strict=True)]
        rewards = [float(row.is_correct) for row in rows]
        if self.rewards is not None:
            rewards = [float(self.rewards[i]) for i in row_ids]
        ids = [int(i) for i in row_ids]
        if not rows:
            sequences, rewards, ids = [([self.encoder.bos_id], 0)], [0.0], [NO_ROW]
        return self._pad(sequences, rewards, ids)

    def _sequence(self, prompt: list[int], solution: list[int]) -> tuple[list[int], int]:
        """Token ids of a row, and how many of the last of them are supervised."""
        room = self.max_length - len(solution) - 2
        if room < 0:
            self.skipped += 1
            return [self.encoder.bos_id], 0
        if len(prompt) > room:
            self.truncated += 1
            prompt = prompt[len(prompt) - room :]
        return [self.encoder.bos_id, *prompt, *solution, self.encoder.eos_id], len(solution) + 1

    def _pad(self, sequences: list[tuple[list[int], int]], rewards: list[float], row_ids: list[int]) -> Batch:
        longest = max(len(tokens) for tokens, _ in sequences)
        shape = len(sequences), -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full(shape, self.encoder.pad_id, dtype=torch.int64)
        supervised = torch.zeros(shape, dtype=torch.bool)
        segment_ids = torch.zeros(shape, dtype=torch.int32)
        for b, (tokens, learned) in enumerate(sequences):
            end = len(tokens)
            input_ids[b, :end] = torch.tensor(tokens)
            supervised[b, end - learned : end] = True
            segment_ids[b, :end] = 1
        decisions = torch.zeros(shape, dtype=torch.bool)
        decisions[:, :-1] = supervised[:, 1:]
        return Batch(
            input_ids=input_ids,
            supervised=supervised,
            decisions=decisions,
            rewards=torch.tensor(rewards, dtype=torch.float32),
            segment_ids=segment_ids,
            row_ids=torch.tensor(row_ids, dtype=torch.int64),
        )


def eligible_rows(index: DataIndex, tokenizer: Any, max_length: int) -> tuple[npt.NDArray[np.bool_], int]:
    """Which rows' solutions fit into ``max_length`` tokens with BOS and EOS: bool [rows], and how many do not.

    Only solutions long enough to matter are read and tokenised. A byte-level or SentencePiece tokenizer makes at
    most one token of a byte, and a few more for the space that it may put in front.
    """
    encoder = TextEncoder(tokenizer)
    room = max_length - 2
    mask = np.ones(len(index), np.bool_)
    doubtful = np.flatnonzero(index.output_bytes > room - _PREFIX_TOKENS)
    for chunk in _chunks(doubtful, 512):  # a bounded number of texts in memory, enough for the tokenizer's threads
        lengths = [len(ids) for ids in encoder([index.read_row(int(i)).output for i in chunk])]
        mask[chunk] = np.array(lengths) <= room
    return mask, int(np.count_nonzero(~mask))


def micro_batches(
    plan: SamplePlan, step: int, rank: int, world_size: int, batch_size: int, accumulation: int
) -> list[Rows]:
    """The rows of one rank's micro-batches of optimizer step ``step``: ``accumulation`` arrays of int64 [batch_size].

    Draw ``(a * world_size + rank) * batch_size + b`` of the step is sequence ``b`` of micro-batch ``a`` on that
    rank, so that the ranks' micro-batches together are the global batch, however it is cut.
    """
    cut = plan.rows(step).reshape(accumulation, world_size, batch_size)
    return list(cut[:, rank])


def validation_batches(rows: Rows, rank: int, world_size: int, batch_size: int) -> list[Rows]:
    """One rank's share of ``rows``, in order and without repeats: arrays of at most ``batch_size`` row ids.

    Every rank gets equally many, because each is a collective forward pass; those at the end may be shorter, or
    empty (`Collator` makes a batch of them all the same).
    """
    return [chunk[rank * batch_size :][:batch_size] for chunk in _chunks(rows, world_size * batch_size)]


def _chunks(rows: Rows, size: int) -> Iterator[Rows]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
