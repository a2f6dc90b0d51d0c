"""Weights in and out, one parameter at a time: no process ever holds the whole model.

transformers' own ZeRO-3 path merges every shard in the memory of rank 0 before it hands parameters out. Here a
parameter is read from its file, handed out, and forgotten; written likewise.
"""

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from wmtp_ds.errors import UserError
from wmtp_ds.models.config_file import read_config_fields, refuse_foreign_code
from wmtp_ds.models.fingerprint import StoredTensor, numbers_of, stored_tensors
from wmtp_ds.models.mtp import MTPLlamaForCausalLM

SHARD_BYTES = 4_000_000_000
_FLOATS = ("F64", "F32", "BF16", "F16")


class Sharding(Protocol):
    """How parameters are spread over ranks. The engine has one for ZeRO-3; `Whole` is for a single process."""

    # Whether this rank reads and writes files.
    is_main: bool

    def construct(self) -> AbstractContextManager[Any]:
        """Modules made inside are sharded as they are made."""

    def gathered(self, parameter: nn.Parameter, modify: bool = False) -> AbstractContextManager[Any]:
        """Inside, the parameter is whole; with ``modify`` the main rank's change reaches all ranks."""

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The parameter's full shape."""


class Whole:
    """Everything in this process."""

    is_main = True

    def construct(self) -> AbstractContextManager[Any]:
        """Nothing to arrange."""
        return nullcontext()

    def gathered(self, parameter: nn.Parameter, modify: bool = False) -> AbstractContextManager[Any]:
        """Nothing to gather."""
        return nullcontext()

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(parameter.shape)


def read_llama_config(folder: Path, n_future_tokens: int | None = None) -> LlamaConfig:
    """The config of a Llama-architecture folder, optionally with another number of heads.

    Raises:
        UserError: if it is missing, damaged, or of another architecture.
    """
    fields, file = read_config_fields(folder), folder / "config.json"
    if fields.get("model_type") != "llama":
        raise UserError(
            f"{file}: model_type is {fields.get('model_type')!r}; only Llama-architecture models work here."
        )
    refuse_foreign_code(fields, file)
    if n_future_tokens is not None:
        fields["n_future_tokens"] = n_future_tokens
    try:
        return LlamaConfig.from_dict(fields)
    except Exception as error:  # its validation raises exceptions of a dozen kinds
        raise UserError(f"{file} describes no Llama: {in_one_line(error)}") from None


def load_policy(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    sharding: Sharding | None = None,
    n_future_tokens: int | None = None,
) -> MTPLlamaForCausalLM:
    """Load a policy (or, with ``n_future_tokens=1``, any Llama as a next-token model) from a folder.

    Args:
        folder: config.json and safetensors weights.
        dtype: of the parameters; a sharding that has a dtype of its own (ZeRO-3 with bf16) wins.
        sharding: how to spread the parameters; None keeps them whole.
        n_future_tokens: overrides the config's; further heads in the files are left out.

    Raises:
        UserError: if files are missing or damaged, or names or shapes do not fit the config.
    """
    sharding = sharding or Whole()
    model = build_policy(check_architecture(folder, n_future_tokens), dtype=dtype, sharding=sharding)
    _fill(model, folder, sharding)
    return model


def build_policy(
    config: LlamaConfig, *, dtype: torch.dtype = torch.float32, sharding: Sharding | None = None
) -> MTPLlamaForCausalLM:
    """A policy whose weights are whatever its memory holds: what comes before they are filled in.

    Args: as :func:`load_policy`.
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with (sharding or Whole()).construct(), no_init_weights():
            model = MTPLlamaForCausalLM(config)
            model.tie_weights(recompute_mapping=False)  # which goes with the initialisation that is left out
    finally:
        torch.set_default_dtype(previous)
    return model


def check_architecture(folder: Path, n_future_tokens: int | None = None) -> LlamaConfig:
    """Build a folder's model without memory: what is wrong with its config.json is said before ranks make it together.

    Raises:
        UserError: if config.json is missing, damaged, or describes no model that can be built.
    """
    config, file = read_llama_config(folder, n_future_tokens), folder / "config.json"
    try:
        with torch.device("meta"), no_init_weights():
            MTPLlamaForCausalLM(config)
    except Exception as error:  # whatever transformers raises for values that do not go together
        raise UserError(f"{file} describes no model that can be built: {in_one_line(error)}") from None
    return config


def in_one_line(error: Exception) -> str:
    """What a library's error says; none of its advice to let code of others run."""
    if "trust_remote_code" in str(error):
        return "it is made by code in its own folder, and code of others is not run here"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _fill(model: MTPLlamaForCausalLM, folder: Path, sharding: Sharding) -> None:
    stored = stored_tensors(folder)
    # Names, dtypes and shapes are compared on every rank before anything is gathered: an error inside a collective
    # would leave the other ranks waiting.
    blocks = model.config.num_hidden_layers
    extra = sorted(number for number in numbers_of(stored, "model.layers") if number >= blocks)
    if extra:  # which would be left out without a word
        raise UserError(
            f"{folder}: the weights hold model.layers.{extra[0]}, but config.json says num_hidden_layers = {blocks}. "
            f"Set it to {extra[-1] + 1}, or copy the model again."
        )
    parameters = dict(model.named_parameters())
    missing = sorted(parameters.keys() - stored.keys())
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} tensors that its config.json asks for, first {missing[0]}.")
    for name, parameter in parameters.items():
        if stored[name].dtype not in _FLOATS:
            raise UserError(
                f"{stored[name].file}: {name} is stored as {stored[name].dtype}: quantised weights cannot be trained. "
                "Store the model in float32, bfloat16 or float16."
            )
        if stored[name].shape != sharding.shape(parameter):
            raise UserError(
                f"{stored[name].file}: {name} has shape {list(stored[name].shape)}, but config.json asks for "
                f"{list(sharding.shape(parameter))}."
            )
    for name, parameter in parameters.items():
        with sharding.gathered(parameter, modify=True), torch.no_grad():
            if sharding.is_main:
                parameter.copy_(_read(name, stored[name]))


def _read(name: str, stored: StoredTensor) -> Tensor:
    with safe_open(stored.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def save_weights(
    module: nn.Module,
    folder: Path,
    *,
    sharding: Sharding | None = None,
    value_of: Callable[[nn.Parameter], Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a module's parameters as safetensors shards with an index, gathering one parameter at a time.

    Every rank must call this; only the main one writes. Shared parameters are written once, as transformers expects.

    Args:
        module: its parameter names become the tensor names.
        folder: exists already.
        sharding: how parameters are spread.
        value_of: what to store for a gathered parameter, by default itself.
        shard_bytes: a new file is begun beyond this size; the memory needed on the main rank.

    Raises:
        OSError: on the main rank, if a file cannot be written; after all is gathered, so that no other rank waits.
    """
    sharding = sharding or Whole()
    failures: list[OSError] = []
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending_bytes
        if pending and sharding.is_main and not failures:
            try:
                _write_shard(pending, folder / f"part-{len(shards)}.safetensors")
            except OSError as error:
                failures.append(error)
        shards.append(list(pending))
        pending.clear()
        pending_bytes = 0

    for name, parameter in module.named_parameters():
        with sharding.gathered(parameter):
            value = parameter.detach() if value_of is None else value_of(parameter)
            if sharding.is_main:
                pending[name] = value.to("cpu", copy=True).contiguous()
                pending_bytes += math.prod(value.shape) * value.element_size()
                total_bytes += math.prod(value.shape) * value.element_size()
        if pending_bytes >= shard_bytes:
            flush()
    if pending:
        flush()
    if failures:
        raise failures[0]
    if sharding.is_main:
        _name_shards(folder, shards, total_bytes)


def _write_shard(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # also what a full disk comes as
        raise OSError(f"{file}: {error}") from error
    # safetensors makes a private file, of use to nobody else on a shared machine: as readable as its folder it is.
    file.chmod(file.parent.stat().st_mode & 0o666)


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give the parts the names that transformers looks for, now that their number is known."""
    if len(shards) == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, as its tokenizer.json stands; never runs code from the folder.

    Of the classes that a tokenizer_config.json may name, some take the vocabulary alone and cut texts by rules of their
    own (``LlamaTokenizer`` and ``GPT2Tokenizer`` of transformers 5).

    Raises:
        UserError: if there is none, or it lacks an end-of-text token.
    """
    if not folder.is_dir():  # transformers would take it for the name of a model on the hub
        raise UserError(f"{folder} does not exist: there is no tokenizer to load.")
    try:
        kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
        tokenizer = kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise bare Exceptions, too
        raise UserError(f"{folder} has no tokenizer that loads: {in_one_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {folder} has no end-of-text token (eos_token), which solutions must end with."
        )
    return tokenizer
