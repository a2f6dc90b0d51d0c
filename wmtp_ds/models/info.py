"""What a model folder holds, from configs and headers alone: no weights are read, and torch only for its own files."""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp_ds.errors import UserError
from wmtp_ds.models.config_file import read_config_fields
from wmtp_ds.models.fingerprint import is_trunk, numbers_of, read_trunk_fingerprint, stored_tensors
from wmtp_ds.models.layouts import tell_layout
from wmtp_ds.models.tokenizer_file import read_vocabulary, tokenizer_fingerprint

if TYPE_CHECKING:
    from wmtp_ds.models.convert.source import Source


@dataclass(frozen=True)
class ModelInfo:
    """What there is to say of a model. Sizes count parameters, not bytes.

    Attributes:
        path, layout: its folder; "mtp" (ours), "huggingface" or "meta".
        architecture: class of its next-token model.
        n_future_tokens: heads, n.
        trunk_blocks: blocks before head 1.
        hidden_size, intermediate_size, attention_heads, key_value_heads, vocabulary: as the config says.
        rope: of the rotary embedding.
        tied: whether the unembedding is the embeddings.
        dtypes: elements stored in each dtype.
        parameters: "embeddings", "trunk", "heads" (one number each), "norm", "unembedding" (0 if tied), "total".
        nbytes, files: of the weights.
        tokenizer: "file", "tokens" and "fingerprint" (SHA-256 of what each id means), or None.
        trunk_fingerprint: as stored beside the weights, or None.
    """

    path: str
    layout: str
    architecture: str
    n_future_tokens: int
    trunk_blocks: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    key_value_heads: int
    vocabulary: int
    rope: dict[str, Any]
    tied: bool
    dtypes: dict[str, int]
    parameters: dict[str, Any]
    nbytes: int
    files: int
    tokenizer: dict[str, Any] | None
    trunk_fingerprint: str | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> dict[str, str]:
        """For people: what a line is about, and the line."""
        counts, tokenizer = self.parameters, self.tokenizer
        stored = [f"{dtype} ({size:,})" if len(self.dtypes) > 1 else dtype for dtype, size in self.dtypes.items()]
        attention = f"{self.attention_heads} attention heads, {self.key_value_heads} of keys and values"
        return {
            "layout": self.layout,
            "architecture": f"{self.architecture}, {self.trunk_blocks} trunk blocks, {self.n_future_tokens} heads",
            "sizes": f"hidden {self.hidden_size}, feed-forward {self.intermediate_size}, {attention}, vocabulary "
            f"{self.vocabulary}",
            "rotary": ", ".join(f"{name} {value}" for name, value in self.rope.items()),
            "parameters": f"{counts['total']:,}",
            "  embeddings": f"{counts['embeddings']:,}",
            "  trunk": f"{counts['trunk']:,}",
            **{f"  head {number}": f"{size:,}" for number, size in enumerate(counts["heads"], 1)},
            "  norm": f"{counts['norm']:,}",
            "  unembedding": "the embeddings" if self.tied else f"{counts['unembedding']:,}",
            "dtype": ", ".join(stored),
            "weights": f"{self.nbytes / 1e9:.3f} GB in {self.files} files",
            "tokenizer": f"{tokenizer['tokens']} tokens, {tokenizer['fingerprint']}" if tokenizer else "none",
            "trunk": self.trunk_fingerprint or "no fingerprint stored",
        }


@dataclass(frozen=True)
class _Header:
    """Config; name in our layout -> (dtype, shape); sizes of the weights; of Meta's layout what was opened."""

    fields: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    nbytes: int
    files: int
    release: "Source | None" = None


def model_info(path: Path) -> ModelInfo:
    """Look at a folder of ours, of Hugging Face's or of Meta's layout.

    Raises:
        UserError: if it holds no model, or is damaged as far as headers show.
    """
    layout, path = tell_layout(path)
    if layout == "gguf":
        raise UserError(f"{path} is a GGUF file: import it first (wmtp-ds model import), then look at that.")
    header = _meta(path) if layout == "meta" else _huggingface(path)
    fields = header.fields
    shapes = {name: shape for name, (_, shape) in header.tensors.items()}
    blocks = len(numbers_of(shapes, "model.layers"))
    if not blocks:
        raise UserError(f"{path}: its weights are no Llama's: there is no model.layers.0.")
    heads = len(numbers_of(shapes, "mtp_heads")) + 1
    for key, held in (("num_hidden_layers", blocks), ("n_future_tokens", heads)):
        if fields.get(key) not in (None, held):
            raise UserError(f"{path}: config says {key} = {fields[key]!r}, but the weights are of {held}. Correct it.")
    dtypes: Counter[str] = Counter()
    for dtype, shape in header.tensors.values():
        dtypes[dtype] += math.prod(shape)
    return ModelInfo(
        path=str(path),
        layout="mtp" if layout == "huggingface" and fields.get("n_future_tokens") is not None else layout,
        architecture=_architecture(fields),
        n_future_tokens=heads,
        trunk_blocks=blocks - 1,
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        attention_heads=fields["num_attention_heads"],
        key_value_heads=fields.get("num_key_value_heads") or fields["num_attention_heads"],
        vocabulary=fields["vocab_size"],
        rope=_rope(fields),
        tied="lm_head.weight" not in shapes,
        dtypes=dict(dtypes),
        parameters=count_parameters(shapes, blocks),
        nbytes=header.nbytes,
        files=header.files,
        tokenizer=_tokenizer(path, header.release),
        trunk_fingerprint=None if layout == "meta" else read_trunk_fingerprint(path),
    )


def count_parameters(shapes: dict[str, tuple[int, ...]], blocks: int) -> dict[str, Any]:
    """Parameters of each part of a model whose next-token model has ``blocks`` blocks."""
    parts: Counter[str] = Counter()
    heads = Counter({1: 0})
    for name, shape in shapes.items():
        size = math.prod(shape)
        if name.startswith("model.embed_tokens."):
            parts["embeddings"] += size
        elif is_trunk(name, blocks):
            parts["trunk"] += size
        elif name.startswith("model.layers."):
            heads[1] += size
        elif name.startswith("mtp_heads."):
            heads[int(name.split(".")[1]) + 2] += size
        else:
            parts["unembedding" if name == "lm_head.weight" else "norm"] += size
    counted = {part: parts[part] for part in ("embeddings", "trunk", "norm", "unembedding")}
    return counted | {"heads": [size for _, size in sorted(heads.items())], "total": parts.total() + heads.total()}


def _huggingface(folder: Path) -> _Header:
    fields = read_config_fields(folder)
    if fields.get("model_type") != "llama":
        raise UserError(f"{folder / 'config.json'}: model_type is {fields.get('model_type')!r}; only 'llama' is known.")
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        if type(fields.get(key)) is not int:
            raise UserError(f"{folder / 'config.json'} says {key} = {fields.get(key)!r}, which is no whole number.")
    if any(file.name != "value_head.safetensors" for file in folder.glob("*.safetensors*")):
        stored = _own(stored_tensors(folder), fields)
        tensors = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}
        nbytes = sum(tensor.stop - tensor.start for tensor in stored.values())
        return _Header(fields, tensors, nbytes, len({tensor.file for tensor in stored.values()}))
    from wmtp_ds.models.convert.huggingface import pickled_shards
    from wmtp_ds.models.convert.safetensors_files import dtype_name
    from wmtp_ds.models.convert.torch_files import TorchFile

    files = pickled_shards(folder)
    found = {name: tensor for file in files for name, tensor in TorchFile(file, verify=False).tensors().items()}
    lazy = _own(found, fields)
    tensors = {name: (dtype_name(tensor.dtype), tensor.shape) for name, tensor in lazy.items()}
    return _Header(fields, tensors, sum(tensor.nbytes for tensor in lazy.values()), len(files))


def _own(tensors: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Without what is computed (rotary frequencies) or stored twice (a tied unembedding)."""
    is_tied = bool(fields.get("tie_word_embeddings")) and "model.embed_tokens.weight" in tensors
    return {
        name: tensor
        for name, tensor in tensors.items()
        if ".rotary_emb." not in name and not (is_tied and name == "lm_head.weight")
    }


def _meta(folder: Path) -> _Header:
    from wmtp_ds.models.convert.meta import open_release
    from wmtp_ds.models.convert.safetensors_files import dtype_name

    source = open_release(folder, verify=False)
    tensors = {name: (dtype_name(tensor.dtype), tensor.shape) for name, tensor in source.tensors.items()}
    nbytes = sum(tensor.nbytes for tensor in source.tensors.values())
    files = sum(file.suffix == ".pth" for file in source.files)
    return _Header(source.fields, tensors, nbytes, files, source)


def _architecture(fields: dict[str, Any]) -> str:
    said = fields.get("architectures") or "LlamaForCausalLM"
    return ", ".join(map(str, said)) if isinstance(said, list) else str(said)


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Base and scaling, wherever this version of transformers or an older one keeps them."""
    said = fields.get("rope_scaling") or fields.get("rope_parameters")
    found = dict(said) if isinstance(said, dict) else {}
    found.setdefault("rope_type", found.pop("type", "default"))
    found.setdefault("rope_theta", fields.get("rope_theta", 10000.0))
    return found


def _tokenizer(folder: Path, source: "Source | None") -> dict[str, Any] | None:
    """A tokenizer's vocabulary; of a tokenizer.model, as it will be once it is imported."""
    file = folder / "tokenizer.json"
    if file.is_file():
        tokens = read_vocabulary(file)
    elif source is not None and source.tokenizer.kind == "model":
        from wmtp_ds.models.convert.tokenizer_models import from_tokenizer_model

        file = source.tokenizer.path
        made = from_tokenizer_model(file, source.fields["vocab_size"])
        tokens = {number: token for token, number in made.get_vocab().items()}
    else:
        return None
    return {"file": file.name, "tokens": len(tokens), "fingerprint": tokenizer_fingerprint(tokens)}
