"""Reward models against plain transformers, one sequence at a time and without padding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from wmtp_ds.data.rows import Row
from wmtp_ds.data.templates import get_template
from wmtp_ds.errors import UserError
from wmtp_ds.models.micro import train_tokenizer
from wmtp_ds.models.reward import RewardEncoder, RewardModel, load_reward_model, padded, read_reward_config

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SEQUENCES = [[1, 5, 9, 2], [1, 7, 2], [1, 4, 4, 4, 0, 8, 2], [1]]


def llama(**fields: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(3)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1, **fields)).eval()


def bert() -> BertForSequenceClassification:
    torch.manual_seed(4)
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=1)).eval()


def save_as_starling(model: LlamaForSequenceClassification, folder: Path) -> None:
    """The blocks three times over, as the module that Starling-RM was trained with names them."""
    folder.mkdir()
    causal = LlamaForCausalLM(model.config)
    causal.model.load_state_dict(model.model.state_dict())
    state = {f"model.{name}": value for name, value in causal.state_dict().items()}
    state |= {f"transformer.{name}": value for name, value in model.model.state_dict().items()}
    state["v_head.weight"] = model.score.weight.detach()
    torch.save(state, folder / "pytorch_model.bin")
    fields = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(fields))


def alone(classifier: Any, sequences: list[list[int]]) -> torch.Tensor:
    """Scores one by one: where there is no padding, no token can be taken for it."""
    classifier.config.pad_token_id = None
    with torch.no_grad():
        return torch.stack([classifier(input_ids=torch.tensor([ids])).logits.view(()) for ids in sequences])


def scores(model: RewardModel, sequences: list[list[int]] = SEQUENCES) -> torch.Tensor:
    with torch.no_grad():
        return model(*padded(sequences, 300))


@pytest.mark.parametrize("pad", [None, 0, 2])  # 2 is what sequences end with
def test_a_llama_classifier_scores_as_in_transformers(tmp_path: Path, pad: int | None) -> None:
    original = llama(pad_token_id=pad)
    original.save_pretrained(tmp_path / "reward")
    found = scores(load_reward_model(tmp_path / "reward"))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, alone(original, SEQUENCES), rtol=0, atol=1e-6)
    assert len(found.unique()) == len(SEQUENCES)


def test_any_architecture_with_a_classifier(tmp_path: Path) -> None:
    original = bert()
    original.save_pretrained(tmp_path / "reward")
    torch.testing.assert_close(
        scores(load_reward_model(tmp_path / "reward")), alone(original, SEQUENCES), rtol=0, atol=1e-6
    )


def test_the_layout_of_starling(tmp_path: Path) -> None:
    original = llama()
    save_as_starling(original, tmp_path / "starling")
    torch.testing.assert_close(
        scores(load_reward_model(tmp_path / "starling")), alone(original, SEQUENCES), rtol=0, atol=1e-6
    )


def test_it_computes_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "reward")
    model = load_reward_model(tmp_path / "reward", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.get_default_dtype() == torch.float32
    found = scores(model)
    assert found.dtype == torch.float32
    exact = scores(load_reward_model(tmp_path / "reward"))
    assert 0 < (found - exact).abs().max() < 0.05


def test_padding_is_a_token_that_is_not_there() -> None:
    input_ids, lengths, pad = padded([[0, 1, 2], [4]], 9)
    assert pad == 3
    assert input_ids.tolist() == [[0, 1, 2], [4, 3, 3]]
    assert lengths.tolist() == [3, 1]


# --- what is read to it ---

ROW = Row("p", "Add two numbers.", "def add(a, b):\n    return a + b\n", True, input="add(1, 2) == 3")
CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
    "{% endfor %}{{ eos_token }}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(iter([ROW.output, "def f(x): return x"]), 300)


def test_without_a_chat_template_it_reads_what_is_trained_on(tokenizer: Any) -> None:
    ids = RewardEncoder(tokenizer, get_template("alpaca"), 2048)(ROW)
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[1:-1]) == get_template("alpaca")(ROW) + ROW.output


def test_a_chat_template_is_used(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    try:
        ids = RewardEncoder(tokenizer, get_template("alpaca"), 2048)(ROW)
    finally:
        tokenizer.chat_template = None
    said = f"<s>[user]{ROW.instruction}\n\n{ROW.input}[assistant]{ROW.output}</s>"
    assert tokenizer.decode(ids) == said
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("room", [1, 5, 20])
def test_a_long_sequence_loses_its_left_but_for_bos(tokenizer: Any, room: int) -> None:
    whole = RewardEncoder(tokenizer, get_template("alpaca"), 2048)(ROW)
    assert len(whole) > 20
    cut = RewardEncoder(tokenizer, get_template("alpaca"), room)(ROW)
    assert cut == whole[:1] + whole[len(whole) - room + 1 :]
    assert len(cut) == room


# --- what is no reward model ---


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_model_without_score_layer(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match=r"lacks 1 tensors .* score\.weight\. It has no score layer: this is no reward"):
        load_reward_model(tmp_path / "policy")


def test_several_labels(tmp_path: Path) -> None:
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3))
    model.save_pretrained(tmp_path / "reward")
    with pytest.raises(UserError, match="has 3 labels; a reward model has one"):
        load_reward_model(tmp_path / "reward")


@pytest.mark.parametrize("kind", ["no such architecture", "clip_vision_model"])
def test_an_architecture_without_classifier(tmp_path: Path, kind: str) -> None:
    llama().save_pretrained(tmp_path / "reward")
    change_config(tmp_path / "reward", model_type=kind)
    with pytest.raises(UserError, match=r"config\.json"):
        read_reward_config(tmp_path / "reward")


def test_another_shape(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "reward")
    change_config(tmp_path / "reward", intermediate_size=64)
    with pytest.raises(
        UserError, match=r"gate_proj\.weight has shape \[48, 32\], but config\.json asks for \[64, 32\]"
    ):
        load_reward_model(tmp_path / "reward")


def test_no_weights(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "reward")
    (tmp_path / "reward/model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_reward_model(tmp_path / "reward")


def test_the_saved_model_is_what_auto_classes_load(tmp_path: Path) -> None:
    """The oracle is the model that users know under its name."""
    llama().save_pretrained(tmp_path / "reward")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    torch.testing.assert_close(
        scores(load_reward_model(tmp_path / "reward")), alone(theirs, SEQUENCES), rtol=0, atol=1e-6
    )
