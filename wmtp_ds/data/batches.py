"""Rows become tensors: tokenisation, batches, and how a global batch is cut over ranks and micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wmtp_ds.data.batch import NO_ROW, Batch, PackedBatch
from wmtp_ds.data.groups import Rows
from wmtp_ds.data.index import DataIndex
from wmtp_ds.data.rows import Row
from wmtp_ds.data.sampling import SamplePlan
from wmtp_ds.data.templates import Template
from wmtp_ds.data.text_encoder import Pair, TextEncoder, encode_rows
from wmtp_ds.data.token_cache import TokenCache

# (row id, token ids [tokens], how many of the last of them are supervised) -> float32 [supervised]
ReferenceLosses = Callable[[int, Rows, int], npt.NDArray[np.float32]]

_PREFIX_TOKENS = 8  # more than any tokenizer puts in front of a text


class Collator:
    """Makes a `Batch` of rows: BOS, prompt, solution, EOS.

    Prompt and solution are tokenised separately. A row longer than ``max_length`` loses the left of its prompt
    (BOS stays), never a part of the solution; a solution that is too long by itself becomes a sequence without
    anything to learn. Both are counted.

    Attributes:
        truncated: prompts cut so far.
        skipped: solutions left out so far; `eligible_rows` keeps them from being drawn at all.
        reference: what gives batches the reference model's losses, where they were computed beforehand.
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
        self.reference: ReferenceLosses | None = None
        self.truncated = 0
        self.skipped = 0

    def __call__(self, rows: Sequence[Row], row_ids: Sequence[int] | Rows) -> Batch:
        """Collate rows; without any, a batch of one sequence of BOS alone, in which nothing is to be learned."""
        return self.collate(self.encode(rows), [row.is_correct for row in rows], row_ids)

    def encode(self, rows: Sequence[Row]) -> list[Pair]:
        """Token ids of each row's prompt and solution."""
        return encode_rows(self.encoder, self.template, rows)

    def lengths(self, prompts: npt.NDArray[np.int64], solutions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of the sequences that prompts and solutions of so many tokens become, int64 [rows]."""
        room = self.max_length - solutions - 2
        lengths: npt.NDArray[np.int64] = np.where(room < 0, 1, np.minimum(prompts, room) + solutions + 2)
        return lengths

    def collate(
        self, pairs: Sequence[Pair], labels: Sequence[bool] | npt.NDArray[np.bool_], row_ids: Sequence[int] | Rows
    ) -> Batch:
        """As a call, of rows whose token ids are known.

        Args:
            pairs: token ids of each row's prompt and solution.
            labels: is_correct of each row.
            row_ids: their numbers in the data file.
        """
        if not len(pairs):
            return self._lone()
        return self.join([self.sequence(*pair) for pair in pairs], labels, row_ids)

    def join(
        self,
        sequences: Sequence[tuple[Rows, int]],
        labels: Sequence[bool] | npt.NDArray[np.bool_],
        row_ids: Sequence[int] | Rows,
    ) -> Batch:
        """As `collate`, of at least one sequence that is made already (`sequence`)."""
        shape = len(sequences), self._width(max(len(tokens) for tokens, _ in sequences))
        input_ids = np.full(shape, self.encoder.pad_id, np.int64)
        supervised, segment_ids = np.zeros(shape, np.bool_), np.zeros(shape, np.int32)
        losses = np.zeros(shape, np.float32)
        for b, (tokens, learned) in enumerate(sequences):
            end = len(tokens)
            input_ids[b, :end] = tokens
            supervised[b, end - learned : end] = True
            segment_ids[b, :end] = 1
            if self.reference is not None:
                losses[b, end - learned : end] = self.reference(int(row_ids[b]), tokens, learned)
        return Batch(**self._tensors(input_ids, supervised, segment_ids, labels, row_ids), **self._given(losses))

    def pack(
        self,
        pairs: Sequence[Pair],
        labels: Sequence[bool] | npt.NDArray[np.bool_],
        row_ids: Sequence[int] | Rows,
        counts: Sequence[int],
    ) -> Batch:
        """Several sequences in a row: ``counts[b]`` in row ``b``, in order. Other arguments as in `collate`."""
        if not counts:
            return self._lone()
        sequences = iter([self.sequence(*pair) for pair in pairs])
        rows = [list(islice(sequences, count)) for count in counts]
        shape = len(rows), self._width(max(sum(len(tokens) for tokens, _ in row) for row in rows))
        input_ids = np.full(shape, self.encoder.pad_id, np.int64)
        supervised, segment_ids = np.zeros(shape, np.bool_), np.zeros(shape, np.int32)
        losses = np.zeros(shape, np.float32)
        members, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        longest = max(len(tokens) for row in rows for tokens, _ in row)
        places = np.full((sum(map(len, rows)), longest), -1, np.int64)
        g = 0
        for b, row in enumerate(rows):
            start = 0
            for segment, (tokens, learned) in enumerate(row, start=1):
                end = start + len(tokens)
                input_ids[b, start:end] = tokens
                supervised[b, end - learned : end] = True
                segment_ids[b, start:end] = segment
                if self.reference is not None:
                    losses[b, end - learned : end] = self.reference(int(row_ids[g]), tokens, learned)
                members[b, start:] = g
                position_ids[b, start:] = np.arange(shape[1] - start)
                places[g, : len(tokens)] = b * shape[1] + np.arange(start, end)
                start, g = end, g + 1
        tensors = self._tensors(input_ids, supervised, segment_ids, labels, row_ids) | self._given(losses)
        own = {"members": members, "position_ids": position_ids, "places": places}
        return PackedBatch(**tensors, **{name: torch.from_numpy(array) for name, array in own.items()})

    def sequence(self, prompt: npt.NDArray[np.integer], solution: npt.NDArray[np.integer]) -> tuple[Rows, int]:
        """Token ids of a row's prompt and solution as one sequence, and how many of its last are supervised."""
        room = self.max_length - len(solution) - 2
        bos, eos = [self.encoder.bos_id], [self.encoder.eos_id]
        if room < 0:
            self.skipped += 1
            return np.array(bos, np.int64), 0
        if len(prompt) > room:
            self.truncated += 1
            prompt = prompt[len(prompt) - room :]
        return np.concatenate([bos, prompt, solution, eos], dtype=np.int64), len(solution) + 1

    def _given(self, losses: npt.NDArray[np.float32]) -> dict[str, torch.Tensor]:
        """The field ``reference`` of a `Batch`, where there is one."""
        return {} if self.reference is None else {"reference": torch.from_numpy(losses)}

    def _width(self, longest: int) -> int:
        return -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of

    def _tensors(
        self,
        input_ids: npt.NDArray[np.int64],
        supervised: npt.NDArray[np.bool_],
        segment_ids: npt.NDArray[np.int32],
        labels: Sequence[bool] | npt.NDArray[np.bool_],
        row_ids: Sequence[int] | Rows,
    ) -> dict[str, torch.Tensor]:
        """The fields of a `Batch`."""
        decisions = np.zeros_like(supervised)
        decisions[:, :-1] = supervised[:, 1:]
        numbers = np.asarray(row_ids, np.int64)
        rewards = np.asarray(labels) if self.rewards is None else self.rewards[numbers]
        return {
            "input_ids": torch.from_numpy(input_ids),
            "supervised": torch.from_numpy(supervised),
            "decisions": torch.from_numpy(decisions),
            "rewards": torch.from_numpy(rewards.astype(np.float32)),
            "segment_ids": torch.from_numpy(segment_ids),
            "row_ids": torch.from_numpy(numbers.copy()),
            "correct": torch.tensor(np.asarray(labels, np.bool_)),
        }

    def _lone(self) -> Batch:
        """A sequence of BOS alone."""
        input_ids = np.full((1, self._width(1)), self.encoder.pad_id, np.int64)
        input_ids[0, 0] = self.encoder.bos_id
        segment_ids = (np.arange(input_ids.shape[1]) == 0).astype(np.int32)[None]
        tensors = self._tensors(input_ids, np.zeros_like(input_ids, np.bool_), segment_ids, [False], [0])
        tensors |= self._given(np.zeros(input_ids.shape, np.float32))
        return Batch(**tensors | {"rewards": torch.zeros(1), "row_ids": torch.tensor([NO_ROW])})


def eligible_rows(
    index: DataIndex, tokenizer: Any, max_length: int, cache: TokenCache | None = None
) -> tuple[npt.NDArray[np.bool_], int]:
    """Which rows' solutions fit into ``max_length`` tokens with BOS and EOS: bool [rows], and how many do not.

    A cache knows. Without one, only solutions long enough to matter are read and tokenised: a byte-level or
    SentencePiece tokenizer makes at most one token of a byte, and a few more for the space that it may put in front.
    """
    room = max_length - 2
    if cache is not None:
        mask = cache.lengths()[1] <= room
        return mask, int(np.count_nonzero(~mask))
    encoder = TextEncoder(tokenizer)
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
