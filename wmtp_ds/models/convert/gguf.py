"""GGUF files, through transformers' own loader, which holds the whole model, dequantised to float32."""

import io
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from wmtp_ds.errors import UserError
from wmtp_ds.models.convert.huggingface import check_is_llama
from wmtp_ds.models.convert.source import Source
from wmtp_ds.models.convert.tensors import LazyTensor
from wmtp_ds.models.convert.tokenizer import TokenizerSource, find_tokenizer

# What the loader takes of a Llama; the rest, such as biases, it drops without a word.
_READ = re.compile(
    r"(token_embd|output_norm|output|blk\.\d+\.(attn_(q|k|v|output|norm)|ffn_(gate|up|down|norm)))\.weight"
)


def open_gguf(file: Path, tokenizer: Path | None = None) -> Source:
    """Load a GGUF file.

    Raises:
        UserError: if a library that reads it is missing, the file is damaged, or it is of another architecture.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(f"{file}: to read GGUF files: pip install 'wmtp-ds[gguf]' (or: pip install gguf)") from None
    try:
        _check_kind(file, gguf.GGUFReader(file))
        with redirect_stderr(io.StringIO()):  # two bars, of which transformers' own switch turns off but one
            loaded: Any = LlamaForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        model, loading = loaded
        check_is_llama({"model_type": model.config.model_type}, str(file))
        if missing := sorted(loading["missing_keys"]):  # which transformers makes up
            raise UserError(
                f"{file} lacks {len(missing)} of the tensors that its header asks for, first {missing[0]}. Copy the "
                "model again; one that is split into several files, join first (llama-gguf-split --merge)."
            )
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes of the libraries
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{file} cannot be read as GGUF: {message}. Copy the model again.") from None
    fields: dict[str, Any] = model.config.to_dict() | {"dtype": "float32"}
    fields.pop("quantization_config", None)
    found = find_tokenizer(file.parent, tokenizer) if tokenizer else TokenizerSource("gguf", file)
    tensors = {name: _in_memory(f"{file}: {name}", value) for name, value in model.named_parameters()}
    return Source(file, "gguf", fields, tensors, found, [file, *found.files()])


def _check_kind(file: Path, reader: Any) -> None:
    check_is_llama({"model_type": reader.fields["general.architecture"].contents()}, str(file))
    # transformers' loader leaves the scaling of rotary frequencies out, without a word.
    scaling = reader.fields.get("llama.rope.scaling.type")
    kind = scaling.contents() if scaling is not None else "none"
    if kind != "none" or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise UserError(
            f"{file} scales its rotary frequencies (as Llama 3.1 and later do), which transformers' GGUF loader leaves "
            "out: the model would be another one. Import its Hugging Face folder instead."
        )
    if unknown := [tensor.name for tensor in reader.tensors if not _READ.fullmatch(tensor.name)]:
        raise UserError(
            f"{file} holds {unknown[0]}, which transformers' GGUF loader leaves out: the model would be another one. "
            "Import its Hugging Face folder instead."
        )


def _in_memory(origin: str, value: Tensor) -> LazyTensor:
    tensor = value.detach()
    return LazyTensor(origin, tensor.dtype, tuple(tensor.shape), lambda start, stop: tensor[start:stop])
