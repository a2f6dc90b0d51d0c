"""The way back to Meta's layout."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmtp_ds.errors import UserError
from wmtp_ds.models.convert import torch_files
from wmtp_ds.models.convert.architecture import EMBEDDINGS, UNEMBEDDING, llama_config
from wmtp_ds.models.convert.deliver import Delivered, Progress, differs, plan_of, write_files
from wmtp_ds.models.convert.meta import (
    RELEASE,
    SCALED_ROPE,
    check_params,
    feed_forward_size,
    fields_of,
    tensor_names,
)
from wmtp_ds.models.convert.source import Source
from wmtp_ds.models.convert.staging import Staging, check_space
from wmtp_ds.models.convert.tensors import LazyTensor, checksum, pairs_from_halves, portion

_FILE = "consolidated.00.pth"


def deliver_release(source: Source, final: Path, *, progress: Progress) -> Delivered:
    """Write params.json, the weights and tokenizer.model; as many files as the model was imported from, else one.

    Raises:
        UserError: if Meta's layout has no place for something that the model has.
        RunError: if it cannot be written, or differs from what was written when read back.
    """
    params = params_of(source)
    files = split_ranks(source, params)
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    check_space(final, total)
    with Staging(final, plan_of(source, files, {"format": "meta"})) as staging:
        (staging.folder / "params.json").write_text(json.dumps(params, indent=2) + "\n")
        warnings = _copy_tokenizer(source, staging.folder)
        progress.start(2 * total)
        sums = write_files(staging, files, torch_files.write, progress)
        for name, tensors in files.items():
            _read_back(staging.folder / name, tensors, sums[name], progress)
        staging.publish()
    return Delivered(
        folder=final,
        files=list(files),
        tensors=sum(map(len, files.values())),
        parameters=sum(tensor.nbytes // tensor.dtype.itemsize for tensor in source.tensors.values()),
        nbytes=total,
        resumed=staging.resumed,
        warnings=warnings,
    )


def params_of(source: Source) -> dict[str, Any]:
    """The params.json of a model: the one that it was imported with, if it still describes the model.

    Raises:
        UserError: if Meta's layout has no place for something that the model has.
    """
    config = llama_config(source.fields, source.heads, str(source.path))
    _check_fits(source, config)
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    kept = _release(source)["params"]
    if kept and _describes(kept, source):
        return dict(kept)
    multiple_of, multiplier = _feed_forward_rule(config.hidden_size, config.intermediate_size)
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers + source.heads - 1,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple_of,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
    }
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if source.heads > 1:
        params["n_future_tokens"] = source.heads
    if rope["rope_type"] == "llama3":
        params |= {"use_scaled_rope": True, "rope_scaling_factor": rope["factor"]}
    return params


def _release(source: Source) -> dict[str, Any]:
    """What import has kept of the release: params.json, names of files, the embeddings' axis.

    It comes with the model, from wherever that comes: a name that is no name of a file here counts for nothing.
    """
    kept = source.fields.get(RELEASE)
    kept = kept if isinstance(kept, dict) else {}
    files, axis, params = kept.get("files"), kept.get("embedding_axis"), kept.get("params")
    if (
        not isinstance(files, list)
        or not isinstance(params, dict)
        or not all(isinstance(name, str) and re.fullmatch(r"[\w-]+(\.\d+)?\.pth", name) for name in files)
        or len(set(files)) != max(len(files), 1)
        or axis not in (0, 1)
    ):
        return {"params": None, "files": [_FILE], "embedding_axis": 1}
    return {"params": params, "files": files, "embedding_axis": axis}


def _describes(params: dict[str, Any], source: Source) -> bool:
    """Whether an original params.json still says what the model's config does."""
    try:
        check_params(params, "params.json")
    except UserError:
        return False
    config = llama_config(source.fields, source.heads, str(source.path))
    wanted = fields_of(params, source.heads, config.vocab_size, config.intermediate_size)
    original = llama_config(wanted, source.heads, "params.json")
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    multiple_of = params.get("multiple_of")
    return (
        all(getattr(original, name) == getattr(config, name) for name in same)
        and original.rope_parameters == config.rope_parameters
        and params.get("vocab_size") in (None, -1, config.vocab_size)
        and (params.get("n_future_tokens") or source.heads) == source.heads
        and (
            multiple_of is None
            or feed_forward_size(params["dim"], multiple_of, params.get("ffn_dim_multiplier"))
            == config.intermediate_size
        )
    )


def _check_fits(source: Source, config: Any) -> None:
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    scaling = {name: rope.get(name) for name in SCALED_ROPE}
    for is_wrong, what in (
        (config.attention_bias or config.mlp_bias, "biases"),
        (config.head_dim * config.num_attention_heads != config.hidden_size, f"head_dim = {config.head_dim}"),
        (config.hidden_act != "silu", f"hidden_act = {config.hidden_act}"),
        (rope["rope_type"] not in ("default", "llama3"), f"rope scaling of type {rope['rope_type']}"),
        (rope["rope_type"] == "llama3" and scaling != SCALED_ROPE, "rope scaling of other values than Llama 3.1's"),
    ):
        if is_wrong:
            raise UserError(f"{source.path} has {what}, for which Meta's layout has no place. Export it as hf or mtp.")


def _feed_forward_rule(dim: int, intermediate: int) -> tuple[int, float | None]:
    """``multiple_of`` and ``ffn_dim_multiplier`` of which Meta's rule makes a width."""
    multiples = [number for number in (256, 128, 64, 32, 16, 8, 4, 2, 1) if intermediate % number == 0]
    for multiple_of in multiples:
        if feed_forward_size(dim, multiple_of, None) == intermediate:
            return multiple_of, None
    # The rule rounds down to a whole number, then up to a multiple.
    multiplier = (intermediate if multiples[0] > 1 else intermediate + 0.5) / int(8 * dim / 3)
    assert feed_forward_size(dim, multiples[0], multiplier) == intermediate
    return multiples[0], multiplier


def split_ranks(source: Source, params: Mapping[str, Any]) -> dict[str, dict[str, LazyTensor]]:
    """Tensors in Meta's names and order of rows, by file: one a model-parallel rank."""
    release = _release(source)
    names, axis = release["files"], release["embedding_axis"]
    ranks = len(names)
    head_dim = params["dim"] // params["n_heads"]
    files: dict[str, dict[str, LazyTensor]] = {name: {} for name in names}
    for tensor_name in tensor_names(source.fields["num_hidden_layers"], source.heads, axis):
        ours = tensor_name.ours
        tensor = source.tensors[EMBEDDINGS if ours == UNEMBEDDING and ours not in source.tensors else ours]
        if ours.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = pairs_from_halves(tensor, head_dim)
        split = tensor_name.axis
        if split is not None and tensor.shape[split] % ranks:
            raise UserError(f"{tensor.origin} of shape {list(tensor.shape)} cannot be divided among {ranks} files.")
        for rank, file in enumerate(names):
            files[file][tensor_name.meta] = tensor if split is None else portion(tensor, split, rank, ranks)
    return files


def _copy_tokenizer(source: Source, folder: Path) -> list[str]:
    tokenizer = source.tokenizer
    file = tokenizer.path / "tokenizer.model" if tokenizer.kind in ("json", "folder") else tokenizer.path
    if tokenizer.kind == "gguf" or not file.is_file():
        return [f"{source.path} has no tokenizer.model, which Meta's code reads: copy the model's own there"]
    shutil.copyfile(file, folder / "tokenizer.model")
    return []


def _read_back(file: Path, wanted: Mapping[str, LazyTensor], sums: Mapping[str, str], progress: Progress) -> None:
    found = torch_files.TorchFile(file).tensors()
    if found.keys() != wanted.keys():
        raise differs(file, f"it holds {len(found)} tensors, not {len(wanted)},")
    for name, tensor in found.items():
        if (tensor.dtype, tensor.shape) != (wanted[name].dtype, wanted[name].shape):
            raise differs(file, f"tensor {name} is {tensor.dtype} {list(tensor.shape)}")
        if checksum(tensor) != sums[name]:
            raise differs(file, f"tensor {name} has another checksum")
        progress.advance(tensor.nbytes)
