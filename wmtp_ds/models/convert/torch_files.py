"""Files of ``torch.save`` (.pth, .bin), read and written block by block. Nothing in them is ever executed.

They are zip archives: a pickle that names the tensors, and an uncompressed record of bytes for each. Reading maps the
file into memory; mapped pages count as this process's memory until the map is given up, so maps are, every so often.
Files of the format before that (torch up to 1.5) can only be read whole: one of them is held at a time.
"""

import hashlib
import io
import os
import pickle
import re
import struct
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmtp_ds.errors import UserError
from wmtp_ds.files import open_file
from wmtp_ds.models.convert.tensors import LazyTensor, bytes_of, checked_blocks
from wmtp_ds.models.fingerprint import file_error

# How much of all open files may be mapped and touched before their maps are given up; or a quarter of the largest file,
# since making a map takes some milliseconds.
MAPPED_BYTES = 1 << 24
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
}
_ALIGNMENT = 64  # torch.save's own


class TorchFile:
    """The tensors of one file.

    Args:
        path: the file.
        verify: compare its records with their checksums, which reads all of it once.

    Attributes:
        is_archive: whether it can be read block by block.

    Raises:
        UserError: if the file is missing, damaged, holds anything but named tensors, or asks for code to be run.
    """

    def __init__(self, path: Path, *, verify: bool = True):
        self.path = path
        self.is_archive = self._check(verify)
        self._size = path.stat().st_size
        self._touched = 0
        self._state: dict[str, Tensor] | None = None
        _OPEN.add(self)
        with nullcontext() if verify or self.is_archive else torch.serialization.skip_data():
            state = self._load()
        self._kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
        if verify or self.is_archive:
            self._state = state

    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor of the file by name, to be read later."""
        return {
            name: LazyTensor(f"{self.path}: {name}", dtype, shape, partial(self._read, name))
            for name, (dtype, shape) in self._kinds.items()
        }

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        if self._state is None:
            self._state = self._load()
        block = self._state[name][start:stop].detach().clone(memory_format=torch.contiguous_format)
        if self.is_archive:
            self._touched += block.nbytes
            _give_up_maps()
        return block

    def give_up(self) -> None:
        """Let go of the mapped memory, or of the whole file; the next read takes it again."""
        self._state, self._touched = None, 0

    def _check(self, verify: bool) -> bool:
        """Whether the file is an archive, whose checksums are right, rather than of the format before that."""
        try:
            with open_file(self.path) as stream:
                start = stream.read(2)
            if zipfile.is_zipfile(self.path):
                if verify:
                    self._check_archive()
                return True
        except OSError as error:
            raise file_error(self.path, error) from None
        except zipfile.BadZipFile as error:
            raise self._damaged(f"its list of records cannot be read: {error}") from None
        if start == b"\x80\x02":  # a pickle
            return False
        if start == b"PK":
            raise self._damaged("it is cut short")
        raise self._damaged("it is no file of torch.save")

    def _check_archive(self) -> None:
        what = "its list of records"
        try:
            with zipfile.ZipFile(self.path) as archive:
                for record in archive.infolist():
                    what = f"its record {record.filename}"
                    if record.CRC == 0:  # torch can be told not to compute it
                        continue
                    with archive.open(record) as stream:
                        while stream.read(1 << 22):
                            pass
        except OSError:
            raise
        except Exception as error:  # BadZipFile, or whatever else a damaged file makes of zipfile
            raise self._damaged(f"{what} is not what was saved ({' '.join(str(error).split())})") from None

    def _load(self) -> dict[str, Tensor]:
        if not self.is_archive:
            _give_up_whole_files()
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.is_archive or None)
        except pickle.UnpicklingError as error:
            wanted = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
            what = f"it asks for {wanted[1]} to be run" if wanted else "its pickle is damaged or is no plain one"
            raise UserError(
                f"weights file {self.path} was not read: {what}, and only plain tensors are read here. "
                "Take the model as safetensors, or copy it again."
            ) from None
        except Exception as error:  # whatever a damaged file makes of torch
            raise self._damaged(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(state, dict):
            raise self._damaged(f"it holds a {type(state).__name__}, not tensors by name")
        for name, value in state.items():
            is_plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
            if not isinstance(name, str) or not is_plain:
                raise self._damaged(f"its entry {name!r} is no tensor")
        return state

    def _damaged(self, why: str) -> UserError:
        return UserError(f"weights file {self.path} is damaged: {why}. Copy the model again.")


_OPEN: weakref.WeakSet[TorchFile] = weakref.WeakSet()


def _give_up_maps() -> None:
    limit = max(MAPPED_BYTES, max(file._size for file in _OPEN) // 4)
    if sum(file._touched for file in _OPEN) > limit:
        for file in _OPEN:
            if file.is_archive:
                file.give_up()


def _give_up_whole_files() -> None:
    for file in _OPEN:
        if not file.is_archive:
            file.give_up()


class _Storage:
    """Stands for a record of bytes in the pickle."""

    def __init__(self, key: str, dtype: torch.dtype, count: int):
        self.reference = ("storage", _STORAGES[dtype], key, "cpu", count)


class _Tensor:
    """Stands for a tensor in the pickle: a contiguous one that has its record for itself."""

    def __init__(self, key: str, tensor: LazyTensor):
        self._key, self._tensor = key, tensor

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self._tensor.shape
        strides = tuple(int(torch.Size(shape[axis + 1 :]).numel()) for axis in range(len(shape)))
        storage = _Storage(self._key, self._tensor.dtype, torch.Size(shape).numel())
        return torch._utils._rebuild_tensor_v2, (storage, 0, shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.reference if isinstance(obj, _Storage) else None


def write(file: Path, tensors: Mapping[str, LazyTensor], on_bytes: Callable[[int], None]) -> dict[str, str]:
    """Write a file that ``torch.load`` reads and wait until it is on the disk; the SHA-256 of each tensor's bytes.

    Raises:
        UserError: if a value is not finite.
        OSError: if the file cannot be written.
    """
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump({name: _Tensor(str(key), tensors[name]) for key, name in enumerate(tensors)})
    sums = {}
    with file.open("wb") as stream:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_record("data.pkl"), pickled.getvalue())
            archive.writestr(_record("byteorder"), "little")
            for key, (name, tensor) in enumerate(tensors.items()):
                digest = hashlib.sha256()
                record = _record(f"data/{key}", at=stream.tell(), size=tensor.nbytes)
                with archive.open(record, "w", force_zip64=True) as target:
                    for block in checked_blocks(tensor):
                        data = bytes_of(block)
                        target.write(data)
                        digest.update(data)
                        on_bytes(len(data))
                sums[name] = digest.hexdigest()
            archive.writestr(_record("version"), "3\n")
        stream.flush()
        os.fsync(stream.fileno())
    return sums


def _record(name: str, at: int | None = None, size: int = 0) -> zipfile.ZipInfo:
    """A record of the archive; one ``at`` a place in the file gets padding, so that its bytes are aligned."""
    record = zipfile.ZipInfo(f"archive/{name}")
    record.file_size = size
    if at is not None:
        # A local header has 30 bytes, the name, our extra field (4 bytes and the padding), and zip64's (20).
        padding = -(at + 30 + len(record.filename) + 4 + 20) % _ALIGNMENT
        record.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return record
