"""Meta's layout in and out, against Meta's published forward in plain torch: interleaved pairs, complex numbers."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import RELEASE, VOCABULARY, edit, rewrite
from torch.nn import functional as F

from wmtp_ds.errors import UserError
from wmtp_ds.models.config_file import write_config
from wmtp_ds.models.convert.exporting import export_model
from wmtp_ds.models.convert.importing import import_model
from wmtp_ds.models.convert.meta import feed_forward_size, fields_of, tensor_names
from wmtp_ds.models.convert.torch_files import TorchFile
from wmtp_ds.models.fingerprint import compute_trunk_fingerprint, read_trunk_fingerprint
from wmtp_ds.models.loading import load_policy, load_tokenizer, save_weights

TOKENS = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(5))


@dataclass
class Release:
    """The published model's forward without its cache: ``forward(tokens, return_all_heads=True)``."""

    params: dict[str, Any]
    state: dict[str, torch.Tensor]
    freqs_cis: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        head_dim = self.params["dim"] // self.params["n_heads"]
        theta = self.params.get("rope_theta", 10000.0)
        freqs = 1.0 / (theta ** (torch.arange(0, head_dim, 2)[: head_dim // 2].float() / head_dim))
        if self.params.get("use_scaled_rope"):
            freqs = self.scaled(freqs)
        angles = torch.outer(torch.arange(64), freqs).float()
        self.freqs_cis = torch.polar(torch.ones_like(angles), angles)

    def scaled(self, freqs: torch.Tensor) -> torch.Tensor:
        factor, low, high, context = self.params.get("rope_scaling_factor", 8), 1, 4, 8192
        result = []
        for freq in freqs:
            wavelength = 2 * math.pi / freq
            if wavelength < context / high:
                result.append(freq)
            elif wavelength > context / low:
                result.append(freq / factor)
            else:
                smooth = (context / wavelength - low) / (high - low)
                result.append((1 - smooth) * freq / factor + smooth * freq)
        return torch.stack(result)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.params["norm_eps"]) * self.state[f"{name}.weight"]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        freqs = self.freqs_cis[: x.shape[1]].view(1, x.shape[1], 1, -1)
        return torch.view_as_real(pairs * freqs).flatten(3)

    def block(self, x: torch.Tensor, name: str) -> torch.Tensor:
        batch, length, dim = x.shape
        heads = self.params["n_heads"]
        keys = self.params.get("n_kv_heads") or heads
        normed = self.norm(x, f"{name}.attention_norm")
        q, k, v = (
            F.linear(normed, self.state[f"{name}.attention.{part}.weight"]).view(batch, length, -1, dim // heads)
            for part in ("wq", "wk", "wv")
        )
        q, k = self.rotate(q), self.rotate(k)
        k, v = (part.repeat_interleave(heads // keys, dim=2).transpose(1, 2) for part in (k, v))
        scores = q.transpose(1, 2) @ k.transpose(2, 3) / math.sqrt(dim // heads)
        scores = scores + torch.full((length, length), float("-inf")).triu(1)
        mixed = (F.softmax(scores.float(), dim=-1) @ v).transpose(1, 2).reshape(batch, length, dim)
        h = x + F.linear(mixed, self.state[f"{name}.attention.wo.weight"])
        normed = self.norm(h, f"{name}.ffn_norm")
        w1, w2, w3 = (self.state[f"{name}.feed_forward.w{number}.weight"] for number in (1, 2, 3))
        return h + F.linear(F.silu(F.linear(normed, w1)) * F.linear(normed, w3), w2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        n = self.params.get("n_future_tokens", 1)
        layers = self.params["n_layers"] - n + 1
        h = F.embedding(tokens, self.state["tok_embeddings.weight"])
        for number in range(layers - 1):
            h = self.block(h, f"layers.{number}")
        heads = [f"layers.{layers - 1}", *(f"extra_heads.{number}" for number in range(n - 1))]
        latents = torch.stack([self.block(h, head) for head in heads], dim=-2)
        return F.linear(self.norm(latents, "norm"), self.state["output.weight"]).float()


def logits_of(folder) -> torch.Tensor:
    """Logits of all heads of an imported policy, ``[B, S, n, V]``."""
    model = load_policy(folder).eval()
    with torch.no_grad():
        return model.lm_head(model.head_states(model.trunk(TOKENS))).permute(1, 2, 0, 3)


def read_release(folder) -> list[dict[str, torch.Tensor]]:
    return [torch.load(file, weights_only=True) for file in sorted(folder.glob("*.pth"))]


def check(folder, state, policy) -> None:
    """The imported policy computes what Meta's forward computes of the weights that were written."""
    params = json.loads((folder / "params.json").read_text())
    params["vocab_size"] = state["output.weight"].shape[0]
    expected = Release(params, {name: tensor.float() for name, tensor in state.items()}).forward(TOKENS)
    assert expected.abs().mean() > 0.3, "logits too small to show anything"
    torch.testing.assert_close(logits_of(policy), expected, rtol=1e-5, atol=1e-5)


def test_the_release_as_it_is(make_release, tmp_path):
    """n = 4 in one file called consolidated.pth, and the tokenizer in the folder above."""
    folder, state = make_release("models/7B_4", n_future_tokens=4, n_layers=6)
    (folder / "tokenizer.model").rename(tmp_path / "models" / "tokenizer.model")
    assert [file.name for file in sorted(folder.iterdir())] == ["consolidated.pth", "params.json"]
    done = import_model(folder, tmp_path / "policy")
    check(folder, state, tmp_path / "policy")
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["n_future_tokens"]) == (3, 4)
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert done.parameters == sum(tensor.numel() for tensor in state.values())
    assert done.trunk_fingerprint == read_trunk_fingerprint(tmp_path / "policy")
    assert done.trunk_fingerprint == compute_trunk_fingerprint(tmp_path / "policy")


CASES = {
    "one head": {"n_future_tokens": 1},
    "one head, unsaid": {"n_future_tokens": None},
    "heads unsaid": {"n_future_tokens": None, "n_layers": 3},
    "two heads": {"n_future_tokens": 2},
    "no trunk but one block": {"n_layers": 4, "n_future_tokens": 3},
    "no trunk": {"n_layers": 3, "n_future_tokens": 3},
    "as many keys as queries": {"n_kv_heads": None},
    "one key": {"n_kv_heads": 1},
    "another base": {"rope_theta": 1e6},
    "base unsaid": {"rope_theta": None},
    "scaled rotary": {"use_scaled_rope": True, "rope_theta": 500000.0},
    "scaled by 32": {"use_scaled_rope": True, "rope_theta": 500000.0, "rope_scaling_factor": 32.0},
    "vocabulary unsaid": {},
    "another eps": {"norm_eps": 0.01},
    "a multiplier": {"ffn_dim_multiplier": 1.3, "multiple_of": 32},
    "multiple unsaid": {"multiple_of": None},
    "small heads": {"n_heads": 16, "n_kv_heads": 8},
}


@pytest.mark.parametrize("case", CASES)
def test_every_head_agrees_with_the_published_forward(make_release, tmp_path, case):
    folder, state = make_release(**CASES[case])
    if case == "heads unsaid":
        extra = {
            name.replace("layers.2", "extra_heads.0"): value for name, value in state.items() if "layers.2" in name
        }
        rewrite(folder, lambda written: written.update(extra), "consolidated.pth")
        state |= extra
        edit(folder / "params.json", n_layers=4)
    if case == "vocabulary unsaid":
        edit(folder / "params.json", vocab_size=-1)
    import_model(folder, tmp_path / "policy", n_future=1 if case.startswith("one head") else None)
    if case == "heads unsaid":
        edit(folder / "params.json", n_future_tokens=2)
    check(folder, state, tmp_path / "policy")


@pytest.mark.parametrize(("ranks", "axis"), [(2, 1), (2, 0), (4, 1), (4, 0)])
def test_model_parallel_shards(make_release, tmp_path, ranks, axis):
    changes = {"n_kv_heads": 4} if ranks == 4 else {}
    folder, state = make_release(ranks=ranks, embedding_axis=axis, **changes)
    import_model(folder, tmp_path / "policy")
    check(folder, state, tmp_path / "policy")


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_release(make_release, tmp_path_factory, data):
    keys = data.draw(st.sampled_from([2, 4]))
    n = data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    root = tmp_path_factory.mktemp("any")
    folder, state = make_release(
        str(root / "release"),
        ranks=data.draw(st.sampled_from([1, 2])),
        embedding_axis=data.draw(st.sampled_from([0, 1])),
        dtype=dtype,
        dim=data.draw(st.sampled_from([32, 64])),
        n_heads=keys * data.draw(st.sampled_from([1, 2])),
        n_kv_heads=keys,
        n_layers=n + data.draw(st.integers(0, 2)),
        n_future_tokens=n,
        rope_theta=data.draw(st.sampled_from([100.0, 10000.0, 500000.0])),
        seed=data.draw(st.integers(0, 99)),
    )
    import_model(folder, root / "policy", n_future=n)
    check(folder, state, root / "policy")
    export_model(root / "policy", root / "back", format="meta")
    assert_same_release(folder, root / "back")


@pytest.mark.parametrize(("dim", "factor"), [(2048, 32.0), (3072, 32.0), (4096, 8.0), (8192, 8.0), (16384, 8.0)])
def test_the_rotary_factor_of_each_generation(dim, factor):
    """Of the published config.json of Llama 3.1 and 3.2; params.json does not tell them apart but by their sizes."""
    params = {"dim": dim, "n_layers": 2, "n_heads": 32, "rope_theta": 500000.0, "use_scaled_rope": True}
    rope = fields_of(params, 1, 128256, 8192)["rope_parameters"]
    assert rope == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    said = fields_of(params | {"rope_scaling_factor": 16}, 1, 128256, 8192)["rope_parameters"]
    assert said["factor"] == 16.0


def test_a_head_is_not_another(make_release, tmp_path):
    """The check above would pass if all heads were equal; they are not."""
    folder, _ = make_release()
    import_model(folder, tmp_path / "policy")
    logits = logits_of(tmp_path / "policy")
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (logits[..., one, :] - logits[..., other, :]).abs().mean() > 0.1


def test_buffers_are_left_out(make_release, tmp_path):
    buffers = {"rope.freqs": torch.ones(8), "layers.0.attention.inner_attention.rope.freqs": torch.ones(8)}
    folder, state = make_release(extra=buffers | {"freqs_cis": torch.ones(4, 8, dtype=torch.complex64)})
    import_model(folder, tmp_path / "policy")
    check(folder, state, tmp_path / "policy")


def test_a_next_token_release_gets_heads(make_release, tmp_path):
    folder, state = make_release(n_future_tokens=1, n_layers=3)
    import_model(folder, tmp_path / "policy", n_future=3)
    logits = logits_of(tmp_path / "policy")
    expected = Release(RELEASE | {"n_future_tokens": 1, "n_layers": 3}, state).forward(TOKENS)
    for head in range(3):
        torch.testing.assert_close(logits[:, :, head], expected[:, :, 0], rtol=1e-5, atol=1e-5)


def test_params_below_a_key(make_release, tmp_path):
    folder, state = make_release()
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({"model": params}))
    import_model(folder, tmp_path / "policy")
    (folder / "params.json").write_text(json.dumps(params))
    check(folder, state, tmp_path / "policy")


# --- and back ---


def assert_same_release(one, other) -> None:
    """Files, names, shapes, dtypes and bytes of the weights; params.json; tokenizer.model."""
    names = [file.name for file in sorted(one.iterdir())]
    assert names == [file.name for file in sorted(other.iterdir())]
    assert json.loads((one / "params.json").read_text()) == json.loads((other / "params.json").read_text())
    assert (one / "tokenizer.model").read_bytes() == (other / "tokenizer.model").read_bytes()
    for mine, theirs in zip(read_release(one), read_release(other), strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
            assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"ranks": 2},
        {"ranks": 2, "embedding_axis": 0},
        {"n_future_tokens": 1},
        {"n_future_tokens": None},
        {"vocab_size": VOCABULARY, "n_kv_heads": None, "ffn_dim_multiplier": 1.3},
        {"use_scaled_rope": True},
        {"files": ("consolidated.00.pth",)},
    ],
)
def test_there_and_back_is_equal_to_the_bit(make_release, tmp_path, dtype, case):
    folder, _ = make_release(dtype=dtype, **case)
    import_model(folder, tmp_path / "policy", n_future=case.get("n_future_tokens", 3) or 1)
    export_model(tmp_path / "policy", tmp_path / "back", format="meta")
    assert_same_release(folder, tmp_path / "back")


def test_mixed_dtypes_stay(make_release, tmp_path):
    folder, _ = make_release(dtype=torch.bfloat16)
    rewrite(folder, lambda state: state.update({"norm.weight": state["norm.weight"].float()}), "consolidated.pth")
    import_model(folder, tmp_path / "policy")
    export_model(tmp_path / "policy", tmp_path / "back", format="meta")
    assert_same_release(folder, tmp_path / "back")
    assert read_release(tmp_path / "back")[0]["norm.weight"].dtype == torch.float32


def test_a_vocabulary_that_is_unsaid_stays_so(make_release, tmp_path):
    folder, _ = make_release()
    edit(folder / "params.json", vocab_size=-1)
    import_model(folder, tmp_path / "policy")
    export_model(tmp_path / "policy", tmp_path / "back", format="meta")
    assert_same_release(folder, tmp_path / "back")


def test_a_release_becomes_another_at_once(make_release, tmp_path):
    """From Meta's layout to Meta's, and to Hugging Face's, without a policy in between."""
    folder, _ = make_release()
    export_model(folder, tmp_path / "copy", format="meta")
    assert_same_release(folder, tmp_path / "copy")
    export_model(folder, tmp_path / "hf")
    import_model(folder, tmp_path / "policy")
    export_model(tmp_path / "policy", tmp_path / "other")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()


def test_a_policy_that_never_was_metas(make_llama, tmp_path):
    """params.json is made of its config, and Meta's forward computes the same."""
    for number, size in enumerate((96, 171, 512)):
        folder = make_llama(f"source{number}", intermediate_size=size, seed=number, rope_theta=5000.0)
        import_model(folder, tmp_path / f"policy{number}", heads="random", n_future=3)
        done = export_model(tmp_path / f"policy{number}", tmp_path / f"meta{number}", format="meta")
        assert done.files == ["consolidated.00.pth"]
        assert any("tokenizer.model" in warning for warning in done.warnings)
        params = json.loads((tmp_path / f"meta{number}" / "params.json").read_text())
        multiplier = params.get("ffn_dim_multiplier")
        assert feed_forward_size(params["dim"], params["multiple_of"], multiplier) == size
        (state,) = read_release(tmp_path / f"meta{number}")
        expected = Release(params, state).forward(TOKENS)
        torch.testing.assert_close(logits_of(tmp_path / f"policy{number}"), expected, rtol=1e-5, atol=1e-5)


@given(dim=st.integers(1, 300).map(lambda number: number * 2), size=st.integers(1, 2000))
def test_the_rule_for_feed_forward_layers_has_an_inverse(dim, size):
    from wmtp_ds.models.convert.meta_export import _feed_forward_rule

    multiple_of, multiplier = _feed_forward_rule(dim, size)
    width = int(8 * dim / 3) if multiplier is None else int(multiplier * int(8 * dim / 3))
    assert -(-width // multiple_of) * multiple_of == size


def test_the_width_of_the_released_models():
    assert feed_forward_size(4096, 256, None) == 11008
    assert feed_forward_size(8192, 4096, 1.3) == 28672
    assert feed_forward_size(4096, 1024, 1.3) == 14336


def test_tied_embeddings_are_written_out(make_llama, tmp_path):
    folder = make_llama(tie_word_embeddings=True)
    export_model(folder, tmp_path / "meta", format="meta")
    (state,) = read_release(tmp_path / "meta")
    assert torch.equal(state["output.weight"], state["tok_embeddings.weight"])


def test_changed_weights_keep_the_params(make_release, tmp_path):
    """What comes back of a policy that was trained is a release of the same shape."""
    folder, _ = make_release(ranks=2)
    import_model(folder, tmp_path / "policy")
    rewrite(tmp_path / "policy", lambda state: state["model.norm.weight"].mul_(2))
    export_model(tmp_path / "policy", tmp_path / "back", format="meta")
    parts, originals = read_release(tmp_path / "back"), read_release(folder)
    assert len(parts) == 2
    for part, original in zip(parts, originals, strict=True):
        changed = [name for name in part if not torch.equal(part[name], original[name])]
        assert changed == ["norm.weight"]
    assert json.loads((tmp_path / "back/params.json").read_text()) == json.loads((folder / "params.json").read_text())


def test_what_a_run_exports_goes_back(make_release, tmp_path):
    """A run reads the policy, trains it, and writes config and weights by itself; the release is still known."""
    folder, _ = make_release(ranks=2)
    import_model(folder, tmp_path / "policy")
    model = load_policy(tmp_path / "policy")
    best = tmp_path / "checkpoint_best"
    best.mkdir()
    save_weights(model, best)
    write_config(best, model.config, torch.float32)
    load_tokenizer(tmp_path / "policy").save_pretrained(best)
    done = export_model(best, tmp_path / "back", format="meta")
    assert done.files == ["consolidated.00.pth", "consolidated.01.pth"]
    for mine, theirs in zip(read_release(folder), read_release(tmp_path / "back"), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert json.loads((tmp_path / "back/params.json").read_text()) == json.loads((folder / "params.json").read_text())


def test_params_that_no_longer_hold_are_made_anew(make_release, tmp_path):
    folder, _ = make_release()
    import_model(folder, tmp_path / "policy")
    edit(tmp_path / "policy" / "config.json", rms_norm_eps=0.5)
    export_model(tmp_path / "policy", tmp_path / "back", format="meta")
    params = json.loads((tmp_path / "back/params.json").read_text())
    assert params["norm_eps"] == 0.5
    assert {key: params[key] for key in ("dim", "n_layers", "n_future_tokens")} == {
        key: RELEASE[key] for key in ("dim", "n_layers", "n_future_tokens")
    }


def test_another_rotary_makes_params_anew(make_release, tmp_path):
    folder, _ = make_release()
    import_model(folder, tmp_path / "policy")
    rope = {"rope_type": "default", "rope_theta": 700.0}
    edit(tmp_path / "policy" / "config.json", rope_theta=700.0, rope_parameters=rope)
    export_model(tmp_path / "policy", tmp_path / "back", format="meta")
    assert json.loads((tmp_path / "back/params.json").read_text())["rope_theta"] == 700.0


def test_rows_that_cannot_be_divided_among_the_files(make_release, tmp_path):
    folder, _ = make_release(ranks=2)
    import_model(folder, tmp_path / "policy")
    edit(tmp_path / "policy" / "config.json", vocab_size=VOCABULARY + 1)
    row = torch.ones(1, 64)
    wider = {"model.embed_tokens.weight", "lm_head.weight"}
    rewrite(tmp_path / "policy", lambda state: state.update({name: torch.cat([state[name], row]) for name in wider}))
    with pytest.raises(UserError, match=r"lm_head\.weight of shape \[385, 64\] cannot be divided among 2 files"):
        export_model(tmp_path / "policy", tmp_path / "back", format="meta")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "kept",
    [
        3,
        {},
        {"files": ["../../evil.pth"]},
        {"files": ["/tmp/evil.pth"]},
        {"files": ["evil.sh"]},
        {"files": ["a.pth", "a.pth"]},
        {"files": []},
        {"files": "consolidated.pth"},
        {"embedding_axis": 2},
        {"params": {"dim": "wide"}},
        {"params": {"n_layers": 3}},
        {"params": None},
    ],
)
def test_what_a_config_claims_of_a_release_is_not_trusted(make_release, tmp_path, kept):
    """A config.json comes from anywhere: a file is written where it belongs, or the claim counts for nothing."""
    folder, _ = make_release()
    import_model(folder, tmp_path / "policy")
    config = tmp_path / "policy" / "config.json"
    release = json.loads(config.read_text())["meta_release"]
    edit(config, meta_release=release | kept if isinstance(kept, dict) and kept else kept)
    export_model(tmp_path / "policy", tmp_path / "back", format="meta")
    name = "consolidated.pth" if "dim" in str(kept) or "n_layers" in str(kept) else "consolidated.00.pth"
    assert {file.name for file in (tmp_path / "back").iterdir()} == {"params.json", "tokenizer.model", name}
    assert {path.name for path in tmp_path.iterdir()} == {"release", "policy", "back"}
    params = json.loads((tmp_path / "back/params.json").read_text())
    assert (params["dim"], params["n_layers"]) == (64, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "has biases"),
        ({"mlp_bias": True}, "has biases"),
        ({"head_dim": 32}, "has head_dim = 32"),
        ({"hidden_act": "gelu"}, "has hidden_act = gelu"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope scaling of type linear"),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 2.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "rope scaling of other values than Llama 3.1's",
        ),
    ],
)
def test_what_metas_layout_has_no_place_for(make_llama, tmp_path, changes, message):
    folder = make_llama(**changes)
    with pytest.raises(UserError, match=rf"{message}, for which Meta's layout has no place\. Export it as hf or mtp"):
        export_model(folder, tmp_path / "meta", format="meta")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_every_name_is_of_the_release():
    """Names as Meta's modules have them."""
    names = [name.meta for name in tensor_names(blocks=2, heads=3)]
    assert len(names) == len(set(names)) == 3 + 4 * 9
    assert names[:2] == ["tok_embeddings.weight", "layers.0.attention.wq.weight"]
    assert names[-2:] == ["norm.weight", "output.weight"]
    assert {"extra_heads.0.feed_forward.w3.weight", "extra_heads.1.ffn_norm.weight"} <= set(names)


# --- what is wrong with a release ---


def drop(name: str):
    return lambda folder: rewrite(folder, lambda state: state.pop(name), "consolidated.pth")


def put(name: str, tensor: torch.Tensor):
    return lambda folder: rewrite(folder, lambda state: state.update({name: tensor}), "consolidated.pth")


def params(**changes: Any):
    return lambda folder: edit(folder / "params.json", **changes)


FAULTS: dict[str, tuple[Any, str]] = {
    "no params.json": (lambda folder: (folder / "params.json").unlink(), r"params\.json is missing: Meta's layout"),
    "params.json cut": (lambda folder: (folder / "params.json").write_text('{"dim": 6'), r"params\.json is damaged"),
    "params.json a list": (lambda folder: (folder / "params.json").write_text("[]"), "holds no JSON object"),
    "no dim": (params(dim=None), r"params\.json says dim = None; it must be a whole number"),
    "n_heads a word": (params(n_heads="4"), r"params\.json says n_heads = '4'"),
    "n_layers zero": (params(n_layers=0), r"params\.json says n_layers = 0"),
    "n_layers true": (params(n_layers=True), r"params\.json says n_layers = True"),
    "eps negative": (params(norm_eps=-1), r"params\.json says norm_eps = -1; it must be a number above 0"),
    "heads do not divide": (params(n_heads=6, n_kv_heads=6), "n_heads must divide dim"),
    "keys do not divide": (params(n_kv_heads=3), "n_kv_heads must divide n_heads"),
    "a mixture of experts": (params(moe={"n": 8}), "says moe: such models are not supported"),
    "too many heads said": (
        params(n_future_tokens=4),
        r"says n_future_tokens = 4, which is 3 extra heads .*weights hold 2\. Correct n_future_tokens to 3",
    ),
    "too few heads said": (params(n_future_tokens=2), r"n_future_tokens = 2, which is 1 extra heads .* hold 2\."),
    "one head said": (params(n_future_tokens=1), r"n_future_tokens = 1, which is 0 extra heads .* hold 2\."),
    "too many layers said": (params(n_layers=9), r"n_layers = 9 with n_future_tokens = 3, which is 7 blocks .* hold 3"),
    "too few layers said": (params(n_layers=4), r"n_layers = 4 with n_future_tokens = 3, which is 2 blocks .* hold 3"),
    "another vocabulary said": (params(vocab_size=500), r"vocab_size = 500, but output\.weight has 384 rows in 1 file"),
    "another width said": (params(multiple_of=256), r"feed-forward layers are 256 wide, but .* has 176 rows in 1 file"),
    "no output": (drop("output.weight"), r"lacks the tensor output\.weight\. Copy the model again"),
    "no embeddings": (drop("tok_embeddings.weight"), r"lacks the tensor tok_embeddings\.weight"),
    "no norm of a head": (drop("extra_heads.1.ffn_norm.weight"), r"lacks the tensor extra_heads\.1\.ffn_norm\.weight"),
    "no first block": (
        drop("layers.0.feed_forward.w1.weight"),
        r"lacks the tensor layers\.0\.feed_forward\.w1",
    ),
    "a tensor too many": (put("layers.0.attention.bias", torch.ones(2)), r"hold layers\.0\.attention\.bias, which no"),
    "another shape": (
        put("layers.1.attention.wv.weight", torch.ones(64, 64)),
        r"consolidated\.pth: layers\.1\.attention\.wv\.weight has shape \[64, 64\], but .* asks for \[32, 64\]",
    ),
    "queries of no whole head": (
        put("layers.1.attention.wq.weight", torch.ones(63, 64)),
        "63 rows, which are not whole heads",
    ),
    "a norm that is a matrix": (put("norm.weight", torch.ones(8, 8)), r"norm\.weight is not a tensor of 1 dimensions"),
    "a matrix that is a vector": (
        put("layers.0.attention.wo.weight", torch.ones(64)),
        "not a tensor of 2 dimensions",
    ),
    "a number beyond all": (
        put(f"layers.{'9' * 5000}.ffn_norm.weight", torch.ones(64)),
        r"hold layers\.9+\.ffn_norm\.weight, which no model",
    ),
    "a single number": (put("output.weight", torch.tensor(1.0)), r"output\.weight is a single number, no weights"),
    "embeddings of a single number": (
        put("tok_embeddings.weight", torch.tensor(1.0)),
        "is a single number, no weights",
    ),
    "integers": (put("norm.weight", torch.ones(64, dtype=torch.int32)), r"norm\.weight is stored as int32: quantised"),
    "NaN": (
        put("extra_heads.0.attention_norm.weight", torch.full((64,), torch.nan)),
        "weight holds NaN",
    ),
    "infinity": (put("output.weight", torch.full((VOCABULARY, 64), torch.inf)), r"output\.weight holds infinity"),
    "no weights": (lambda folder: (folder / "consolidated.pth").unlink(), r"no consolidated.*the weights are missing"),
    "weights cut": (
        lambda folder: (folder / "consolidated.pth").write_bytes((folder / "consolidated.pth").read_bytes()[:9000]),
        r"consolidated\.pth is damaged: it is cut short",
    ),
    "two files of one rank": (
        lambda folder: (folder / "other.pth").write_bytes(b""),
        r"holds consolidated\.pth, other\.pth; expected consolidated\.NN\.pth",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), r"has no tokenizer .*--tokenizer"),
    "a damaged tokenizer": (
        lambda folder: (folder / "tokenizer.model").write_bytes(b"\0nothing"),
        r"the tokenizer in .*tokenizer\.model cannot be read",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_release(make_release, tmp_path, fault):
    folder, _ = make_release()
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(UserError, match=message) as found:
        import_model(folder, tmp_path / "policy")
    assert str(folder) in str(found.value)
    assert "\n" not in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["release"], "something is left behind"


def test_faults_of_shards(make_release, tmp_path):
    folder, _ = make_release("a", ranks=2)
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(UserError, match=r"consolidated\.00\.pth is missing, but there is consolidated\.01\.pth"):
        import_model(folder, tmp_path / "policy")
    folder, _ = make_release("b", ranks=2)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(UserError, match=r"has 192 rows in 1 file\(s\)\. Is a consolidated\.\*\.pth missing"):
        import_model(folder, tmp_path / "policy")
    folder, _ = make_release("c", ranks=2)
    rewrite(folder, lambda state: state["norm.weight"].add_(1), "consolidated.01.pth")
    with pytest.raises(UserError, match=r"norm\.weight differs between the shards: they are not of one model"):
        import_model(folder, tmp_path / "policy")
    folder, _ = make_release("d", ranks=2)
    rewrite(folder, lambda state: state.pop("layers.1.ffn_norm.weight"), "consolidated.01.pth")
    with pytest.raises(UserError, match=r"consolidated\.01\.pth lacks the tensor layers\.1\.ffn_norm\.weight"):
        import_model(folder, tmp_path / "policy")
    folder, _ = make_release("f", ranks=2)
    old = folder / "consolidated.01.pth"
    torch.save(torch.load(old, weights_only=True), old, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"consolidated\.01\.pth is of torch's file format before 1\.6.*Save it anew"):
        import_model(folder, tmp_path / "policy")
    folder, _ = make_release("e", ranks=2)
    wide = torch.ones(32, 65)
    rewrite(folder, lambda state: state.update({"layers.1.attention.wq.weight": wide}), "consolidated.01.pth")
    with pytest.raises(UserError, match=r"layers\.1\.attention\.wq\.weight does not fit together"):
        import_model(folder, tmp_path / "policy")


def test_a_file_of_a_release_opens_without_being_read(make_release, monkeypatch):
    """The weights of a release are many gigabytes: what is opened is a map of them."""
    folder, state = make_release()
    tensors = TorchFile(folder / "consolidated.pth", verify=False).tensors()
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }
