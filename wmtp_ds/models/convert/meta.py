"""Meta's layout: params.json, consolidated.pth or one consolidated.NN.pth a model-parallel rank, tokenizer.model.

As Meta released the models of "Better & Faster Large Language Models via Multi-token Prediction" (2024): of
``n_layers`` blocks, ``layers.0 … layers.{n_layers − n}`` are the trunk and head 1, ``extra_heads.0 … n − 2`` the other
heads. With n = 1 it is the layout of the Llama releases.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmtp_ds.errors import UserError
from wmtp_ds.models.config_file import read_json_object
from wmtp_ds.models.convert.source import Source
from wmtp_ds.models.convert.tensors import LazyTensor, checksum, halves_from_pairs, joined
from wmtp_ds.models.convert.tokenizer import find_tokenizer
from wmtp_ds.models.convert.torch_files import TorchFile
from wmtp_ds.models.fingerprint import numbers_of

# Key in config.json under which the original params.json is kept for the way back.
RELEASE = "meta_release"
# Meta's name within a block, ours, and the axis along which model-parallel ranks divide it (None: each has it whole).
BLOCK = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
# The embeddings' axis is 1 up to Llama 2, 0 (the vocabulary) in Llama 3.
OUTSIDE = {
    "tok_embeddings": ("model.embed_tokens", 1),
    "norm": ("model.norm", None),
    "output": ("lm_head", 0),
}
# Computed by the model; some releases store it all the same.
_BUFFER = re.compile(r"(^|\.)(rope\.freqs|freqs_cis)$")
_FOREIGN = ("moe", "moe_args", "quantization_args", "lora_args", "vision_chunk_size")
# Llama 3.1's, which params.json only switches on; Llama 3.2 (1B and 3B, told by their width) has a factor of its own.
SCALED_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

_LLAMA_3_2 = (2048, 3072)


@dataclass(frozen=True)
class Names:
    """A tensor's name in Meta's layout, in ours, and how ranks divide it."""

    meta: str
    ours: str
    axis: int | None


def tensor_names(blocks: int, heads: int, embedding_axis: int = 1) -> list[Names]:
    """Every tensor of a model whose next-token model has ``blocks`` blocks, in the order of Meta's modules."""

    def block(meta: str, ours: str) -> list[Names]:
        parts = [(theirs, mine, axis) for theirs, (mine, axis) in BLOCK.items()]
        return [Names(f"{meta}.{theirs}.weight", f"{ours}.{mine}.weight", axis) for theirs, mine, axis in parts]

    def outside(name: str) -> Names:
        ours, axis = OUTSIDE[name]
        return Names(f"{name}.weight", f"{ours}.weight", embedding_axis if name == "tok_embeddings" else axis)

    names = [outside("tok_embeddings")]
    for number in range(blocks):
        names += block(f"layers.{number}", f"model.layers.{number}")
    for number in range(heads - 1):
        names += block(f"extra_heads.{number}", f"mtp_heads.{number}")
    return [*names, outside("norm"), outside("output")]


def open_release(folder: Path, tokenizer: Path | None = None, *, verify: bool = True) -> Source:
    """Open a folder of Meta's layout; the tokenizer may also lie in the folder above, as in Meta's release.

    Args:
        folder: with params.json and weights.
        tokenizer: folder or file to take the tokenizer from.
        verify: compare the weights with the checksums in their files, which reads all of them once.

    Raises:
        UserError: if files are missing or damaged, or params.json and the weights disagree.
    """
    params = read_params(folder / "params.json")
    paths = release_files(folder)
    opened = [TorchFile(path, verify=verify) for path in paths]
    if len(paths) > 1 and (old := [file.path for file in opened if not file.is_archive]):
        raise UserError(
            f"{old[0]} is of torch's file format before 1.6, which cannot be read in parts along with the other files. "
            "Save it anew: torch.save(torch.load(FILE, weights_only=True), FILE)"
        )
    shards = [file.tensors() for file in opened]
    for shard in shards:
        for name in [name for name in shard if _BUFFER.search(name)]:
            del shard[name]
    heads = _count_heads(folder, params, set().union(*shards))
    vocabulary = _vocabulary(folder, params, shards)
    axis = _embedding_axis(params, shards)
    fields = fields_of(params, heads, vocabulary, _intermediate(folder, params, shards))
    fields["dtype"] = str(shards[0]["output.weight"].dtype).removeprefix("torch.")
    fields[RELEASE] = {"params": params, "files": [path.name for path in paths], "embedding_axis": axis}
    names = tensor_names(fields["num_hidden_layers"], heads, axis)
    tensors = {name.ours: _tensor(folder, name, shards, fields["head_dim"]) for name in names}
    if unknown := sorted(set().union(*shards) - {name.meta for name in names}):
        raise UserError(f"{folder}: the weights hold {unknown[0]}, which no model of Meta's multi-token layout has.")
    place = folder if (folder / "tokenizer.model").is_file() else folder.parent
    found = find_tokenizer(place if (place / "tokenizer.model").is_file() else folder, tokenizer)
    return Source(folder, "meta", fields, tensors, found, [folder / "params.json", *paths, *found.files()])


def read_params(file: Path) -> dict[str, Any]:
    """params.json, with what it must say.

    Raises:
        UserError: if it is missing or damaged, or describes another kind of model.
    """
    params = read_json_object(file, "Meta's layout has one beside its consolidated.*.pth.")
    params = params["model"] if isinstance(params.get("model"), dict) else params
    check_params(params, str(file))
    return params


def check_params(params: dict[str, Any], where: str) -> None:
    """What a params.json must say, and must not.

    Raises:
        UserError: if it does otherwise.
    """
    for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "n_future_tokens", "multiple_of"):
        needed = key in ("dim", "n_layers", "n_heads")
        value = params.get(key)
        if (value is None and needed) or (value is not None and (type(value) is not int or value < 1)):
            raise UserError(f"{where} says {key} = {value!r}; it must be a whole number of at least 1.")
    for key in ("norm_eps", "rope_theta", "ffn_dim_multiplier"):
        value = params.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise UserError(f"{where} says {key} = {value!r}; it must be a number above 0.")
    if foreign := [key for key in _FOREIGN if params.get(key)]:
        raise UserError(f"{where} says {foreign[0]}: such models are not supported, only dense Llama models of text.")
    if params["dim"] % params["n_heads"] or params["n_heads"] % (params.get("n_kv_heads") or 1):
        raise UserError(f"{where}: n_heads must divide dim, and n_kv_heads must divide n_heads.")


def release_files(folder: Path) -> list[Path]:
    """The weights of a release, in the order of their ranks.

    Raises:
        UserError: if one of them is missing, as far as their names tell.
    """
    numbered = sorted(folder.glob("consolidated.*.pth"))
    paths = numbered or sorted(folder.glob("*.pth"))
    for number, path in enumerate(numbered):
        if path.name != f"consolidated.{number:02d}.pth":
            raise UserError(f"{folder / f'consolidated.{number:02d}.pth'} is missing, but there is {path.name}.")
    if not numbered and len(paths) > 1:
        raise UserError(f"{folder} holds {', '.join(path.name for path in paths)}; expected consolidated.NN.pth.")
    return paths


def feed_forward_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward layers, by the rule of Meta's model code."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def fields_of(params: dict[str, Any], heads: int, vocabulary: int, intermediate: int) -> dict[str, Any]:
    """The config.json of a release."""
    scaled = bool(params.get("use_scaled_rope"))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(params.get("rope_theta") or 10000.0)}
    if scaled:
        factor = params.get("rope_scaling_factor") or (32.0 if params["dim"] in _LLAMA_3_2 else 8.0)
        rope |= SCALED_ROPE | {"rope_type": "llama3", "factor": float(factor)}
        rope["high_freq_factor"] = float(params.get("rope_high_freq_factor") or rope["high_freq_factor"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": params["dim"],
        "intermediate_size": intermediate,
        "num_hidden_layers": params["n_layers"] - heads + 1,
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "head_dim": params["dim"] // params["n_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": params.get("norm_eps") or 1e-5,
        "rope_parameters": rope,
        # params.json does not say it: what the models were trained with.
        "max_position_embeddings": 131072 if scaled else 8192 if vocabulary >= 128000 else 4096,
        "tie_word_embeddings": False,
        "n_future_tokens": heads,
    }


def _count_heads(folder: Path, params: dict[str, Any], names: set[str]) -> int:
    """n, which params.json says or the weights show; they must agree."""
    extra, blocks = numbers_of(names, "extra_heads"), numbers_of(names, "layers")
    heads: int = params.get("n_future_tokens") or len(extra) + 1
    if extra != set(range(heads - 1)):
        raise UserError(
            f"{folder}: params.json says n_future_tokens = {heads}, which is {heads - 1} extra heads (extra_heads.*), "
            f"but the weights hold {len(extra)}. Correct n_future_tokens to {len(extra) + 1}, or copy the model again."
        )
    wanted = params["n_layers"] - heads + 1
    if blocks != set(range(wanted)):
        raise UserError(
            f"{folder}: params.json says n_layers = {params['n_layers']} with n_future_tokens = {heads}, which is "
            f"{wanted} blocks (layers.*), but the weights hold {len(blocks)}. Copy the model again."
        )
    return heads


def _require(folder: Path, shards: list[dict[str, LazyTensor]], name: str) -> list[LazyTensor]:
    """A tensor's part in each shard."""
    lacking = [number for number, shard in enumerate(shards) if name not in shard]
    if lacking:
        raise UserError(
            f"{folder / f'consolidated.{lacking[0]:02d}.pth' if len(shards) > 1 else folder} lacks the tensor {name}. "
            "Copy the model again."
        )
    if any(not shard[name].shape for shard in shards):
        raise UserError(f"{folder}: {name} is a single number, no weights. Copy the model again.")
    return [shard[name] for shard in shards]


def _vocabulary(folder: Path, params: dict[str, Any], shards: list[dict[str, LazyTensor]]) -> int:
    rows = sum(part.shape[0] for part in _require(folder, shards, "output.weight"))
    said = params.get("vocab_size")
    if isinstance(said, int) and said > 0 and said != rows:
        raise UserError(
            f"{folder}: params.json says vocab_size = {said}, but output.weight has {rows} rows in {len(shards)} "
            "file(s). Is a consolidated.*.pth missing?"
        )
    return rows


def _embedding_axis(params: dict[str, Any], shards: list[dict[str, LazyTensor]]) -> int:
    embeddings = shards[0].get("tok_embeddings.weight")
    return 0 if len(shards) > 1 and embeddings is not None and embeddings.shape[-1:] == (params["dim"],) else 1


def _intermediate(folder: Path, params: dict[str, Any], shards: list[dict[str, LazyTensor]]) -> int:
    held = sum(part.shape[0] for part in _require(folder, shards, "layers.0.feed_forward.w1.weight"))
    if params.get("multiple_of") is None:
        return held
    size = feed_forward_size(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier"))
    if size != held:
        raise UserError(
            f"{folder}: by params.json (dim, multiple_of, ffn_dim_multiplier) feed-forward layers are {size} wide, but "
            f"layers.0.feed_forward.w1.weight has {held} rows in {len(shards)} file(s). "
            "Is a consolidated.*.pth missing?"
        )
    return held


def _tensor(folder: Path, names: Names, shards: list[dict[str, LazyTensor]], head_dim: int) -> LazyTensor:
    """A tensor of our layout, of its parts in the shards of Meta's."""
    parts = _require(folder, shards, names.meta)
    first = parts[0]
    dimensions = 1 if names.axis is None else 2
    if any(len(part.shape) != dimensions or part.dtype != first.dtype for part in parts):
        raise UserError(f"{first.origin} is not a tensor of {dimensions} dimensions and one dtype in all shards.")
    if names.axis is None:
        if any(part.shape != first.shape or checksum(part) != checksum(first) for part in parts[1:]):
            raise UserError(f"{folder}: {names.meta} differs between the shards: they are not of one model.")
        return first
    if any(part.shape[1 - names.axis] != first.shape[1 - names.axis] for part in parts):
        raise UserError(f"{folder}: {names.meta} does not fit together: the shards are not of one model.")
    tensor = joined(parts, names.axis)
    if not names.ours.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    if tensor.shape[0] % head_dim or head_dim % 2:
        raise UserError(
            f"{tensor.origin} has {tensor.shape[0]} rows, which are not whole heads of {head_dim} (params.json)."
        )
    return halves_from_pairs(tensor, head_dim)
