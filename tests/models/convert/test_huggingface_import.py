"""Hugging Face folders become policies: with copies, head 1 is the source model to the bit."""

import json
import shutil
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import LLAMA, VOCABULARY, edit, pickled, rewrite
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from wmtp_ds.errors import UserError
from wmtp_ds.models.convert.importing import import_model
from wmtp_ds.models.fingerprint import compute_trunk_fingerprint, numbers_of, read_trunk_fingerprint, stored_tensors
from wmtp_ds.models.loading import load_policy, load_tokenizer

TOKENS = torch.randint(0, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(5))


def source_logits(folder, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What transformers computes of the source."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(TOKENS).logits


def policy_logits(folder, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """What each head of the imported policy computes: the first as the next-token model, the others as heads."""
    model = load_policy(folder, dtype=dtype).eval()
    with torch.no_grad():
        heads = model.lm_head(model.head_states(model.trunk(TOKENS)))
        return [model(TOKENS).logits, *heads[1:]]


def check(source, policy, *, heads: int = 4, dtype: torch.dtype = torch.float32) -> None:
    """Head 1 equals the source's logits bit for bit; copies equal head 1 as far as another order of sums allows."""
    expected = source_logits(source, dtype)
    assert expected.float().std() > 0.1, "logits too small to show anything"
    found = policy_logits(policy, dtype)
    assert len(found) == heads
    assert torch.equal(found[0], expected)
    assert torch.equal(source_logits(policy, dtype), expected), "transformers loads the policy as another model"
    for logits in found[1:]:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


ROPE = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "all keys": {"num_key_value_heads": 4},
    "one key": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "one block": {"num_hidden_layers": 1},
    "biases of attention": {"attention_bias": True},
    "biases of the feed-forward layers": {"mlp_bias": True},
    "wide heads": {"head_dim": 32},
    "another activation": {"hidden_act": "gelu"},
    "another eps": {"rms_norm_eps": 0.01},
    **{f"rotary {name}": {"rope_parameters": rope} for name, rope in ROPE.items()},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_head_1_is_the_source(make_llama, tmp_path, variant):
    source = make_llama(**VARIANTS[variant])
    done = import_model(source, tmp_path / "policy")
    check(source, tmp_path / "policy")
    stored = stored_tensors(tmp_path / "policy")
    assert done.tensors == len(stored)
    blocks = VARIANTS[variant].get("num_hidden_layers", 3)
    for name, tensor in load_file(tmp_path / "policy" / "model.safetensors").items():
        if name.startswith("mtp_heads."):
            original = f"model.layers.{blocks - 1}." + name.split(".", 2)[2]
            assert torch.equal(tensor, load_file(source / "model.safetensors")[original])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_the_dtype_is_kept(make_llama, tmp_path, dtype, tied):
    source = make_llama(dtype=dtype, tie_word_embeddings=tied)
    import_model(source, tmp_path / "policy")
    assert {tensor.dtype for tensor in load_file(tmp_path / "policy/model.safetensors").values()} == {dtype}
    assert json.loads((tmp_path / "policy/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    check(source, tmp_path / "policy")
    if dtype == torch.bfloat16:
        assert torch.equal(policy_logits(tmp_path / "policy", dtype)[0], source_logits(source, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_dtype(make_llama, tmp_path, dtype):
    source = make_llama(dtype=torch.bfloat16)
    import_model(source, tmp_path / "policy", dtype=dtype)
    original = load_file(source / "model.safetensors")
    for name, tensor in load_file(tmp_path / "policy/model.safetensors").items():
        assert tensor.dtype == dtype
        if name in original:
            assert torch.equal(tensor, original[name].to(dtype))
    config = json.loads((tmp_path / "policy/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("shard", ["20KB", "60KB", "10GB"])
@pytest.mark.parametrize("tied", [False, True])
def test_shards(make_llama, tmp_path, shard, tied):
    source = make_llama(shard=shard, tie_word_embeddings=tied)
    files = len(list(source.glob("*.safetensors")))
    assert (files > 1) == (shard != "10GB")
    import_model(source, tmp_path / "policy", shard_bytes=30_000)
    check(source, tmp_path / "policy")
    sizes = [file.stat().st_size for file in (tmp_path / "policy").glob("*.safetensors")]
    assert len(sizes) > 10
    largest = max(tensor.stop - tensor.start for tensor in stored_tensors(tmp_path / "policy").values())
    assert max(sizes) <= max(30_000, largest) + 2000


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_pickled_weights(make_llama, tmp_path, parts, tied):
    source = make_llama(tie_word_embeddings=tied)
    shutil.copytree(source, tmp_path / "pickled")
    pickled(tmp_path / "pickled", parts)
    import_model(tmp_path / "pickled", tmp_path / "policy")
    check(source, tmp_path / "policy")


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_llama(make_llama, tmp_path_factory, data):
    root = tmp_path_factory.mktemp("any")
    keys = data.draw(st.sampled_from([1, 2, 3]))
    queries = keys * data.draw(st.sampled_from([1, 2, 4]))
    head_dim = data.draw(st.sampled_from([4, 8]))
    rope = data.draw(st.sampled_from(sorted(ROPE)))
    heads = data.draw(st.integers(1, 5))
    source = make_llama(
        str(root / "source"),
        seed=data.draw(st.integers(0, 99)),
        shard=data.draw(st.sampled_from(["5KB", "10GB"])),
        hidden_size=queries * data.draw(st.sampled_from([4, 6])),
        head_dim=head_dim,
        num_attention_heads=queries,
        num_key_value_heads=keys,
        intermediate_size=data.draw(st.integers(3, 40)),
        num_hidden_layers=data.draw(st.integers(1, 4)),
        tie_word_embeddings=data.draw(st.booleans()),
        attention_bias=data.draw(st.booleans()),
        mlp_bias=data.draw(st.booleans()),
        rope_parameters=ROPE[rope],
    )
    if data.draw(st.booleans()) and (source / "model.safetensors").exists():
        shutil.copytree(source, root / "pickled")
        pickled(root / "pickled", data.draw(st.integers(1, 3)))
        import_model(root / "pickled", root / "policy", n_future=heads)
    else:
        import_model(source, root / "policy", n_future=heads, shard_bytes=data.draw(st.sampled_from([4000, 10**9])))
    expected = source_logits(source)
    found = policy_logits(root / "policy")
    assert len(found) == heads
    assert torch.equal(found[0], expected)
    for logits in found[1:]:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert read_trunk_fingerprint(root / "policy") == compute_trunk_fingerprint(root / "policy")


# --- heads ---


@pytest.mark.parametrize("n_future", [1, 2, 6, None])
def test_the_number_of_heads(make_llama, tmp_path, n_future):
    source = make_llama()
    import_model(source, tmp_path / "policy", n_future=n_future)
    check(source, tmp_path / "policy", heads=n_future or 4)
    assert numbers_of(stored_tensors(tmp_path / "policy"), "mtp_heads") == set(range((n_future or 4) - 1))
    assert json.loads((tmp_path / "policy/config.json").read_text())["n_future_tokens"] == (n_future or 4)


def test_random_heads_start_as_transformers_starts_them(make_llama, tmp_path):
    source = make_llama(initializer_range=0.05, attention_bias=True, mlp_bias=True)
    import_model(source, tmp_path / "policy", heads="random")
    check_next_token(source, tmp_path / "policy")
    state = load_file(tmp_path / "policy" / "model.safetensors")
    torch.manual_seed(0)
    fresh = LlamaForCausalLM(LlamaConfig(**LLAMA, initializer_range=0.05, attention_bias=True, mlp_bias=True))
    fresh = fresh.state_dict()
    seen = set()
    for head in range(3):
        for name in (name for name in state if name.startswith(f"mtp_heads.{head}.")):
            tensor, like = state[name], fresh["model.layers.0." + name.split(".", 2)[2]]
            assert (tensor.shape, tensor.dtype) == (like.shape, torch.float32)
            if like.unique().numel() == 1:
                assert torch.equal(tensor, like), f"{name} starts at a constant"
            else:
                assert abs(tensor.std() / 0.05 - 1) < 0.08
                assert abs(tensor.mean()) < 0.004
                seen.add(float(tensor[0, 0]))
    assert len(seen) == 3 * 7, "tensors are copies of each other"


def check_next_token(source, policy) -> None:
    assert torch.equal(policy_logits(policy)[0], source_logits(source))


def test_random_heads_depend_on_the_seed_alone(make_llama, tmp_path):
    source = make_llama()
    for name, seed, shard in (("a", 0, 10**9), ("b", 0, 20_000), ("c", 1, 10**9)):
        import_model(source, tmp_path / name, heads="random", seed=seed, shard_bytes=shard)
    one, same, other = (load_all(tmp_path / name) for name in "abc")
    name = "mtp_heads.1.mlp.down_proj.weight"
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert (one[name] != other[name]).all()


def load_all(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_random_heads_take_the_dtype_of_the_model(make_llama, tmp_path):
    source = make_llama(dtype=torch.bfloat16)
    import_model(source, tmp_path / "policy", heads="random")
    assert {tensor.dtype for tensor in load_all(tmp_path / "policy").values()} == {torch.bfloat16}


def test_a_policy_keeps_its_heads(make_llama, tmp_path):
    """Imported again (to another dtype, other shards), a policy is the same, whatever --heads says."""
    import_model(make_llama(), tmp_path / "one", heads="random", n_future=3)
    import_model(tmp_path / "one", tmp_path / "two", heads="copy", shard_bytes=20_000)
    one, two = load_all(tmp_path / "one"), load_all(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert read_trunk_fingerprint(tmp_path / "one") == read_trunk_fingerprint(tmp_path / "two")
    with pytest.raises(UserError, match=r"one has 3 heads already, not 4: leave --n-future out"):
        import_model(tmp_path / "one", tmp_path / "three", n_future=4)
    import_model(tmp_path / "one", tmp_path / "three", n_future=3)


def test_a_policy_of_one_head_gets_more(make_llama, tmp_path):
    source = make_llama()
    import_model(source, tmp_path / "one", n_future=1)
    import_model(tmp_path / "one", tmp_path / "two", n_future=2)
    check(source, tmp_path / "two", heads=2)


# --- what config.json says ---


def test_configs_of_older_versions(make_llama, tmp_path):
    """rope_theta and rope_scaling beside each other, torch_dtype, sizes left out."""
    source = make_llama(rope_parameters=ROPE["llama3"])
    old = {name: value for name, value in ROPE["llama3"].items() if name != "rope_theta"}
    edit(source / "config.json", rope_parameters=None, rope_theta=500000.0, rope_scaling=old, dtype=None)
    edit(source / "config.json", torch_dtype="float32", head_dim=None, attention_bias=None, mlp_bias=None)
    import_model(source, tmp_path / "policy")
    check(source, tmp_path / "policy")
    config = json.loads((tmp_path / "policy/config.json").read_text())
    assert config["rope_parameters"] == ROPE["llama3"]
    assert (config["rope_theta"], config["rope_scaling"]) == (500000.0, old)
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_the_oldest_key_of_rope_scaling(make_llama, tmp_path):
    source = make_llama(rope_parameters=ROPE["linear"])
    edit(source / "config.json", rope_parameters=None, rope_scaling={"type": "linear", "factor": 4.0})
    import_model(source, tmp_path / "policy")
    check(source, tmp_path / "policy")


@pytest.mark.parametrize("rope", ROPE)
def test_older_versions_read_the_same_rotary(make_llama, tmp_path, rope):
    """With what transformers 5 reads taken out, the rest of the config still describes the model."""
    source = make_llama(rope_parameters=ROPE[rope])
    import_model(source, tmp_path / "policy")
    edit(tmp_path / "policy/config.json", rope_parameters=None)
    check(source, tmp_path / "policy")


def test_what_is_of_another_machine_goes(make_llama, tmp_path):
    source = make_llama()
    edit(source / "config.json", _name_or_path="/home/me/x", auto_map={"AutoConfig": "evil.py"}, custom="kept")
    (source / "evil.py").write_text("raise SystemExit")
    import_model(source, tmp_path / "policy")
    config = json.loads((tmp_path / "policy/config.json").read_text())
    assert config["custom"] == "kept"
    assert not {"_name_or_path", "auto_map", "transformers_version"} & config.keys()
    names = {path.name for path in (tmp_path / "policy").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "trunk_fingerprint.json",
    }


def test_an_old_name_of_the_class(make_llama, tmp_path):
    source = make_llama()
    edit(source / "config.json", architectures=["LLaMAForCausalLM"])
    import_model(source, tmp_path / "policy")
    assert json.loads((tmp_path / "policy/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_the_generation_config_goes_along(make_llama, tmp_path):
    source = make_llama()
    edit(source / "generation_config.json", temperature=0.6, do_sample=True)
    import_model(source, tmp_path / "policy")
    one, other = (folder / "generation_config.json" for folder in (source, tmp_path / "policy"))
    assert one.read_bytes() == other.read_bytes()


# --- what is stored ---


def test_a_tied_unembedding_that_is_stored_too(make_llama, tmp_path):
    source = make_llama(tie_word_embeddings=True)
    rewrite(source, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    import_model(source, tmp_path / "policy")
    check(source, tmp_path / "policy")
    assert "lm_head.weight" not in stored_tensors(tmp_path / "policy")


def test_tied_by_config_but_stored_with_other_values(make_llama, tmp_path):
    """As transformers does: then they are not tied."""
    source = make_llama(tie_word_embeddings=True)
    rewrite(source, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone().mul(0.5)}))
    import_model(source, tmp_path / "policy")
    check(source, tmp_path / "policy")
    assert json.loads((tmp_path / "policy/config.json").read_text())["tie_word_embeddings"] is False


def test_tied_and_stored_as_the_unembedding_alone(make_llama, tmp_path):
    source = make_llama(tie_word_embeddings=True)
    rewrite(source, lambda state: state.update({"lm_head.weight": state.pop("model.embed_tokens.weight")}))
    import_model(source, tmp_path / "policy")
    check(source, tmp_path / "policy")


def test_rotary_frequencies_are_left_out(make_llama, tmp_path):
    source = make_llama()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(source, lambda state: state.update({name: torch.ones(8)}))
    import_model(source, tmp_path / "policy")
    check(source, tmp_path / "policy")
    assert name not in stored_tensors(tmp_path / "policy")


def test_mixed_dtypes_stay(make_llama, tmp_path):
    source = make_llama(dtype=torch.bfloat16)
    rewrite(source, lambda state: state.update({"model.norm.weight": state["model.norm.weight"].float()}))
    import_model(source, tmp_path / "policy", shard_bytes=10**9)
    state = load_file(tmp_path / "policy/model.safetensors")
    assert state["model.norm.weight"].dtype == torch.float32
    assert state["lm_head.weight"].dtype == torch.bfloat16
    check(source, tmp_path / "policy")


def test_weights_of_another_tool_beside_the_models_are_not_read(make_llama, tmp_path):
    source = make_llama()
    save_file({"model.norm.weight": torch.zeros(64)}, source / "consolidated.safetensors")
    torch.save({"model.norm.weight": torch.zeros(64)}, source / "pytorch_model.bin")
    save_file({"output.weight": torch.zeros(1, 64)}, source / "value_head.safetensors")
    import_model(source, tmp_path / "policy")
    check(source, tmp_path / "policy")
    assert not (tmp_path / "policy/value_head.safetensors").exists()


def test_the_policy_is_ready_to_train(make_llama, tmp_path):
    """What training reads is there: the tokenizer with its end token, the fingerprint."""
    source = make_llama()
    done = import_model(source, tmp_path / "policy")
    assert load_tokenizer(tmp_path / "policy").eos_token_id == 2
    assert read_trunk_fingerprint(tmp_path / "policy") == done.trunk_fingerprint
    assert done.trunk_fingerprint == compute_trunk_fingerprint(tmp_path / "policy")
    assert done.warnings == []
    assert done.parameters == sum(p.numel() for p in load_policy(tmp_path / "policy").parameters())


# --- what is wrong ---


def drop(name: str):
    return lambda folder: rewrite(folder, lambda state: state.pop(name))


def put(name: str, tensor: torch.Tensor):
    return lambda folder: rewrite(folder, lambda state: state.update({name: tensor}))


def config(**changes: Any):
    return lambda folder: edit(folder / "config.json", **changes)


def write(file: str, content: str | bytes):
    def spoil(folder) -> None:
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def remove(*files: str):
    return lambda folder: [(folder / file).unlink() for file in files]


TIED = ("model.embed_tokens.weight", "lm_head.weight")
LAST = "model.layers.2.mlp.up_proj.weight"
FAULTS: dict[str, tuple[Any, str]] = {
    "mistral": (
        config(model_type="mistral"),
        r"model_type is 'mistral', which is not supported\. .*'llama'",
    ),
    "qwen2": (config(model_type="qwen2"), "model_type is 'qwen2', .*SmolLM2"),
    "no model_type": (config(model_type=None), "model_type is None"),
    "a classifier": (config(architectures=["LlamaForSequenceClassification"]), "which predicts no tokens"),
    "a bare model": (config(architectures=["LlamaModel"]), "LlamaModel, which predicts no tokens"),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), r"the weights are quantised \(gptq\)"),
    "no config": (remove("config.json"), "has weights but no config.json"),
    "config cut": (write("config.json", '{"model_ty'), r"config\.json is damaged"),
    "config binary": (write("config.json", b"\xff\xfe\0"), r"config\.json is damaged"),
    "config a list": (write("config.json", "[]"), r"config\.json is damaged: it holds no JSON object"),
    "a size that is a word": (config(hidden_size="wide"), "config describes no Llama"),
    "sizes that do not go together": (config(num_attention_heads=7), "config describes no"),
    "an unknown activation": (config(hidden_act="nonsense"), "config describes no model that can be built"),
    "an unknown rotary": (config(rope_parameters={"rope_type": "spiral"}), "config describes no"),
    "heads that are no number": (config(n_future_tokens="4"), r"says n_future_tokens = '4'"),
    "no head": (config(n_future_tokens=0), r"says n_future_tokens = 0"),
    "heads that are not there": (
        config(n_future_tokens=4),
        r"n_future_tokens = 4, which is 3 extra heads \(mtp_heads\.\*\), but the weights hold 0",
    ),
    "blocks that are not there": (config(num_hidden_layers=5), r"num_hidden_layers = 5, which is 5 blocks .* hold 3"),
    "blocks too many": (config(num_hidden_layers=2), r"num_hidden_layers = 2, which is 2 blocks .* hold 3"),
    "no weights": (remove("model.safetensors"), "has a config.json but no weights"),
    "weights cut": (
        lambda folder: write("model.safetensors", (folder / "model.safetensors").read_bytes()[:-9])(folder),
        r"model\.safetensors is damaged: it ends within tensor",
    ),
    "weights empty": (write("model.safetensors", b""), r"model\.safetensors is damaged: it is cut short"),
    "a header that is nonsense": (write("model.safetensors", b"\x04" + b"\0" * 7 + b"{[}]"), "is damaged"),
    "a missing tensor": (drop(LAST), rf"lacks 1 of the tensors that its config asks for, first {LAST}"),
    "no embeddings": (drop("model.embed_tokens.weight"), r"lacks 1 .*first model\.embed_tokens\.weight"),
    "no unembedding": (drop("lm_head.weight"), r'lacks lm_head\.weight\. If .*"tie_word_embeddings": true'),
    "a tensor too many": (
        put("model.layers.0.q_norm.weight", torch.ones(16)),
        "does not have, first .*q_norm",
    ),
    "another shape": (put(LAST, torch.ones(96, 63)), rf"{LAST} has shape \[96, 63\], but .* asks for \[96, 64\]"),
    "integers": (put(LAST, torch.ones(96, 64, dtype=torch.int8)), f"{LAST} is stored as I8: quantised"),
    "NaN": (put(LAST, torch.full((96, 64), torch.nan)), rf"model\.safetensors: {LAST} holds NaN: the weights are dam"),
    "infinity": (put("model.norm.weight", torch.full((64,), -torch.inf)), "holds infinity"),
    "tied embeddings that are single numbers": (
        lambda folder: (
            config(tie_word_embeddings=True)(folder),
            rewrite(folder, lambda state: state.update({name: torch.tensor(1.0) for name in TIED})),
        ),
        r"embed_tokens\.weight has shape \[\], but .* asks for \[384, 64\]",
    ),
    "architectures of a number": (config(architectures=3), r"architectures is 3, which predicts no tokens"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer"),
    "a tokenizer cut": (write("tokenizer.json", '{"model": {'), r"tokenizer\.json cannot be read"),
    "a tokenizer without words": (write("tokenizer.json", "{}"), r"tokenizer\.json holds no vocabulary"),
    "a tokenizer of another vocabulary": (
        config(vocab_size=200),
        r"embed_tokens\.weight has shape \[384, 64\], but .* asks for \[200, 64\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_folder(make_llama, tmp_path, fault):
    folder = make_llama()
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(UserError, match=message) as found:
        import_model(folder, tmp_path / "policy")
    assert str(folder) in str(found.value)
    assert "\n" not in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"], "something is left behind"


INDEX = "model.safetensors.index.json"
SHARD_FAULTS: dict[str, tuple[Any, str]] = {
    "a missing shard": (remove("model-00002-of-00006.safetensors"), r"model-00002-of-00006\.safetensors is missing"),
    "a cut shard": (
        write("model-00002-of-00006.safetensors", b"\1"),
        r"00006\.safetensors is damaged: it is cut",
    ),
    "an index cut": (write(INDEX, "{"), r"index\.json is damaged"),
    "an index of nothing": (write(INDEX, "{}"), r"index\.json is damaged"),
    "an index of a list": (write(INDEX, "[1]"), r"index\.json is damaged"),
    "an index that leads elsewhere": (
        write(INDEX, json.dumps({"weight_map": {"a": "../source/model-00001-of-00006.safetensors"}})),
        r"index\.json is damaged: '\.\./source.* is no file beside it",
    ),
    "an index that leaves a shard out": (
        lambda folder: edit(
            folder / INDEX,
            weight_map={
                name: file
                for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items()
                if "00003" not in file
            },
        ),
        r"the weights hold 2|lacks \d+ of the tensors",
    ),
}


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_faults_of_shards(make_llama, tmp_path, fault):
    folder = make_llama(shard="110KB")
    assert len(list(folder.glob("*.safetensors"))) == 6
    spoil, message = SHARD_FAULTS[fault]
    spoil(folder)
    with pytest.raises(UserError, match=message):
        import_model(folder, tmp_path / "policy")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("parts", [1, 3])
def test_faults_of_pickled_weights(make_llama, tmp_path, parts):
    folder = pickled(make_llama(), parts)
    file = folder / ("pytorch_model.bin" if parts == 1 else "pytorch_model-00002-of-00003.bin")
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(UserError, match=rf"{file} is damaged: it is cut short"):
        import_model(folder, tmp_path / "policy")
    file.unlink()
    with pytest.raises(UserError, match=f"{file} is missing" if parts == 3 else "has a config.json but no weights"):
        import_model(folder, tmp_path / "policy")


def test_a_classifier_by_its_weights(tmp_path, make_llama, tokenizer_folder):
    """Whose config does not say what it is."""
    model = LlamaForSequenceClassification(LlamaConfig(**LLAMA))
    model.save_pretrained(tmp_path / "source")
    shutil.copytree(tokenizer_folder, tmp_path / "source", dirs_exist_ok=True)
    edit(tmp_path / "source/config.json", architectures=None)
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        import_model(tmp_path / "source", tmp_path / "policy")
