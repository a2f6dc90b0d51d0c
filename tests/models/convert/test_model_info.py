"""`model info`: every number against the model itself, and no weights read for it."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from small_models import LLAMA, RELEASE, VOCABULARY, edit, pickled, rewrite

from wmtp_ds.errors import UserError
from wmtp_ds.models.convert.exporting import export_model
from wmtp_ds.models.convert.importing import import_model
from wmtp_ds.models.info import model_info
from wmtp_ds.models.loading import load_policy
from wmtp_ds.models.tokenizer_file import read_vocabulary, tokenizer_fingerprint


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check(info, policy) -> None:
    """Parameter counts against the modules of the loaded model."""
    model = load_policy(policy, n_future_tokens=None)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert info.tied == tied
    assert info.parameters == {
        "embeddings": count(model.model.embed_tokens),
        "trunk": sum(count(block) for block in model.model.layers[:-1]),
        "heads": [count(model.model.layers[-1]), *(count(head) for head in model.mtp_heads)],
        "norm": count(model.model.norm),
        "unembedding": 0 if tied else count(model.lm_head),
        "total": count(model),
    }
    assert info.n_future_tokens == model.n_future_tokens
    assert info.trunk_blocks == len(model.model.layers) - 1
    assert (info.hidden_size, info.vocabulary) == (model.config.hidden_size, model.config.vocab_size)
    assert info.intermediate_size == model.config.intermediate_size
    assert (info.attention_heads, info.key_value_heads) == (4, model.config.num_key_value_heads)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("shard_bytes", [50_000, 10**9])
def test_a_policy(make_llama, tmp_path, tied, n, shard_bytes):
    source = make_llama(tie_word_embeddings=tied, attention_bias=True, dtype=torch.bfloat16)
    done = import_model(source, tmp_path / "policy", n_future=n, shard_bytes=shard_bytes)
    info = model_info(tmp_path / "policy")
    check(info, tmp_path / "policy")
    assert (info.layout, info.architecture) == ("mtp", "LlamaForCausalLM")
    assert info.trunk_fingerprint == done.trunk_fingerprint
    assert info.parameters["total"] == done.parameters
    assert (info.nbytes, info.files) == (done.nbytes, len(done.files))
    assert info.dtypes == {"BF16": done.parameters}
    tokens = read_vocabulary(source / "tokenizer.json")
    assert info.tokenizer == {"file": "tokenizer.json", "tokens": 259, "fingerprint": tokenizer_fingerprint(tokens)}
    assert json.loads(json.dumps(info.as_dict())) == info.as_dict()


@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_of_hugging_faces(make_llama, tmp_path, parts, tied):
    source = make_llama(tie_word_embeddings=tied)
    import_model(source, tmp_path / "policy", n_future=1)
    if parts:
        rewrite(source, lambda state: state.setdefault("lm_head.weight", state["model.embed_tokens.weight"].clone()))
        pickled(source, parts)
    info = model_info(source)
    check(info, tmp_path / "policy")
    assert (info.layout, info.files, info.trunk_fingerprint) == ("huggingface", max(parts, 1), None)
    assert info.dtypes == {"F32": info.parameters["total"]}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_release_of_metas(make_release, tmp_path, ranks):
    folder, state = make_release(ranks=ranks, dtype=torch.float16)
    import_model(folder, tmp_path / "policy")
    info, policy = model_info(folder), model_info(tmp_path / "policy")
    check(info, tmp_path / "policy")
    assert (info.layout, info.files, info.dtypes) == ("meta", ranks, {"F16": sum(t.numel() for t in state.values())})
    assert info.tokenizer["file"] == "tokenizer.model"
    assert (info.tokenizer["tokens"], info.tokenizer["fingerprint"]) == (
        policy.tokenizer["tokens"],
        policy.tokenizer["fingerprint"],
    )
    assert info.rope == policy.rope
    assert model_info(folder).parameters == policy.parameters


def test_an_export_is_the_next_token_model(make_llama, tmp_path):
    import_model(make_llama(), tmp_path / "policy", n_future=3)
    export_model(tmp_path / "policy", tmp_path / "export")
    policy, export = model_info(tmp_path / "policy"), model_info(tmp_path / "export")
    assert (export.layout, export.n_future_tokens) == ("huggingface", 1)
    assert export.parameters["heads"] == policy.parameters["heads"][:1]
    assert export.tokenizer["fingerprint"] == policy.tokenizer["fingerprint"]
    assert export.trunk_fingerprint == policy.trunk_fingerprint


def test_mixed_dtypes(make_llama, tmp_path):
    source = make_llama(dtype=torch.bfloat16)
    rewrite(source, lambda state: state.update({"model.norm.weight": state["model.norm.weight"].float()}))
    info = model_info(source)
    assert info.dtypes == {"F32": 64, "BF16": info.parameters["total"] - 64}
    assert info.lines()["dtype"] in (
        f"F32 (64), BF16 ({info.dtypes['BF16']:,})",
        f"BF16 ({info.dtypes['BF16']:,}), F32 (64)",
    )


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, {"rope_type": "default", "rope_theta": 5.0}),
        ({"rope_parameters": None, "rope_theta": 7.0}, {"rope_type": "default", "rope_theta": 7.0}),
        ({"rope_parameters": None}, {"rope_type": "default", "rope_theta": 10000.0}),
        (
            {"rope_parameters": None, "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0},
        ),
    ],
)
def test_the_rotary_of_every_version(make_llama, fields, rope):
    source = make_llama()
    edit(source / "config.json", **fields)
    assert model_info(source).rope == rope


def test_lines_say_what_there_is(make_llama, tmp_path):
    import_model(make_llama(), tmp_path / "policy", n_future=3)
    info = model_info(tmp_path / "policy")
    lines = info.lines()
    assert lines["architecture"] == "LlamaForCausalLM, 2 trunk blocks, 3 heads"
    assert lines["parameters"] == f"{info.parameters['total']:,}"
    assert [lines[f"  head {number}"] for number in (1, 2, 3)] == [f"{size:,}" for size in info.parameters["heads"]]
    assert lines["trunk"] == info.trunk_fingerprint
    assert info.tokenizer["fingerprint"] in lines["tokenizer"]
    (tmp_path / "policy" / "trunk_fingerprint.json").unlink()
    (tmp_path / "policy" / "tokenizer.json").unlink()
    lines = model_info(tmp_path / "policy").lines()
    assert (lines["tokenizer"], lines["trunk"]) == ("none", "no fingerprint stored")


def test_a_model_too_large_for_any_memory(tmp_path, tokenizer_folder):
    """Headers are all that is read: a sparse file of 13 GB takes no time."""
    folder = tmp_path / "large"
    folder.mkdir()
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(LLAMA | sizes | heads))
    shapes = {"model.embed_tokens.weight": [32000, 4096], "lm_head.weight": [32000, 4096], "model.norm.weight": [4096]}
    for number in range(8):
        block = f"model.layers.{number}"
        shapes |= {f"{block}.self_attn.{name}_proj.weight": [4096, 4096] for name in "qkvo"}
        shapes |= {f"{block}.mlp.{name}_proj.weight": [11008, 4096] for name in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": [4096, 11008], f"{block}.input_layernorm.weight": [4096]}
        shapes |= {f"{block}.post_attention_layernorm.weight": [4096]}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    began = time.monotonic()
    info = model_info(folder)
    assert time.monotonic() - began < 2
    assert info.nbytes == end > 7e9
    assert info.parameters["total"] == end // 4 == 8 * 202_383_360 + 2 * 32000 * 4096 + 4096


def test_torch_is_not_loaded_for_safetensors(make_llama, tmp_path):
    import_model(make_llama(), tmp_path / "policy")
    code = """
import sys
from pathlib import Path
from wmtp_ds.models.info import model_info
model_info(Path(sys.argv[1]))
print(sorted({"torch", "transformers", "tokenizers", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "policy")], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# --- what holds no model ---


def places(root, make_llama, tokenizer_folder):
    """Folders that hold none, and what is said of them."""
    (root / "empty").mkdir()
    (root / "critic").mkdir()
    save_file({"output.weight": torch.ones(1, 4)}, root / "critic/value_head.safetensors")
    (root / "file").write_text("")
    (root / "run" / "checkpoint_best").mkdir(parents=True)
    (root / "run" / "checkpoint_final").mkdir()
    for name in ("best", "final"):
        (root / "run" / f"checkpoint_{name}" / "config.json").write_text("{}")
    (root / "params").mkdir()
    (root / "params/params.json").write_text("{}")
    (root / "weights").mkdir()
    save_file({"a": torch.ones(1)}, root / "weights/model.safetensors")
    (root / "loop").symlink_to("loop")
    (root / "gguf").mkdir()
    (root / "ggufs").mkdir()
    for name in ("gguf/a.gguf", "ggufs/a.gguf", "ggufs/b.gguf"):
        (root / name).write_bytes(b"GGUF")
    return {
        "missing": r"missing does not exist\. Name a folder on this machine: models are not downloaded here",
        "empty": r"empty is not a model folder: it has neither config\.json .* nor params\.json",
        "critic": r"critic is not a model folder: it holds a critic's value_head\.safetensors and no policy",
        "file": r"file is a file\. Name the model's folder, or a \.gguf file",
        "run": r"the models in it are checkpoint_best, checkpoint_final\. Name one: .*run/checkpoint_best\.",
        "params": r"params has params\.json but no consolidated\.\*\.pth: the weights are missing",
        "weights": r"weights is not a model folder: it has weights but no config\.json",
        "loop": r"loop",
        "file/inner": r"file/inner does not exist\. Name a folder",
        "gguf": r"a\.gguf is a GGUF file: import it first",
        "ggufs": r"GGUF files there: a\.gguf, b\.gguf; name one with --gguf-file",
    }


@pytest.mark.parametrize(
    "name",
    ["missing", "empty", "critic", "file", "run", "params", "weights", "loop", "file/inner", "gguf", "ggufs"],
)
def test_places_that_hold_no_model(tmp_path, make_llama, tokenizer_folder, name):
    message = places(tmp_path, make_llama, tokenizer_folder)[name]
    with pytest.raises(UserError, match=message):
        model_info(tmp_path / name)
    if name != "gguf":
        with pytest.raises(UserError, match=message):
            import_model(tmp_path / name, tmp_path / "policy")


def test_models_that_are_damaged(make_llama, make_release, tmp_path):
    source = make_llama()
    edit(source / "config.json", hidden_size="wide")
    with pytest.raises(UserError, match=r"config\.json says hidden_size = 'wide', which is no whole number"):
        model_info(source)
    edit(source / "config.json", model_type="mistral")
    with pytest.raises(UserError, match=r"model_type is 'mistral'"):
        model_info(source)
    edit(source / "config.json", model_type="llama", hidden_size=64, rope_parameters=3, architectures=3)
    assert model_info(source).rope == {"rope_type": "default", "rope_theta": 10000.0}
    for key, said, held in (("num_hidden_layers", 4, 3), ("n_future_tokens", 5, 1), ("n_future_tokens", "1", 1)):
        edit(source / "config.json", num_hidden_layers=3, n_future_tokens=None)
        edit(source / "config.json", **{key: said})
        with pytest.raises(UserError, match=rf"config says {key} = {said!r}, but the weights are of {held}\. Correct"):
            model_info(source)
    other = make_llama("other")
    save_file({"a": torch.ones(1)}, other / "model.safetensors")
    with pytest.raises(UserError, match=r"its weights are no Llama's: there is no model\.layers\.0"):
        model_info(other)
    shutil.rmtree(other)
    folder, _ = make_release()
    edit(folder / "params.json", n_future_tokens=RELEASE["n_future_tokens"] + 1)
    with pytest.raises(UserError, match=r"params\.json says n_future_tokens = 4"):
        model_info(folder)
    assert VOCABULARY == 384
