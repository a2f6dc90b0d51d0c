"""A model folder's config.json."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig


def write_config(folder: Path, config: LlamaConfig, dtype: torch.dtype) -> None:
    """config.json as ``LlamaForCausalLM``'s, so that tools without our code load the next-token model."""
    fields = config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
