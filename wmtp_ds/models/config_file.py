"""A model folder's config.json, without torch."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp_ds.errors import UserError
from wmtp_ds.files import read_json

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig


def read_json_object(file: Path, lack: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        file: to be read.
        lack: what it means that there is none: "… is not a model folder."

    Raises:
        UserError: if it is missing, damaged, or holds something else.
    """
    try:
        content = read_json(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing: {lack}") from None
    except PermissionError as error:
        raise UserError(f"{file} may not be read: {error.strerror}. Check its permissions.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged: {error}. Copy the model again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: it holds no JSON object. Copy the model again.")
    return content


def model_key(folder: Path) -> str:
    """What tells a model's folder from another: its small files' content, its weights' names, sizes and times."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        status = file.stat()
        digest.update(f"{file.name}\0{status.st_size}\0".encode())
        digest.update(file.read_bytes() if file.suffix == ".json" else str(status.st_mtime_ns).encode())
    return digest.hexdigest()


def read_config_fields(folder: Path) -> dict[str, Any]:
    """What a model folder's config.json says.

    Raises:
        UserError: if it is missing or damaged.
    """
    return read_json_object(folder / "config.json", f"{folder} is not a model folder.")


# What transformers itself has. It takes any other name for that of a program on the hub, to be fetched and run.
_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_CODE = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def refuse_foreign_code(fields: dict[str, Any], file: Path) -> None:
    """Drop what a config.json says of code in its folder (``auto_map``), which is never run.

    Raises:
        UserError: it asks for code from elsewhere.
    """
    fields.pop("auto_map", None)
    tables = [fields]
    for table in tables:
        tables += [value for value in table.values() if isinstance(value, dict)]
        for name in _CODE:
            wanted = table.get(name)
            for value in wanted.values() if isinstance(wanted, dict) else [wanted]:
                if value is not None and value not in _ATTENTION:
                    raise UserError(
                        f"{file}: {name} is {value!r}, which transformers would fetch from elsewhere and run; code of "
                        f"others is not run here. Remove it, or write one of {', '.join(_ATTENTION[:4])}."
                    )


def write_config(folder: Path, config: "LlamaConfig", dtype: "torch.dtype") -> None:
    """config.json as ``LlamaForCausalLM``'s, so that tools without our code load the next-token model."""
    fields = config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
    }
    write_config_fields(folder, fields)


def write_config_fields(folder: Path, fields: dict[str, Any]) -> None:
    """Write a config.json."""
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
