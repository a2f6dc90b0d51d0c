"""Which next-token model a folder holds: its weights and what its config.json says about computing with them.

Without torch. What does not change what the model computes is left out: extra prediction heads, and names, versions
and dtypes in config.json.
"""

import hashlib
import json
from pathlib import Path

from wmtp_ds.models.config_file import read_config_fields
from wmtp_ds.models.fingerprint import StoredTensor, bytes_in_chunks, stored_tensors, trunk_entry

_COSMETIC = (
    "_name_or_path", "architectures", "auto_map", "dtype", "n_future_tokens", "torch_dtype", "transformers_version",
    "use_cache",
)  # fmt: skip
# Of a file, what copying preserves or not: name, bytes, time of change in nanoseconds.
FileVersion = tuple[str, int, int]


def _config_text(folder: Path) -> str:
    fields = {name: value for name, value in read_config_fields(folder).items() if name not in _COSMETIC}
    return json.dumps(fields, sort_keys=True)


def _next_token_tensors(folder: Path) -> list[tuple[str, StoredTensor]]:
    tensors = stored_tensors(folder).items()
    return sorted((name, tensor) for name, tensor in tensors if not name.startswith("mtp_heads."))


def model_outline(folder: Path) -> str:
    """SHA-256 (hex) of a model's config.json and its tensors' names, dtypes and shapes, read from headers alone.

    Raises:
        UserError: if config.json or the weights are missing or damaged.
    """
    digest = hashlib.sha256(_config_text(folder).encode())
    for name, tensor in _next_token_tensors(folder):
        digest.update(trunk_entry(name, tensor))
    return digest.hexdigest()


def compute_model_fingerprint(folder: Path) -> str:
    """SHA-256 (hex) of the same and of the tensors' bytes, all of which are read.

    Raises:
        UserError: as `model_outline`.
    """
    digest = hashlib.sha256(_config_text(folder).encode())
    for name, tensor in _next_token_tensors(folder):
        digest.update(trunk_entry(name, tensor))
        for chunk in bytes_in_chunks(tensor):
            digest.update(chunk)
    return digest.hexdigest()


def file_versions(folder: Path) -> tuple[FileVersion, ...]:
    """Name, size and time of change of config.json and of each file with weights: the same ones are the same model.

    Raises:
        UserError: as `model_outline`.
        OSError: a file is gone.
    """
    files = {folder / "config.json", *(tensor.file for _, tensor in _next_token_tensors(folder))}
    found = [(file.name, file.stat()) for file in sorted(files)]
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in found)
