"""What the tests of import and export make small models of, by plain torch alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCABULARY = 384
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
RELEASE: dict[str, Any] = {
    "dim": 64,
    "n_layers": 5,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": VOCABULARY,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "n_future_tokens": 3,
}


def randomise(state: dict[str, torch.Tensor], seed: int = 0) -> None:
    """Values that show in every logit: neither norms of 1 nor weights near 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in state.items():
            noise = torch.randn(tensor.shape, generator=generator) * 0.12
            tensor.copy_(noise + (1.0 if "norm" in name else 0.0))


def release_state(params: dict[str, Any], feed_forward: int, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Random weights in the names and shapes of Meta's model code."""
    dim, heads = params["dim"], params["n_heads"]
    keys = dim // heads * (params.get("n_kv_heads") or heads)
    n = params.get("n_future_tokens", 1)
    blocks = [f"layers.{i}" for i in range(params["n_layers"] - n + 1)] + [f"extra_heads.{i}" for i in range(n - 1)]
    shapes = {"tok_embeddings.weight": (params["vocab_size"], dim)}
    for block in blocks:
        shapes |= {
            f"{block}.attention.wq.weight": (dim, dim),
            f"{block}.attention.wk.weight": (keys, dim),
            f"{block}.attention.wv.weight": (keys, dim),
            f"{block}.attention.wo.weight": (dim, dim),
            f"{block}.feed_forward.w1.weight": (feed_forward, dim),
            f"{block}.feed_forward.w2.weight": (dim, feed_forward),
            f"{block}.feed_forward.w3.weight": (feed_forward, dim),
            f"{block}.attention_norm.weight": (dim,),
            f"{block}.ffn_norm.weight": (dim,),
        }
    shapes |= {"norm.weight": (dim,), "output.weight": (params["vocab_size"], dim)}
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    randomise(state, seed)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def divide(state: dict[str, torch.Tensor], ranks: int, embedding_axis: int) -> list[dict[str, torch.Tensor]]:
    """A state in the parts of model-parallel ranks, as fairscale's layers divide them."""
    axes = {
        "wq": 0,
        "wk": 0,
        "wv": 0,
        "w1": 0,
        "w3": 0,
        "output": 0,
        "wo": 1,
        "w2": 1,
        "tok_embeddings": embedding_axis,
    }
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in state.items():
        axis = axes.get(name.split(".")[-2])
        pieces = [tensor] * ranks if axis is None else tensor.chunk(ranks, dim=axis)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone()
    return parts


def pickled(folder: Path, parts: int = 1) -> Path:
    """Turn a folder of safetensors into one of pytorch_model*.bin."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if parts == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names = sorted(state)
    weight_map = {}
    for part in range(parts):
        file = f"pytorch_model-{part + 1:05d}-of-{parts:05d}.bin"
        mine = names[part::parts]
        torch.save({name: state[name] for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], file: str = "model.safetensors") -> None:
    """Change the tensors of a file of weights."""
    path = folder / file
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    change(state)
    if path.suffix == ".safetensors":
        save_file(state, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)


def edit(file: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
