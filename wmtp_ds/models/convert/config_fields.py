"""The config.json of what is written: one that tools old and new read the same model from."""

from typing import Any

import torch

from wmtp_ds.models.convert.architecture import llama_config

# Of the machine or the code that a model was made with.
_DROPPED = ("_name_or_path", "_model_name_or_path", "auto_map", "quantization_config", "transformers_version")


def config_fields(fields: dict[str, Any], heads: int | None, dtype: torch.dtype | None) -> dict[str, Any]:
    """The fields of a config.json.

    Args:
        fields: of the source.
        heads: n, for our layout; None for a plain next-token model.
        dtype: of the weights; None leaves what the source says.
    """
    rope: dict[str, Any] = dict(llama_config(fields, heads or 1, "config.json").rope_parameters or {})
    result = {name: value for name, value in fields.items() if name not in _DROPPED}
    result |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    # transformers 5 reads rope_parameters; everything older, and other tools, the other two.
    result |= {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    result["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    name = str(dtype).removeprefix("torch.") if dtype else fields.get("dtype") or fields.get("torch_dtype")
    if name:
        result |= {"dtype": name, "torch_dtype": name}
    result.pop("n_future_tokens", None)
    if heads is not None:
        result["n_future_tokens"] = heads
    return result
