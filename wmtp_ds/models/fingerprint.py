"""Safetensors folders read without torch: what tensors there are, and the fingerprint of a trunk.

A value head is of use only with the trunk that it was trained on. The trunk is told by a SHA-256 over the sorted
names, dtypes, shapes and bytes of the embeddings and of every block but the last (head 1), which is computed once
when a model is made and stored beside it as ``trunk_fingerprint.json``.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wmtp_ds.errors import UserError

FILE_NAME = "trunk_fingerprint.json"
_READ_BYTES = 1 << 24


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``dtype`` as safetensors spells it ("F32", "BF16"), byte offsets from the file's start."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder, by name, read from the headers of its safetensors files.

    Raises:
        UserError: if there is none, a shard of the index is missing, or a file is damaged or too short.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} is damaged: {error}. Import the model again.") from None
    else:
        files = sorted(folder.glob("*.safetensors"))
        files = [file for file in files if file.name != "value_head.safetensors"]
    if not files:
        raise UserError(f"{folder} has no safetensors weights. Import the model again.")
    return {name: tensor for file in files for name, tensor in _header(file).items()}


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            if stop > size:
                raise ValueError(f"it ends within tensor {name}")
            tensors[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), start, stop)
        return tensors
    except FileNotFoundError:
        raise UserError(f"weights file {file} is missing. Import or copy the model again.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"weights file {file} is damaged: {error}. Import or copy the model again.") from None


def is_trunk(name: str, num_hidden_layers: int) -> bool:
    """Whether a parameter belongs to the embeddings or the trunk, as opposed to heads, norm and unembedding."""
    if name.startswith("model.embed_tokens."):
        return True
    parts = name.split(".")
    return parts[:2] == ["model", "layers"] and int(parts[2]) < num_hidden_layers - 1


def _chunks(tensor: StoredTensor) -> Iterator[bytes]:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        remaining = tensor.stop - tensor.start
        while remaining:
            chunk = stream.read(min(_READ_BYTES, remaining))
            if not chunk:
                raise UserError(f"weights file {tensor.file} is too short. Import or copy the model again.")
            remaining -= len(chunk)
            yield chunk


def compute_trunk_fingerprint(folder: Path) -> str:
    """SHA-256 (hex) of a model folder's embeddings and trunk.

    For each tensor, in the order of their names: ``name NUL dtype NUL d0,d1,… NUL`` in UTF-8, then its bytes.

    Raises:
        UserError: if config.json or the weights are missing or damaged.
    """
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    digest = hashlib.sha256()
    for name, tensor in sorted(stored_tensors(folder).items()):
        if is_trunk(name, layers):
            digest.update(f"{name}\0{tensor.dtype}\0{','.join(map(str, tensor.shape))}\0".encode())
            for chunk in _chunks(tensor):
                digest.update(chunk)
    return digest.hexdigest()


def store_trunk_fingerprint(folder: Path) -> str:
    """Compute the fingerprint of a model folder, write it beside the weights, and return it."""
    fingerprint = compute_trunk_fingerprint(folder)
    (folder / FILE_NAME).write_text(json.dumps({"sha256": fingerprint}) + "\n")
    return fingerprint


def read_trunk_fingerprint(folder: Path) -> str | None:
    """The stored fingerprint of a model folder; None if there is none."""
    try:
        return str(json.loads((folder / FILE_NAME).read_text())["sha256"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / FILE_NAME} is damaged: {error}. Import the model again.") from None
