"""Safetensors files, read and written block by block; the library's own functions hold a whole file."""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from wmtp_ds.errors import UserError
from wmtp_ds.models.convert.tensors import LazyTensor, bytes_of, checked_blocks
from wmtp_ds.models.fingerprint import StoredTensor, file_error

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """A floating-point dtype as safetensors spells it: "BF16"."""
    return _NAMES[dtype]


def stored(name: str, tensor: StoredTensor) -> LazyTensor:
    """A tensor of a file, to be read later.

    Raises:
        UserError: if it holds integers, as quantised weights do.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise UserError(
            f"{tensor.file}: {name} is stored as {tensor.dtype}: quantised weights cannot be trained. "
            "Take the model in float32, bfloat16 or float16."
        )
    rows = max(1, tensor.shape[0]) if tensor.shape else 1
    row_bytes = (tensor.stop - tensor.start) // rows

    def read(start: int, stop: int) -> Tensor:
        data = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        try:
            with tensor.file.open("rb") as stream:
                stream.seek(tensor.start + start * row_bytes)
                count = stream.readinto(bytes_of(data))
        except OSError as error:
            raise file_error(tensor.file, error) from None
        if count != len(data):
            raise UserError(f"weights file {tensor.file} ends within tensor {name}. Copy the model again.")
        return data.view(dtype).reshape(stop - start, *tensor.shape[1:])

    return LazyTensor(f"{tensor.file}: {name}", dtype, tensor.shape, read)


def write(file: Path, tensors: Mapping[str, LazyTensor], on_bytes: Callable[[int], None]) -> dict[str, str]:
    """Write a file and wait until it is on the disk; returns the SHA-256 (hex) of each tensor's bytes.

    Raises:
        UserError: if a value is not finite.
        OSError: if the file cannot be written.
    """
    # Wide dtypes come first, so that each tensor begins at a multiple of its own element size, as readers want.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        entry = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sums = {}
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered:
            digest = hashlib.sha256()
            for block in checked_blocks(tensor):
                data = bytes_of(block)
                stream.write(data)
                digest.update(data)
                on_bytes(len(data))
            sums[name] = digest.hexdigest()
        stream.flush()
        os.fsync(stream.fileno())
    return sums
