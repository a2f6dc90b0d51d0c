"""What a model is given: tensors of tokens, and which of them belong together."""

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Self

import torch

NO_ROW = -1  # the row id of a sequence that only fills up a batch


@dataclass(frozen=True, eq=False)
class Packing:
    """What keeps the sequences of one row apart in attention.

    Attributes:
        position_ids: int64 [B, S], a token's place in its own sequence.
        segment_ids: int32 [B, S], as in `Batch`.
    """

    position_ids: torch.Tensor
    segment_ids: torch.Tensor

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """[B, 1, S, S], 0 where a query (row) may see a key: of its segment and not after it; -inf elsewhere."""
        segments = self.segment_ids
        together = segments[:, None, :, None] == segments[:, None, None, :]
        length = segments.shape[1]
        before = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
        return torch.zeros_like(together, dtype=dtype).masked_fill(~(together & before), -torch.inf)


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of B rows of S tokens, padded on the right. Each row is a sequence: one solution.

    What is said of sequences (their last decision, their reward) is asked of `by_sequence`, and holds for
    `PackedBatch`, too, whose rows hold several. G is the number of sequences; here it is B.

    Attributes:
        input_ids: int64 [B, S].
        supervised: bool [B, S], the tokens to learn: the solution and its end token.
        decisions: bool [B, S], the positions that emit them: ``decisions[:, i] == supervised[:, i + 1]``.
        rewards: float32 [G], in [0, 1].
        segment_ids: int32 [B, S], 0 for padding and 1 and up for tokens; positions of one id in a row belong
            together, and nothing reaches from one id into another.
        row_ids: int64 [G], the rows of the data file, ``NO_ROW`` for a sequence that only fills up.
        correct: bool [G], ``is_correct`` of the row, whatever its reward comes from.
        reference: float32 [B, S], the reference model's cross-entropy of each supervised token, 0 elsewhere, where it
            was computed beforehand; else None.
    """

    input_ids: torch.Tensor
    supervised: torch.Tensor
    decisions: torch.Tensor
    rewards: torch.Tensor
    segment_ids: torch.Tensor
    row_ids: torch.Tensor
    correct: torch.Tensor
    reference: torch.Tensor | None = field(default=None, kw_only=True)

    @property
    def packing(self) -> Packing | None:
        """What attention must be told; None where each row is a sequence."""
        return None

    @property
    def sequence_ids(self) -> torch.Tensor | None:
        """int64 [B, S], the sequence of each position, from 0; None where that is the row."""
        return None

    def by_sequence(self, x_BS: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [G, L], one row for each sequence, 0 after its end. Differentiable."""
        return x_BS

    def by_row(self, x_GL: torch.Tensor) -> torch.Tensor:
        """The inverse of `by_sequence`: [G, L] -> [B, S], 0 at padding. [G, 1] gives each sequence one number."""
        return x_GL

    @property
    def host(self) -> Self:
        """The batch where it was made, on the CPU: what is counted there need not be waited for on a GPU."""
        return getattr(self, "_host", self)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The batch on another device."""
        tensors = {each.name: getattr(self, each.name) for each in fields(self)}
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device, non_blocking=non_blocking)
            for name, tensor in tensors.items()
        }
        batch = type(self)(**moved)
        object.__setattr__(batch, "_host", self.host)  # no field: a batch is its tensors
        return batch


@dataclass(frozen=True, eq=False)
class PackedBatch(Batch):
    """One micro-batch whose rows hold several sequences, one after another, each from its own BOS to its own EOS.

    Attributes:
        members: int64 [B, S], the sequence that a position belongs to, from 0 and ascending along the rows; padding
            counts to the sequence before it.
        position_ids: int64 [B, S], a token's place in its own sequence.
        places: int64 [G, L], where each token of a sequence stands in the flattened [B * S]; -1 after its end.
    """

    members: torch.Tensor
    position_ids: torch.Tensor
    places: torch.Tensor

    @cached_property
    def packing(self) -> Packing:
        """What attention must be told."""
        return Packing(self.position_ids, self.segment_ids)

    @property
    def sequence_ids(self) -> torch.Tensor:
        """int64 [B, S], the sequence of each position, from 0."""
        return self.members

    def by_sequence(self, x_BS: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [G, L], one row for each sequence, 0 after its end. Differentiable."""
        return x_BS.flatten()[self.places.clamp(min=0)].masked_fill(self.places < 0, 0)

    def by_row(self, x_GL: torch.Tensor) -> torch.Tensor:
        """The inverse of `by_sequence`: [G, L] -> [B, S], 0 at padding. [G, 1] gives each sequence one number."""
        last = x_GL.shape[1] - 1
        found_BS = x_GL[self.members, self.position_ids.clamp(max=last)]
        return found_BS.masked_fill(self.segment_ids == 0, 0)
