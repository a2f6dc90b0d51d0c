"""Reward models: sequence classifiers with one label, whose score says how good a solution is.

Any architecture that transformers has as ``…ForSequenceClassification`` will do. Its parameters are sharded as they
are made and filled one at a time, as the policy's are. Models in the layout of Starling-RM (Zhu et al. 2023; after
InstructGPT's reward model, Ouyang et al. 2022: the blocks as ``transformer.*``, the linear layer as ``v_head``) are
read as the Llama classifiers that they are.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.initialization import no_init_weights

from wmtp_ds.data.rows import Row
from wmtp_ds.data.templates import Template
from wmtp_ds.errors import UserError
from wmtp_ds.models.config_file import read_config_fields, refuse_foreign_code
from wmtp_ds.models.convert.huggingface import folder_tensors
from wmtp_ds.models.convert.tensors import LazyTensor
from wmtp_ds.models.loading import Sharding, Whole

# What Starling-RM calls things -> what transformers does. It stores the causal model beside them once more.
_STARLING = ((re.compile(r"^transformer\."), "model."), (re.compile(r"^v_head\."), "score."))
_DUPLICATES = re.compile(r"^(model\.model\.|model\.lm_head\.|lm_head\.)")


class RewardModel(nn.Module):
    """A sequence classifier with one label, called with sequences of any length."""

    def __init__(self, classifier: Any):
        super().__init__()
        self.classifier = classifier

    @property
    def vocabulary(self) -> int:
        """How many tokens it embeds."""
        return int(self.classifier.config.get_text_config().vocab_size)

    def forward(self, input_ids_BS: Tensor, lengths_B: Tensor, pad_id: int) -> Tensor:
        """The score of each sequence, ``[B]`` float32.

        Args:
            input_ids_BS: int64, padded on the right with ``pad_id``.
            lengths_B: int64, how many tokens of each are no padding.
            pad_id: a token that occurs in no sequence: a classifier finds the last token by where padding begins.
        """
        positions_S = torch.arange(input_ids_BS.shape[1], device=input_ids_BS.device)
        mask_BS = (positions_S < lengths_B[:, None]).long()
        self.classifier.config.get_text_config().pad_token_id = pad_id
        output = self.classifier(input_ids=input_ids_BS, attention_mask=mask_BS)
        score_B: Tensor = output.logits.squeeze(-1).float()
        return score_B


class RewardEncoder:
    """A row to the tokens that a reward model judges.

    With the tokenizer's chat template, the problem is what the user says and the solution what the assistant answers;
    without one, prompt and solution stand between BOS and EOS, as in training. A sequence that is too long loses its
    left, but for the first token if that is BOS.
    """

    def __init__(self, tokenizer: Any, template: Template, max_length: int):
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length

    def __call__(self, row: Row) -> list[int]:
        """Token ids."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self.tokenizer.chat_template:
            problem = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
            messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": row.output}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            text = self.template(row) + row.output
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = [*([] if bos is None else [bos]), *ids, *([] if eos is None else [eos])]
        if len(ids) <= self.max_length:
            return ids
        kept = ids[:1] if ids[0] == bos else []
        return kept + ids[len(ids) - self.max_length + len(kept) :]


def padded(sequences: Sequence[Sequence[int]], vocabulary: int) -> tuple[Tensor, Tensor, int]:
    """What :class:`RewardModel` is called with: ``[B, S]`` ids, ``[B]`` lengths, and a token that none of them has."""
    used = {token for ids in sequences for token in ids}
    pad_id = next(token for token in range(vocabulary) if token not in used)
    lengths_B = torch.tensor([len(ids) for ids in sequences])
    input_ids_BS = torch.full((len(sequences), int(lengths_B.max())), pad_id)
    for row, ids in zip(input_ids_BS, sequences, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return input_ids_BS, lengths_B, pad_id


def read_reward_config(folder: Path) -> Any:
    """The config of a reward model's folder, as that of a classifier with one label.

    Raises:
        UserError: if it is missing, damaged, of an architecture without classifier, or has several labels.
    """
    fields, file = read_config_fields(folder), folder / "config.json"
    refuse_foreign_code(fields, file)
    try:
        config: Any = AutoConfig.for_model(**fields) if "model_type" in fields else None
    except Exception as error:  # its validation raises exceptions of a dozen kinds
        raise UserError(f"{file} describes no model: {' '.join(str(error).split())}") from None
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UserError(
            f"{file}: model_type is {fields.get('model_type')!r}, of which transformers has no sequence classifier. "
            "Name a reward model: one …ForSequenceClassification with one label."
        )
    names = [str(name) for name in fields.get("architectures") or []]
    labels = fields.get("num_labels", len(fields.get("id2label") or {}) or None)
    if labels is not None and labels != 1 and any("SequenceClassification" in name for name in names):
        raise UserError(f"{file}: the classifier has {labels} labels; a reward model has one, its score.")
    config.num_labels = 1
    config.use_cache = False
    return config


def load_reward_model(
    folder: Path, *, dtype: torch.dtype = torch.float32, sharding: Sharding | None = None
) -> RewardModel:
    """Load a reward model from a folder of Hugging Face's layout.

    Args:
        folder: config.json and weights, as safetensors or as ``torch.save`` made them.
        dtype: of the parameters; a sharding that has a dtype of its own (ZeRO-3 with bf16) wins.
        sharding: how to spread the parameters; None keeps them whole.

    Raises:
        UserError: if files are missing or damaged, or names or shapes do not fit the config.
    """
    sharding = sharding or Whole()
    config = read_reward_config(folder)
    stored = _named_as_here(folder_tensors(folder)[0])
    with sharding.construct(), no_init_weights():
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=dtype, trust_remote_code=False)
    parameters = dict(classifier.named_parameters())
    _check(folder, parameters, stored, sharding)
    for name, parameter in parameters.items():
        with sharding.gathered(parameter, modify=True), torch.no_grad():
            if sharding.is_main:
                _copy(parameter, stored[name])
    return RewardModel(classifier.eval().requires_grad_(False))


def _named_as_here(stored: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    if "v_head.weight" not in stored:
        return stored
    renamed = {}
    for name, tensor in stored.items():
        if _DUPLICATES.match(name):
            continue
        for pattern, replacement in _STARLING:
            name = pattern.sub(replacement, name)
        renamed[name] = tensor
    return renamed


def _check(
    folder: Path, parameters: dict[str, nn.Parameter], stored: dict[str, LazyTensor], sharding: Sharding
) -> None:
    """On every rank before anything is gathered: an error inside a collective would leave the other ranks waiting."""
    missing = sorted(parameters.keys() - stored.keys())
    if missing:
        hint = " It has no score layer: this is no reward model." if missing == ["score.weight"] else ""
        raise UserError(
            f"{folder} lacks {len(missing)} tensors that its config.json asks for, first {missing[0]}.{hint}"
        )
    for name, parameter in parameters.items():
        if stored[name].shape != sharding.shape(parameter):
            raise UserError(
                f"{stored[name].origin} has shape {list(stored[name].shape)}, but config.json asks for "
                f"{list(sharding.shape(parameter))}."
            )


def _copy(parameter: nn.Parameter, stored: LazyTensor) -> None:
    start = 0
    for block in stored.blocks():
        parameter[start : start + len(block)] = block.to(parameter.dtype)
        start += len(block)
