"""Models that are no Llamas: their own forward and caches, our choice of tokens."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import command
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MambaConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from wmtp_ds.decoding import Limits, Sampling, generate_by_transformers
from wmtp_ds.errors import UserError
from wmtp_ds.evaluate.teacher import predict
from wmtp_ds.models.causal import learned_positions, load_causal

VOCABULARY, END = 40, 1
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=128),
    "qwen2": Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY,
    ),
    "mamba": MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=VOCABULARY, conv_kernel=4),
    "recurrent_gemma": RecurrentGemmaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=VOCABULARY,
        lru_width=32, attention_window_size=64,
    ),
    "rwkv": RwkvConfig(
        hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, bos_token_id=0,
        eos_token_id=END,
    ),
}  # fmt: skip


def model_of(kind: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> tuple[list[int], bool]:
    """Token by token, without a cache, a batch or padding."""
    tokens: list[int] = []
    while len(tokens) < count:
        token = int(model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1].argmax())
        if token == END:
            return tokens, True
        tokens.append(token)
    return tokens, False


PROMPTS = [[2, 3, 4], [5], [6, 7, 8, 9, 10, 11], [12, 13]]


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_greedy_completions_are_the_models_own_whatever_the_batch(kind: str) -> None:
    model = model_of(kind)
    with torch.no_grad():
        expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
    told: dict[int, int] = {}
    for batch_size in (1, 3, 8):
        limits = Limits(12, frozenset([END]))
        found = generate_by_transformers(
            model, PROMPTS, limits, batch_size=batch_size, on_done=lambda place, one: told.update({place: one.passes})
        )
        assert [(one.tokens, one.ended) for one in found] == expected
        assert told == {place: len(one.tokens) + one.ended - 1 for place, one in enumerate(found)}
    enough = generate_by_transformers(model, PROMPTS, Limits(12, frozenset([END]), lambda tokens: len(tokens) >= 3))
    assert [one.tokens for one in enough] == [tokens[:3] for tokens, _ in expected]


@pytest.mark.parametrize("kind", ["mamba", "recurrent_gemma", "rwkv"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_model_with_a_recurrent_state(kind: str, batch_size: int) -> None:
    """Not every one takes a mask for padding."""
    model, prompts = model_of(kind), [*PROMPTS, [14], [15, 16]]
    with torch.no_grad():
        expected = [greedy(model, prompt, 8) for prompt in prompts]
    found = generate_by_transformers(model, prompts, Limits(8, frozenset([END])), batch_size=batch_size)
    assert [(one.tokens, one.ended) for one in found] == expected


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(4)), st.integers(1, 4))
def test_a_sample_depends_on_its_stream_alone(seed: int, order: list[int], batch_size: int) -> None:
    model = model_of("gpt2")
    limits, sampling = Limits(6, frozenset([END])), Sampling(0.9, 0.95, seed)
    one = generate_by_transformers(model, PROMPTS, limits, sampling, streams=[3, 5, 7, 9])
    other = generate_by_transformers(
        model, [PROMPTS[i] for i in order], limits, sampling, streams=[(3, 5, 7, 9)[i] for i in order],
        batch_size=batch_size,
    )  # fmt: skip
    assert [one[i].tokens for i in order] == [own.tokens for own in other]


def test_samples_have_the_models_distribution() -> None:
    model = model_of("qwen2")
    with torch.no_grad():
        expected = (model(torch.tensor([[4, 5]])).logits[0, -1] / 0.7).softmax(-1)
    drawn = generate_by_transformers(
        model, [[4, 5]] * 3000, Limits(1, frozenset([END])), Sampling(0.7), batch_size=1000, streams=range(3000)
    )
    counts = torch.zeros(VOCABULARY, dtype=torch.float64)
    for one in drawn:
        counts[END if one.ended else one.tokens[0]] += 1
    often = expected * 3000 >= 5
    rest = torch.stack([counts[~often].sum(), expected[~often].sum() * 3000])
    observed = [*counts[often].tolist(), float(rest[0])]
    wanted = [*(expected[often] * 3000).tolist(), float(rest[1])]
    assert chisquare(observed, wanted).pvalue > 1e-3


def test_predictions_are_the_models_own() -> None:
    model = model_of("gpt2")
    pairs = [([2, 3, 4], [5, 6, END]), ([7], [8, 9, 10, 11, END])]
    found = predict(model, pairs, batch_size=2)
    losses, hits = [], []
    for prompt, solution in pairs:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + solution])).logits[0]
        for place, token in enumerate(solution, start=len(prompt)):
            losses.append(float(-logits[place - 1].log_softmax(-1)[token]))
            hits.append(int(logits[place - 1].argmax()) == token)
    assert found["loss_head_1"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["token_accuracy_head_1"] == sum(hits) / len(hits)
    assert found["tokens"] == 8
    assert "loss_head_2" not in found


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A folder as Hugging Face has them, whose tokenizer knows no beginning of a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["<end>", *letters])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    folder = tmp_path / "qwen"
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").save_pretrained(folder)
    config = Qwen2Config.from_dict(CONFIGS["qwen2"].to_dict() | {"vocab_size": 257, "eos_token_id": 0})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_evaluate_from_a_folder(qwen: Path, problems_file: Path, tmp_path: Path) -> None:
    options = ("--problems", problems_file, "--max-new-tokens", 6, "--output", tmp_path / "out", "--json")
    done = command("evaluate", qwen, *options, seconds=120)
    assert done.code == 0, done.err
    found = json.loads(done.out)["figures"]
    assert (found["problems"], found["pass@1"], found["tokens_per_pass"]) == (3, 0.0, 1.0)
    assert found["prediction"]["loss_head_1"] == pytest.approx(5.5, abs=1.0)  # about log 257: it has learned nothing
    refused = command("evaluate", qwen, *options, "--decode", "self-speculative", "--force")
    assert refused.code == 2
    assert "has none" in refused.err


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"suppress_tokens": list(range(1, 200))},
        {"forced_eos_token_id": 0, "min_new_tokens": 9},
        {"renormalize_logits": True, "bad_words_ids": [[n] for n in range(1, 200)]},
    ],
)
def test_what_a_folder_says_of_generation_changes_nothing(qwen: Path, asked: dict[str, Any]) -> None:
    """Their own choices would be measured instead of the model."""
    limits, prompts = Limits(10, frozenset([0])), [[5, 6, 7], [8]]
    with torch.no_grad():
        plain = load_causal(qwen, dtype=torch.float32).eval()
        expected = []
        for prompt in prompts:
            tokens: list[int] = []
            while len(tokens) < 10 and (not tokens or tokens[-1] != 0):
                tokens.append(int(plain(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1].argmax()))
            expected.append([token for token in tokens if token != 0])
    file = qwen / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | asked))
    model = load_causal(qwen, dtype=torch.float32).eval()
    assert [one.tokens for one in generate_by_transformers(model, prompts, limits)] == expected


@pytest.fixture
def gpt2(qwen: Path) -> Path:
    """The same tokenizer, and a model with an embedding of each of 128 positions."""
    config = GPT2Config.from_dict(CONFIGS["gpt2"].to_dict() | {"vocab_size": 257, "eos_token_id": 0, "bos_token_id": 0})
    AutoModelForCausalLM.from_config(config).save_pretrained(qwen)
    return qwen


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (CONFIGS["gpt2"], 128),
        (OPTConfig(hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCABULARY,
                   max_position_embeddings=64, word_embed_proj_dim=32), 64),
        (CONFIGS["qwen2"], None),
        (CONFIGS["mamba"], None),
    ],
)  # fmt: skip
def test_how_many_positions_a_model_has_learned(config: Any, positions: int | None) -> None:
    model = AutoModelForCausalLM.from_config(config)
    assert learned_positions(model) == positions
    if positions is not None:
        assert model(torch.full((1, positions), 3)).logits.shape[1] == positions
        with pytest.raises(IndexError):
            model(torch.full((1, positions + 1), 3))


def test_more_tokens_than_positions(gpt2: Path, tmp_path: Path) -> None:
    """Prompts behind a template have more than 128 tokens; of plain ones, the last reference has."""
    rows = [
        {"problem_id": name, "instruction": "Go.", "output": output, "is_correct": True, "metadata": {"tests": [test]}}
        for name, output, test in (("a", "x = 1", "assert f(1) == 2"), ("b", "y" * 150, "assert f(1) == 2"))
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--problems", file, "--output", tmp_path / "out", "--json")
    refused = command("evaluate", gpt2, *options, "--prompt", "plain")
    assert refused.code == 2
    found = re.search(r"the model has 128 positions.*: take --max-new-tokens (\d+)", refused.err)
    assert found is not None
    assert command("evaluate", gpt2, *options, "--prompt", "plain", "--max-new-tokens", int(found[1]) + 1).code == 2
    refused = command("evaluate", gpt2, *options, "--max-new-tokens", 3)
    assert refused.code == 2
    assert "take another model, or leave that problem out" in refused.err
    done = command("evaluate", gpt2, *options, "--prompt", "plain", "--max-new-tokens", found[1])
    assert done.code == 0, done.err
    prediction = json.loads(done.out)["figures"]["prediction"]
    assert (prediction["references_left_out"], prediction["tokens"]) == (1, 6)  # five letters and the end


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _deeper(folder: Path) -> None:
    _set(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3)


def _wider(folder: Path) -> None:
    _set(folder, vocab_size=300)


def _unknown(folder: Path) -> None:
    _set(folder, model_type="nothing-known")


def _code(folder: Path) -> None:
    _set(folder, attn_implementation="someone/kernel")


def _set(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_without_weights, "no safetensors weights"),
        (_deeper, r"its weights lack model\.layers\.2\..* and \d+ more"),
        (_wider, "qwen"),
        (_unknown, "'nothing-known'"),
        (_code, "attn_implementation"),
    ],
)
def test_folders_that_do_not_fit(qwen: Path, spoil: Any, said: str) -> None:
    spoil(qwen)
    with pytest.raises(UserError, match=said):
        load_causal(qwen, dtype=torch.float32)
