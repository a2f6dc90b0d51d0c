"""Next-token models of any architecture that transformers has, to be evaluated; what is trained here are Llamas."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from wmtp_ds.errors import UserError
from wmtp_ds.models.config_file import read_config_fields, refuse_foreign_code
from wmtp_ds.models.loading import in_one_line


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many tokens a model has positions for, where it has learned an embedding of each; None where it has none.

    Others, of rotary or relative positions, take any number of tokens.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    # OPT and its kin keep two rows more than positions.
    if isinstance(most, int) and any(
        most <= table.num_embeddings <= most + 2 and table is not model.get_input_embeddings() for table in tables
    ):
        return most
    return None


def load_causal(folder: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """A next-token model, from safetensors alone and without code from the folder.

    Args:
        folder: config.json and safetensors weights.
        dtype: of the parameters.

    Raises:
        UserError: there is no such architecture, or files are missing, damaged, or do not fit it.
    """
    fields, file = read_config_fields(folder), folder / "config.json"
    refuse_foreign_code(fields, file)
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{file}: model_type is {kind!r}, of which transformers has no model that generates text.")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no safetensors weights; others are not read, because they can hold programs.")
    try:
        config = CONFIG_MAPPING[kind].from_dict(fields)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=False, local_files_only=True, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # transformers and safetensors raise exceptions of a dozen kinds
        raise UserError(f"{folder} holds no {kind} model that loads: {in_one_line(error)}") from None
    model: PreTrainedModel = loaded[0]
    found: dict[str, Any] = loaded[1]
    lacking = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
    if lacking:
        # transformers fills these with random numbers.
        raise UserError(
            f"{folder}: its weights lack {lacking[0]}" + f" and {len(lacking) - 1} more" * (len(lacking) > 1)
        )
    # Nothing of the folder's generation_config.json: `generate` fills what it is not told with it, and penalties, beams
    # and forbidden tokens there would change what is measured.
    model.generation_config = GenerationConfig()
    return model
