"""Tensors that are described now and read later, in blocks of rows: no model, shard or tensor is ever held whole.

Whatever has to be done to a tensor on its way (joined from shards, reordered for another rotary embedding, cast) is
done block by block, so memory depends on ``BLOCK_BYTES`` alone.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wmtp_ds.errors import UserError

BLOCK_BYTES = 1 << 22
_RANDOM_ROWS = 256


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is yet to be read.

    Attributes:
        origin: where it comes from, for messages: "file: name".
        dtype, shape: what reading it gives.
        read: ``(start, stop)`` -> those rows of the first axis, in memory of their own.
        group: rows are read in multiples of this many, counted from row 0; only the last block may be shorter.
    """

    origin: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]
    group: int = 1

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[Tensor]:
        """The tensor in consecutive blocks of rows, each contiguous, of about ``BLOCK_BYTES``."""
        rows = self.shape[0]
        row_bytes = max(1, self.nbytes // max(rows, 1))
        step = max(1, BLOCK_BYTES // row_bytes // self.group) * self.group
        for start in range(0, rows, step):
            yield self.read(start, min(start + step, rows)).contiguous()


def bytes_of(block: Tensor) -> memoryview:
    """The bytes of a contiguous block, without a copy."""
    return block.reshape(-1).view(torch.uint8).numpy().data


def checksum(tensor: LazyTensor) -> str:
    """SHA-256 (hex) of a tensor's bytes."""
    digest = hashlib.sha256()
    for block in tensor.blocks():
        digest.update(bytes_of(block))
    return digest.hexdigest()


def checked_blocks(tensor: LazyTensor) -> Iterator[Tensor]:
    """As ``tensor.blocks()``.

    Raises:
        UserError: if a value is NaN or infinite.
    """
    for block in tensor.blocks():
        if not _is_finite(block):
            raise UserError(
                f"{tensor.origin} holds {'NaN' if block.isnan().any() else 'infinity'}: the weights are damaged, or "
                "their training diverged. Copy the model again, or use an earlier checkpoint of it."
            )
        yield block


def _is_finite(block: Tensor) -> bool:
    """Whether every value is; a sum is not if any is not, and tells so several times faster."""
    wide = torch.float64 if block.dtype == torch.float64 else torch.float32
    return bool(torch.isfinite(block.sum(dtype=wide))) or bool(torch.isfinite(block).all())


def cast(tensor: LazyTensor, dtype: torch.dtype | None) -> LazyTensor:
    """The tensor in another dtype; None keeps its own.

    Reading it raises a UserError where a finite value does not fit the dtype.
    """
    if dtype is None or dtype == tensor.dtype:
        return tensor

    def read(start: int, stop: int) -> Tensor:
        rows = tensor.read(start, stop)
        result = rows.to(dtype)
        if not _is_finite(result) and _is_finite(rows):
            name = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{tensor.origin} holds {rows.abs().max().item():.4g}, which {name} cannot. Take --dtype bfloat16."
            )
        return result

    return replace(tensor, dtype=dtype, read=read)


def joined(parts: Sequence[LazyTensor], axis: int) -> LazyTensor:
    """One tensor of parts that lie side by side along axis 0 or 1, all read in single rows."""
    first = parts[0]
    shape = list(first.shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    if axis == 1:
        return replace(
            first,
            shape=tuple(shape),
            read=lambda start, stop: torch.cat([part.read(start, stop) for part in parts], dim=1),
        )

    def read(start: int, stop: int) -> Tensor:
        pieces, offset = [], 0
        for part in parts:
            a, b = max(start - offset, 0), min(stop - offset, part.shape[0])
            if a < b:
                pieces.append(part.read(a, b))
            offset += part.shape[0]
        return torch.cat(pieces)

    return replace(first, shape=tuple(shape), read=read)


def portion(tensor: LazyTensor, axis: int, index: int, count: int) -> LazyTensor:
    """Part ``index`` of ``count`` equal ones along axis 0 or 1: what :func:`joined` joins."""
    size = tensor.shape[axis] // count
    shape = tuple(size if number == axis else length for number, length in enumerate(tensor.shape))
    first = index * size
    if axis == 0:
        return replace(tensor, shape=shape, read=lambda start, stop: tensor.read(first + start, first + stop))
    return replace(
        tensor, shape=shape, read=lambda start, stop: tensor.read(start, stop)[:, first : first + size].contiguous()
    )


def halves_from_pairs(tensor: LazyTensor, head_dim: int) -> LazyTensor:
    """Query or key rows ``[heads · head_dim, D]`` of Meta's layout in the order that transformers' Llama wants.

    Meta rotates neighbours (dimension 2i with 2i + 1), transformers dimension i with i + head_dim / 2. Within each
    head, the even rows come first, then the odd ones.
    """
    return _transposed(tensor, head_dim, (head_dim // 2, 2))


def pairs_from_halves(tensor: LazyTensor, head_dim: int) -> LazyTensor:
    """The inverse of :func:`halves_from_pairs`."""
    return _transposed(tensor, head_dim, (2, head_dim // 2))


def _transposed(tensor: LazyTensor, head_dim: int, grid: tuple[int, int]) -> LazyTensor:
    def read(start: int, stop: int) -> Tensor:
        rows = tensor.read(start, stop)
        return rows.reshape(-1, *grid, rows.shape[1]).transpose(1, 2).reshape(rows.shape)

    return replace(tensor, read=read, group=head_dim)


def constant(origin: str, dtype: torch.dtype, shape: tuple[int, ...], value: float) -> LazyTensor:
    """A tensor of one value."""

    def read(start: int, stop: int) -> Tensor:
        return torch.full((stop - start, *shape[1:]), value, dtype=dtype)

    return LazyTensor(origin, dtype, shape, read)


def normal(origin: str, dtype: torch.dtype, shape: tuple[int, ...], std: float, seed: str) -> LazyTensor:
    """A matrix of normal numbers of mean 0, the same for the same seed, however it is read."""

    def read(start: int, stop: int) -> Tensor:
        pieces = []
        for row in range(start, stop, _RANDOM_ROWS):
            digest = hashlib.sha256(f"{seed}\0{row}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            count = min(_RANDOM_ROWS, stop - row)
            pieces.append((torch.randn((count, *shape[1:]), generator=generator) * std).to(dtype))
        return torch.cat(pieces)

    return LazyTensor(origin, dtype, shape, read, group=_RANDOM_ROWS)
