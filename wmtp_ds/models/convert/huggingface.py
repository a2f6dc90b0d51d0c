"""Folders of Hugging Face's layout, and ours, which is the same with heads."""

import re
from pathlib import Path
from typing import Any

from wmtp_ds.errors import UserError
from wmtp_ds.models.config_file import read_config_fields, refuse_foreign_code
from wmtp_ds.models.convert import safetensors_files
from wmtp_ds.models.convert.source import Source
from wmtp_ds.models.convert.tensors import LazyTensor
from wmtp_ds.models.convert.tokenizer import find_tokenizer
from wmtp_ds.models.convert.torch_files import TorchFile
from wmtp_ds.models.fingerprint import shards_of, stored_tensors

# Old conversions stored the rotary frequencies of each block, which the model computes anyway.
_BUFFER = re.compile(r"\.rotary_emb\.inv_freq$")


def open_folder(folder: Path, tokenizer: Path | None = None) -> Source:
    """Open a folder with config.json and weights, as safetensors or as ``torch.save`` made them.

    Raises:
        UserError: if it is of another architecture, or files are missing or damaged.
    """
    fields = read_config_fields(folder)
    check_is_llama(fields, str(folder / "config.json"))
    refuse_foreign_code(fields, folder / "config.json")
    heads = fields.get("n_future_tokens")
    if heads is not None and (type(heads) is not int or heads < 1):
        raise UserError(
            f"{folder / 'config.json'} says n_future_tokens = {heads!r}; it must be a whole number of at least 1."
        )
    tensors, files = folder_tensors(folder)
    found = find_tokenizer(folder, tokenizer)
    return Source(
        path=folder,
        layout="huggingface" if heads is None else "mtp",
        fields=fields,
        tensors={name: tensor for name, tensor in tensors.items() if not _BUFFER.search(name)},
        tokenizer=found,
        files=[folder / "config.json", *files, *found.files()],
    )


def check_is_llama(fields: dict[str, Any], where: str) -> None:
    """Only what ``LlamaForCausalLM`` computes can become a policy.

    Raises:
        UserError: for another architecture, a model without unembedding, or quantised weights.
    """
    kind = fields.get("model_type")
    if kind != "llama":
        raise UserError(
            f"{where}: model_type is {kind!r}, which is not supported. Supported is 'llama': Llama 1 to 3.x, "
            "CodeLlama, Sheared-LLaMA, TinyLlama, SmolLM2 and others of that architecture."
        )
    names = fields.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    if names and not any("causallm" in str(name).lower() for name in names):
        raise UserError(
            f"{where}: architectures is {', '.join(map(str, names))}, which predicts no tokens. "
            "Take the LlamaForCausalLM that it was made from."
        )
    if fields.get("quantization_config"):
        method = fields["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise UserError(
            f"{where}: the weights are quantised ({method}), and quantised weights cannot be trained. "
            "Take the model in bfloat16 or float16."
        )


def folder_tensors(folder: Path) -> tuple[dict[str, LazyTensor], list[Path]]:
    """Every tensor of a folder, by name, whether safetensors or torch.save wrote it, and the files they are in.

    Raises:
        UserError: if there are none, or a file is damaged.
    """
    has_safetensors = (folder / "model.safetensors.index.json").exists() or any(
        file.name != "value_head.safetensors" for file in folder.glob("*.safetensors")
    )
    if has_safetensors:
        stored = stored_tensors(folder)
        kept = {name: tensor for name, tensor in stored.items() if not _BUFFER.search(name)}
        tensors = {name: safetensors_files.stored(name, tensor) for name, tensor in kept.items()}
        return tensors, sorted({tensor.file for tensor in stored.values()})
    files = pickled_shards(folder)
    tensors = {}
    for file in files:
        tensors |= TorchFile(file).tensors()
    return tensors, files


def pickled_shards(folder: Path) -> list[Path]:
    """The pytorch_model*.bin of a folder.

    Raises:
        UserError: if there is none, or the index is damaged.
    """
    index, whole = folder / "pytorch_model.bin.index.json", folder / "pytorch_model.bin"
    if index.is_file():
        return shards_of(index)
    if whole.is_file():
        return [whole]
    raise UserError(f"{folder} has a config.json but no weights (*.safetensors or pytorch_model*.bin).")
