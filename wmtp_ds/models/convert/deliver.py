"""Writing a checked model: streamed, read back, compared, and only then given its name."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from wmtp_ds.errors import RunError
from wmtp_ds.models.config_file import write_config_fields
from wmtp_ds.models.convert import safetensors_files
from wmtp_ds.models.convert.architecture import llama_config
from wmtp_ds.models.convert.source import Source
from wmtp_ds.models.convert.staging import Staging, check_space
from wmtp_ds.models.convert.tensors import LazyTensor
from wmtp_ds.models.convert.tokenizer import write_tokenizer
from wmtp_ds.models.fingerprint import bytes_in_chunks, is_trunk, stored_tensors, trunk_entry, write_trunk_fingerprint

_GENERATION = "generation_config.json"
# By file and name of tensor: what is written into it, and the SHA-256 (hex) of what was.
Files = Mapping[str, Mapping[str, LazyTensor]]
Sums = Mapping[str, Mapping[str, str]]


@dataclass
class Progress:
    """Who is told how far it is: ``start`` the bytes to come (written, then read back), ``advance`` those done."""

    start: Callable[[int], None] = lambda total: None
    advance: Callable[[int], None] = lambda count: None


@dataclass
class Delivered:
    """What was written.

    Attributes:
        folder: its place.
        files: of weights.
        tensors, parameters, nbytes: how many and how large.
        resumed: files of weights that an interrupted attempt had done.
        warnings: what the user should know.
        trunk_fingerprint: of the trunk, as the critic's checks compare it; None where there is none.
    """

    folder: Path
    files: list[str]
    tensors: int
    parameters: int
    nbytes: int
    resumed: list[str]
    warnings: list[str] = field(default_factory=list)
    trunk_fingerprint: str | None = None


def split_shards(tensors: Mapping[str, LazyTensor], shard_bytes: int) -> dict[str, dict[str, LazyTensor]]:
    """Tensors by file name; a file is full before it would exceed ``shard_bytes``, if it holds anything."""
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{number:05d}-of-{count:05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def plan_of(source: Source, files: Files, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides which bytes are written: the source's files, the tensors of each new file, the options."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    layout = {
        file: [(name, str(tensor.dtype), tensor.shape) for name, tensor in tensors.items()]
        for file, tensors in files.items()
    }
    return {"version": 1, "source": stats, "files": layout, "options": dict(options)}


def deliver_folder(
    source: Source,
    final: Path,
    fields: dict[str, Any],
    *,
    shard_bytes: int,
    options: Mapping[str, Any],
    progress: Progress,
) -> Delivered:
    """Write a folder of Hugging Face's layout or ours.

    Args:
        source: checked; its tensors are written.
        final: the folder; it does not exist, or may be replaced.
        fields: of config.json.
        shard_bytes: size of a file of weights.
        options: that decide what the tensors hold.
        progress: who is told.

    Raises:
        UserError: if values are not finite, or the tokenizer does not fit.
        RunError: if the folder cannot be written, or differs from what was written when read back.
    """
    files = split_shards(source.tensors, shard_bytes)
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    check_space(final, total)
    with Staging(final, plan_of(source, files, options)) as staging:
        write_config_fields(staging.folder, fields)
        ids, warnings = write_tokenizer(source.tokenizer, staging.folder, fields)
        fields = fields | {name: number for name, number in ids.items() if name not in fields}
        write_config_fields(staging.folder, fields)
        _write_generation_config(source, staging.folder, fields)
        progress.start(2 * total)
        sums = write_files(staging, files, safetensors_files.write, progress)
        _write_index(staging.folder, files, total)
        fingerprint = read_back(staging.folder, source.tensors, sums, fields["num_hidden_layers"], progress.advance)
        write_trunk_fingerprint(staging.folder, fingerprint)
        staging.publish()
    return Delivered(
        folder=final,
        files=list(files),
        tensors=len(source.tensors),
        parameters=sum(tensor.nbytes // tensor.dtype.itemsize for tensor in source.tensors.values()),
        nbytes=total,
        resumed=staging.resumed,
        warnings=warnings,
        trunk_fingerprint=fingerprint,
    )


def write_files(staging: Staging, files: Files, write: Callable[..., dict[str, str]], progress: Progress) -> Sums:
    """Write the files that an interrupted attempt has not; the SHA-256 of each tensor, by file and name."""
    sums = {}
    for name, tensors in files.items():
        sums[name] = staging.write(name, partial(write, tensors=tensors, on_bytes=progress.advance))
        if name in staging.resumed:
            progress.advance(sum(tensor.nbytes for tensor in tensors.values()))
    return sums


def _write_index(folder: Path, files: Files, total: int) -> None:
    if len(files) > 1:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_generation_config(source: Source, folder: Path, fields: dict[str, Any]) -> None:
    """The source's own, or what the config says of the ends of texts."""
    beside = source.path / _GENERATION
    if beside.is_file():
        shutil.copyfile(beside, folder / _GENERATION)
        return
    GenerationConfig.from_model_config(llama_config(fields, 1, str(folder))).save_pretrained(folder)


def read_back(
    folder: Path,
    wanted: Mapping[str, LazyTensor],
    sums: Sums,
    num_hidden_layers: int,
    on_bytes: Callable[[int], None],
) -> str:
    """Open what was written again and compare names, dtypes, shapes and checksums; the fingerprint of its trunk.

    Raises:
        RunError: at the first difference.
    """
    stored = stored_tensors(folder)
    if stored.keys() != wanted.keys():
        name = sorted(stored.keys() ^ wanted.keys())[0]
        raise differs(folder, f"tensor {name} is {'too many' if name in stored else 'missing'}")
    trunk = hashlib.sha256()
    written = {name: checksum for tensors in sums.values() for name, checksum in tensors.items()}
    for name, tensor in sorted(stored.items()):
        expected = wanted[name]
        if (tensor.dtype, tensor.shape) != (safetensors_files.dtype_name(expected.dtype), expected.shape):
            raise differs(tensor.file, f"tensor {name} is {tensor.dtype} {list(tensor.shape)}")
        digest, counts = hashlib.sha256(), is_trunk(name, num_hidden_layers)
        if counts:
            trunk.update(trunk_entry(name, tensor))
        for chunk in bytes_in_chunks(tensor):
            digest.update(chunk)
            if counts:
                trunk.update(chunk)
            on_bytes(len(chunk))
        if digest.hexdigest() != written[name]:
            raise differs(tensor.file, f"tensor {name} has another checksum")
    return trunk.hexdigest()


def differs(place: Path, what: str) -> RunError:
    """That what was read back is not what was written."""
    return RunError(
        f"{place} is not what was written: {what} when read back. The result was removed; check the disk and the "
        "memory of this machine, and try again."
    )
