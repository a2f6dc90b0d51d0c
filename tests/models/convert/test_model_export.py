"""Exports: what other tools load, with nothing of this package."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import VOCABULARY, edit
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from wmtp_ds.errors import UserError
from wmtp_ds.models.config_file import write_config
from wmtp_ds.models.convert.exporting import export_model
from wmtp_ds.models.convert.importing import import_model
from wmtp_ds.models.fingerprint import read_trunk_fingerprint
from wmtp_ds.models.loading import load_policy, load_tokenizer, save_weights

TOKENS = torch.randint(0, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(5))

# Loads each export, says what it predicts, and that nothing of this package took part.
PLAIN = """
import json, sys
sys.modules["wmtp_ds"] = None  # importing it is an error from here on
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = load_file("tokens")["tokens"]
    with torch.no_grad():
        logits = model(tokens).logits
    generated = model.generate(tokens[:1], max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(model.generate(**tokenizer("def f", return_tensors="pt"), max_new_tokens=4)[0])
    save_file({"logits": logits, "generated": generated}, folder + ".result")
    print(json.dumps([type(model).__name__, str(model.dtype), text]))
"""
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = {
    "plain": {"dtype": torch.float32},
    "scaled": {"dtype": torch.bfloat16, "tie_word_embeddings": True, "rope_parameters": SCALED},
}


@pytest.fixture
def make_policy(make_llama, tmp_path):
    """A policy whose heads are all different."""

    def make(name: str = "policy", **changes):
        source = make_llama(f"source of {name}", **changes)
        import_model(source, tmp_path / name, heads="random", n_future=3, shard_bytes=60_000)
        return tmp_path / name

    return make


def load_all(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


def test_transformers_alone_loads_and_generates(make_policy, tmp_path):
    for kind, changes in KINDS.items():
        export_model(make_policy(f"policy {kind}", **changes), tmp_path / kind)
    save_file({"tokens": TOKENS}, tmp_path / "tokens")
    done = subprocess.run([sys.executable, "-c", PLAIN, *KINDS], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for (kind, changes), line in zip(KINDS.items(), done.stdout.splitlines(), strict=True):
        name, dtype, text = json.loads(line)
        assert (name, dtype) == ("LlamaForCausalLM", str(changes["dtype"]))
        assert text.startswith("def f")
        result = load_file(tmp_path / f"{kind}.result")
        model = load_policy(tmp_path / f"policy {kind}", dtype=changes["dtype"]).eval()
        with torch.no_grad():
            assert torch.equal(result["logits"], model(TOKENS).logits)
            options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
            assert torch.equal(result["generated"], model.generate(TOKENS[:1], **options))


def test_a_plain_llama(make_policy, tmp_path):
    """Nothing in the export is ours: names, config, class."""
    policy = make_policy()
    done = export_model(policy, tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert not {"n_future_tokens", "meta_release"} & config.keys()
    state = load_all(tmp_path / "export")
    assert state.keys() == LlamaForCausalLM(AutoModelForCausalLM.from_pretrained(policy).config).state_dict().keys()
    original = load_all(policy)
    assert_same(state, {name: tensor for name, tensor in original.items() if not name.startswith("mtp_heads.")})
    assert done.parameters == sum(tensor.numel() for tensor in state.values())
    assert load_tokenizer(tmp_path / "export").eos_token_id == 2
    generation = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)


def test_a_release_of_metas_leaves_no_trace(make_release, tmp_path):
    folder, _ = make_release()
    import_model(folder, tmp_path / "policy")
    assert "meta_release" in json.loads((tmp_path / "policy/config.json").read_text())
    export_model(tmp_path / "policy", tmp_path / "export")
    assert "meta_release" not in json.loads((tmp_path / "export/config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "export")


def test_all_heads(make_policy, tmp_path):
    policy = make_policy()
    export_model(policy, tmp_path / "export", format="mtp")
    assert_same(load_all(tmp_path / "export"), load_all(policy))
    assert json.loads((tmp_path / "export/config.json").read_text())["n_future_tokens"] == 3
    assert read_trunk_fingerprint(tmp_path / "export") == read_trunk_fingerprint(policy)
    assert load_policy(tmp_path / "export").n_future_tokens == 3


def test_a_policy_of_one_head_is_a_policy(make_llama, tmp_path):
    import_model(make_llama(), tmp_path / "policy", n_future=1)
    export_model(tmp_path / "policy", tmp_path / "export", format="mtp")
    assert json.loads((tmp_path / "export/config.json").read_text())["n_future_tokens"] == 1


def test_a_plain_model_has_no_heads_to_export(make_llama, tmp_path):
    with pytest.raises(
        UserError, match=r"has one head and no n_future_tokens\. To give it heads: wmtp-ds model import"
    ):
        export_model(make_llama(), tmp_path / "export", format="mtp")
    assert not (tmp_path / "export").exists()


def test_what_a_run_leaves(make_policy, tokenizer_folder, tmp_path):
    """checkpoint_best of a verifiable run: a policy, its value head, metrics and config."""
    best = tmp_path / "run" / "checkpoint_best"
    best.mkdir(parents=True)
    model = load_policy(make_policy())
    save_weights(model, best)
    write_config(best, model.config, torch.float32)
    shutil.copytree(tokenizer_folder, best, dirs_exist_ok=True)
    save_file({"output.weight": torch.zeros(1, 64)}, best / "value_head.safetensors")
    (best / "metrics.json").write_text("{}")
    (best / "config.toml").write_text("")
    for format in ("hf", "mtp", "meta"):
        export_model(best, tmp_path / format, format=format)
        names = {path.name for path in (tmp_path / format).iterdir()}
        assert not {"metrics.json", "config.toml", "value_head.safetensors"} & names
    assert_same(load_all(tmp_path / "mtp"), load_all(best))
    with pytest.raises(UserError, match=r"the models in it are checkpoint_best\. Name one: .*run/checkpoint_best"):
        export_model(tmp_path / "run", tmp_path / "no")


def test_exports_in_other_shards(make_policy, tmp_path):
    policy = make_policy()
    done = export_model(policy, tmp_path / "export", shard_bytes=50_000)
    assert len(done.files) == len(list((tmp_path / "export").glob("*.safetensors"))) > 3
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.nbytes
    assert index["weight_map"].keys() == load_all(tmp_path / "export").keys()
    with torch.no_grad():
        expected = load_policy(policy).eval()(TOKENS).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()(TOKENS).logits, expected)


def test_the_source_is_left_as_it_was(make_policy, tmp_path):
    policy = make_policy()
    before = {path.name: path.read_bytes() for path in policy.iterdir()}
    for format in ("hf", "mtp", "meta"):
        export_model(policy, tmp_path / format, format=format)
    assert {path.name: path.read_bytes() for path in policy.iterdir()} == before


def test_a_damaged_policy_is_not_exported(make_policy, tmp_path):
    policy = make_policy()
    edit(policy / "config.json", n_future_tokens=5)
    for format in ("hf", "mtp", "meta"):
        with pytest.raises(UserError, match=r"n_future_tokens = 5, which is 4 extra heads .* but the weights hold 2"):
            export_model(policy, tmp_path / "export", format=format)
