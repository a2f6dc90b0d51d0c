"""The layouts that models come in, told apart by what is in a folder, without torch."""

from pathlib import Path
from typing import Literal

from wmtp_ds.errors import UserError

# "mtp" is ours: Hugging Face's with ``n_future_tokens`` in config.json.
Layout = Literal["mtp", "huggingface", "meta", "gguf"]
CRITIC_FILE = "value_head.safetensors"


def tell_layout(path: Path, gguf_file: str | None = None) -> tuple[Layout, Path]:
    """Which layout a folder (or a GGUF file) is of, by what is in it; the path with a GGUF file's name added.

    Raises:
        UserError: if it holds no model.
    """
    names = _names(path)
    if names is None:
        if path.suffix == ".gguf" and gguf_file is None:
            return "gguf", path
        raise UserError(f"{path} is a file. Name the model's folder, or a .gguf file.")
    if gguf_file is not None:
        if not (path / gguf_file).is_file():
            raise UserError(f"--gguf-file: {path} holds no file {gguf_file}.{_list_gguf(path)}")
        return "gguf", path / gguf_file
    has_weights = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names - {CRITIC_FILE})
    has_weights |= any(name.startswith("pytorch_model") and ".bin" in name for name in names)
    has_meta = any(name.endswith(".pth") for name in names)
    if has_meta and not (has_weights and "config.json" in names):
        return "meta", path
    if "config.json" in names:
        return "huggingface", path
    if "params.json" in names:
        raise UserError(f"{path} has params.json but no consolidated.*.pth: the weights are missing.")
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if len(gguf) == 1:
        return "gguf", path / gguf[0]
    raise UserError(f"{path} is not a model folder: {_what_is_there(path, names)}{_list_gguf(path)}")


def _names(path: Path) -> set[str] | None:
    """What a folder holds; None of a file."""
    try:
        return {entry.name for entry in path.iterdir()}
    except NotADirectoryError:
        if path.is_file():
            return None
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}.") from None
    raise UserError(
        f"{path} does not exist. Name a folder on this machine: models are not downloaded here "
        f"(to fetch one: hf download {path} --local-dir FOLDER)."
    )


def _what_is_there(path: Path, names: set[str]) -> str:
    inner = sorted(name for name in names if (path / name / "config.json").is_file())
    if inner:
        preferred = "checkpoint_best" if "checkpoint_best" in inner else inner[0]
        return f"the models in it are {', '.join(inner)}. Name one: {path / preferred}."
    if CRITIC_FILE in names:
        return f"it holds a critic's {CRITIC_FILE} and no policy. Name the folder of the policy that it was trained on."
    if any(name.endswith((".safetensors", ".bin")) for name in names):
        return "it has weights but no config.json. Copy the model again."
    return "it has neither config.json (Hugging Face's layout and ours) nor params.json (Meta's)."


def _list_gguf(path: Path) -> str:
    found = sorted(entry.name for entry in path.glob("*.gguf"))
    return f" GGUF files there: {', '.join(found)}; name one with --gguf-file." if found else ""
