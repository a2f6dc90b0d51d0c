"""Keys and values of tokens that were read, for rows of different lengths."""

from collections.abc import Sequence

import torch
from torch import Tensor


class SlotCache:
    """Token ``i`` of a row lies in the row's slot ``i``; what a row has not kept is written over.

    So rows may differ in how many tokens they have, and a token is taken back by counting it no longer: nothing
    reads a slot beyond the one it stands in. Blocks of transformers know it as ``past_key_values``.

    Args:
        rows: of the batch.
        capacity: slots of a row.
        device: of the keys and values.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device):
        self.capacity = capacity
        self._lengths = [0] * rows
        self._device = device
        self._keys: dict[int, Tensor] = {}  # by layer, [B, H, capacity, E]
        self._values: dict[int, Tensor] = {}
        self._slots_Bq = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        self._used = 0

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row has."""
        return list(self._lengths)

    def expect(self, count: int) -> None:
        """Every row is about to read ``count`` more tokens, behind those that it has."""
        starts_B1 = torch.tensor(self._lengths, device=self._device)[:, None]
        self._slots_Bq = starts_B1 + torch.arange(count, device=self._device)
        self._used = max(self._lengths) + count
        assert self._used <= self.capacity, "the cache is too small"

    def advance(self, counts: Sequence[int]) -> None:
        """Each row keeps so many of the tokens that it has just read."""
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows alone."""
        chosen = torch.tensor(rows, device=self._device)
        self._lengths = [self._lengths[row] for row in rows]
        for tensors in (self._keys, self._values):
            for layer, tensor in tensors.items():
                tensors[layer] = tensor[chosen]

    @property
    def position_ids(self) -> Tensor:
        """Of the tokens that are about to be read, ``[B, q]``."""
        return self._slots_Bq

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What each of these tokens may read, as numbers to add to scores: ``[B, 1, q, slots in use]``."""
        slots_L = torch.arange(self._used, device=self._device)
        hidden_BqL = slots_L > self._slots_Bq[:, :, None]
        zeros = torch.zeros(hidden_BqL.shape, dtype=dtype, device=self._device)
        return zeros.masked_fill_(hidden_BqL, torch.finfo(dtype).min)[:, None]

    def update(self, keys_BHqE: Tensor, values_BHqE: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values of these tokens; returns those of all slots in use, ``[B, H, L, E]``."""
        if layer not in self._keys:
            batch, heads, _, size = keys_BHqE.shape
            self._keys[layer] = keys_BHqE.new_zeros(batch, heads, self.capacity, size)
            self._values[layer] = values_BHqE.new_zeros(batch, heads, self.capacity, size)
        rows_B1 = torch.arange(len(self._lengths), device=self._device)[:, None]
        for stored, new in ((self._keys[layer], keys_BHqE), (self._values[layer], values_BHqE)):
            stored.transpose(1, 2)[rows_B1, self._slots_Bq] = new.transpose(1, 2)
        return self._keys[layer][:, :, : self._used], self._values[layer][:, :, : self._used]
