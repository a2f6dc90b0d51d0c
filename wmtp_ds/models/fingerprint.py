"""Safetensors folders read without torch: what tensors there are, and the fingerprint of a trunk.

A value head is of use only with the trunk that it was trained on. The trunk is told by a SHA-256 over the sorted
names, dtypes, shapes and bytes of the embeddings and of every block but the last (head 1), which is computed once
when a model is made and stored beside it as ``trunk_fingerprint.json``.
"""

import hashlib
import json
import logging
import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmtp_ds.errors import UserError
from wmtp_ds.files import open_file, read_json, write_atomically
from wmtp_ds.models.config_file import read_config_fields

FILE_NAME = "trunk_fingerprint.json"
_READ_BYTES = 1 << 22
_LONGEST_HEADER = 100_000_000  # safetensors' own limit
# Bits of one element, by safetensors' names of dtypes.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

logger = logging.getLogger("wmtp_ds.models")


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
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = shards_of(index)
    elif whole.is_file():
        files = [whole]  # and not what may lie beside it in another tool's layout
    else:
        files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != "value_head.safetensors"]
    if not files:
        raise UserError(f"{folder} has no safetensors weights. Copy the model again.")
    return {name: tensor for file in files for name, tensor in _header(file).items()}


def shards_of(index: Path) -> list[Path]:
    """The files that the index of a sharded model names.

    Raises:
        UserError: if it is damaged, or names anything but files beside it.
    """
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        if outside := [name for name in names if Path(name).name != name or name in ("", "..") or "\0" in name]:
            raise ValueError(f"{outside[0]!r} is no file beside it")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is damaged: {error}. Copy the model again.") from None
    return [index.with_name(name) for name in names]


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        size = file.stat().st_size
        with open_file(file) as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            if length > _LONGEST_HEADER:
                raise ValueError("its header is longer than safetensors allows")
            header = json.loads(stream.read(length))
        return _laid_out(file, header, 8 + length, size)
    except OSError as error:
        raise file_error(file, error) from None
    except struct.error:
        raise UserError(f"weights file {file} is damaged: it is cut short. Copy the model again.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"weights file {file} is damaged: {error}. Copy the model again.") from None


def file_error(file: Path, error: OSError) -> UserError:
    """What to say of a weights file that the system does not let be read."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"weights file {file} is missing. Copy the model again.")
    if isinstance(error, PermissionError):
        return UserError(f"weights file {file} may not be read: {error.strerror}. Check its permissions.")
    return UserError(f"weights file {file} cannot be read: {error}. Copy the model again.")


def _laid_out(file: Path, header: Any, start: int, size: int) -> dict[str, StoredTensor]:
    """The tensors of a header, which must cover the file from ``start`` to its end without gap or overlap.

    What passes here can be read: an error later would come in the middle of a collective.

    Raises:
        ValueError: if they do not, or an entry is malformed.
    """
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            bits, shape, (first, last) = _BITS[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"its header does not say dtype, shape and place of tensor {name}") from None
        if len(shape) > 16 or any(type(n) is not int or not 0 <= n < 2**63 for n in (*shape, first, last)):
            raise ValueError(f"its header gives tensor {name} an impossible shape or place")
        if start + last > size:
            raise ValueError(f"it ends within tensor {name}")
        if (last - first) * 8 != bits * math.prod(shape):
            raise ValueError(f"its header gives tensor {name} the wrong number of bytes")
        tensors.append((name, StoredTensor(file, entry["dtype"], shape, start + first, start + last)))
    end = start
    for name, tensor in sorted(tensors, key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise ValueError(f"tensor {name} does not begin where the one before it ends")
        end = tensor.stop
    if end != size:
        raise ValueError(f"it should have {end} bytes, not {size}")
    return dict(tensors)


def is_trunk(name: str, num_hidden_layers: int) -> bool:
    """Whether a parameter belongs to the embeddings or the trunk, as opposed to heads, norm and unembedding."""
    if name.startswith("model.embed_tokens."):
        return True
    parts = name.split(".")
    if parts[:2] != ["model", "layers"] or len(parts) < 3 or not parts[2].isdecimal():
        return False
    return int(parts[2]) < num_hidden_layers - 1


def numbers_of(names: Iterable[str], holder: str) -> set[int]:
    """The numbers ``i`` of which there are tensors ``<holder>.<i>.…``, as of the blocks in ``model.layers``."""
    item = re.compile(rf"{re.escape(holder)}\.(\d{{1,9}})\.", re.ASCII)
    return {int(match[1]) for name in names if (match := item.match(name))}


def bytes_in_chunks(tensor: StoredTensor) -> Iterator[bytes]:
    """The bytes of a stored tensor, a few megabytes at a time.

    Raises:
        UserError: if the file ends before the tensor does.
    """
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        remaining = tensor.stop - tensor.start
        while remaining:
            chunk = stream.read(min(_READ_BYTES, remaining))
            if not chunk:
                raise UserError(f"weights file {tensor.file} is too short. Copy the model again.")
            remaining -= len(chunk)
            yield chunk


def compute_trunk_fingerprint(folder: Path) -> str:
    """SHA-256 (hex) of a model folder's embeddings and trunk.

    For each tensor, in the order of their names: ``name NUL dtype NUL d0,d1,… NUL`` in UTF-8, then its bytes.

    Raises:
        UserError: if config.json or the weights are missing or damaged.
    """
    layers = read_config_fields(folder).get("num_hidden_layers")
    if type(layers) is not int:
        raise UserError(f"{folder / 'config.json'} is damaged: num_hidden_layers is {layers!r}. Copy the model again.")
    digest = hashlib.sha256()
    for name, tensor in sorted(stored_tensors(folder).items()):
        if is_trunk(name, layers):
            digest.update(trunk_entry(name, tensor))
            for chunk in bytes_in_chunks(tensor):
                digest.update(chunk)
    return digest.hexdigest()


def trunk_entry(name: str, tensor: StoredTensor) -> bytes:
    """What goes before a tensor's bytes in the fingerprint."""
    return f"{name}\0{tensor.dtype}\0{','.join(map(str, tensor.shape))}\0".encode()


def store_trunk_fingerprint(folder: Path) -> str:
    """Compute the fingerprint of a model folder, write it beside the weights, and return it.

    A folder that cannot be written to (a shared, read-only model) is only warned about.
    """
    fingerprint = compute_trunk_fingerprint(folder)
    try:
        write_trunk_fingerprint(folder, fingerprint)
    except OSError as error:
        logger.warning("the trunk's fingerprint was not stored and has to be computed each time: %s", error)
    return fingerprint


def write_trunk_fingerprint(folder: Path, fingerprint: str) -> None:
    """Store a fingerprint (64 hex digits) beside the weights that it is of."""
    write_atomically(folder / FILE_NAME, json.dumps({"sha256": fingerprint}) + "\n")


def read_trunk_fingerprint(folder: Path) -> str | None:
    """The stored fingerprint of a model folder; None if there is none."""
    try:
        fingerprint = read_json(folder / FILE_NAME)["sha256"]
        if not isinstance(fingerprint, str) or not re.fullmatch("[0-9a-f]{64}", fingerprint):
            raise ValueError("it holds no SHA-256")
        return fingerprint
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / FILE_NAME} is damaged: {error}. Delete it: it is made again.") from None
