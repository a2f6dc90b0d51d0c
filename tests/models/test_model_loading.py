"""Model folders: the way out and in to the bit, other programs reading them, and every way of being wrong."""

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from wmtp_ds.errors import UserError
from wmtp_ds.models import loading
from wmtp_ds.models.config_file import write_config
from wmtp_ds.models.loading import load_policy, load_tokenizer, read_llama_config, save_weights

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    """Names, dtypes and every bit."""
    ours, theirs = dict(found.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert ours[name].dtype == parameter.dtype
        assert torch.equal(ours[name], parameter), name


# --- there and back ---


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
@pytest.mark.parametrize("n", [1, 4])
def test_round_trip_to_the_bit(make_policy, write_policy, tokens, tmp_path, n, changes):
    model = make_policy(n, **changes)
    folder = write_policy(model, tmp_path / "model")
    loaded = load_policy(folder).eval()
    assert_same_weights(loaded, model)
    assert loaded.n_future_tokens == n
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == bool(changes.get("tie_word_embeddings"))
    with torch.no_grad():
        assert torch.equal(loaded.head_states(loaded.trunk(tokens)), model.head_states(model.trunk(tokens)))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS]


def test_shards_with_an_index(policy, write_policy, tmp_path):
    folder = write_policy(policy, tmp_path / "model", shard_bytes=30_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert files == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    index = json.loads((folder / INDEX).read_text())
    parameters = dict(policy.named_parameters())
    assert index["weight_map"].keys() == parameters.keys()
    assert index["metadata"]["total_size"] == sum(4 * parameter.numel() for parameter in parameters.values())
    largest = max(4 * parameter.numel() for parameter in parameters.values())
    for file in files:
        held = load_file(folder / file)
        assert held.keys() == {name for name, where in index["weight_map"].items() if where == file}
        size = sum(4 * tensor.numel() for tensor in held.values())
        assert size < 30_000 + largest
        assert size >= 30_000 or file == files[-1]
    assert_same_weights(load_policy(folder), policy)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_transformers_loads_the_next_token_model(make_policy, write_policy, tokens, tmp_path, changes, shard_bytes):
    model = make_policy(4, **changes)
    folder = write_policy(model, tmp_path / "model", shard_bytes=shard_bytes)
    assert (folder / INDEX).exists() == (shard_bytes == 20_000)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(plain) is LlamaForCausalLM
    assert (plain.dtype, plain.config.n_future_tokens) == (torch.float32, 4)
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, model(tokens).logits, rtol=0, atol=0)
        head_1 = model.lm_head(model.head_states(model.trunk(tokens))[0])
        torch.testing.assert_close(plain(tokens).logits, head_1, rtol=1e-5, atol=1e-5)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert torch.equal(plain.generate(tokens, **options), model.generate(tokens, **options))


def test_a_plain_llama_loads_as_a_policy_of_one_head(make_policy, tokens, tmp_path):
    config = make_policy(1).config
    del config.n_future_tokens
    plain = LlamaForCausalLM(config).eval()
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match=r"config\.json .*n_future_tokens >= 1, not None"):
        load_policy(tmp_path / "plain")
    loaded = load_policy(tmp_path / "plain", n_future_tokens=1).eval()
    assert_same_weights(loaded, plain)
    with torch.no_grad():
        expected = plain(tokens).logits
        torch.testing.assert_close(loaded.lm_head(loaded.head_states(loaded.trunk(tokens)))[0], expected)


def test_n_future_tokens_overrides_the_config(policy, policy_folder):
    loaded = load_policy(policy_folder, n_future_tokens=1)
    assert (loaded.n_future_tokens, loaded.config.n_future_tokens) == (1, 1)
    expected = dict(policy.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name])
    assert json.loads((policy_folder / "config.json").read_text())["n_future_tokens"] == 4
    with pytest.raises(UserError, match=r"lacks 9 tensors .* first mtp_heads\.3\.input_layernorm\.weight"):
        load_policy(policy_folder, n_future_tokens=5)


def test_dtype(policy, policy_folder, tokens):
    loaded = load_policy(policy_folder, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    for name, parameter in policy.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16())
    # Also what is no parameter (the rotary frequencies stay float32) is as transformers makes it.
    plain = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, loaded(tokens).logits)


def test_the_default_dtype_comes_back_after_an_error(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError):
        load_policy(folder, dtype=torch.bfloat16)
    (folder / "config.json").write_text('{"model_type": "llama", "n_future_tokens": 0}')
    with pytest.raises(UserError):
        load_policy(folder, dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


def test_stored_bfloat16_loads_as_float32(policy, tmp_path):
    save_weights(policy, tmp_path, value_of=lambda parameter: parameter.detach().bfloat16())
    write_config(tmp_path, policy.config, torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    for name, parameter in load_policy(tmp_path).named_parameters():
        assert torch.equal(parameter, policy.get_parameter(name).bfloat16().float())


def test_tensors_beyond_the_config_are_left_out(folder, policy):
    held = load_file(folder / WEIGHTS)
    save_file(held | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / WEIGHTS)
    assert_same_weights(load_policy(folder), policy)


@pytest.mark.parametrize(("of_folder", "expected"), [(0o755, 0o644), (0o750, 0o640), (0o700, 0o600)])
def test_weights_are_as_readable_as_their_folder(policy, tmp_path, of_folder, expected):
    tmp_path.chmod(of_folder)
    save_weights(policy, tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_mode & 0o777 == expected


def test_a_file_that_cannot_be_written_is_an_oserror(policy, tmp_path):
    # Exports catch OSError, and safetensors raises something else.
    with pytest.raises(OSError, match="gone"):
        save_weights(policy, tmp_path / "gone")


# --- sharded: never more than one whole parameter ---


class FakeSharding:
    """Parameters are whole while they are gathered, and empty otherwise, as under ZeRO-3."""

    def __init__(self, is_main: bool = True):
        self.is_main = is_main
        self.whole: dict[nn.Parameter, torch.Tensor] = {}
        self.gathers: list[tuple[nn.Parameter, bool]] = []
        self.open = self.most_open = self.constructions = 0

    def adopt(self, model: nn.Module) -> None:
        """Partition the parameters of a model that is there already."""
        for parameter in model.parameters():
            self._release(parameter, parameter.data.clone())

    def _release(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        self.whole[parameter] = value
        parameter.data = torch.empty(0, dtype=value.dtype)

    @contextmanager
    def construct(self) -> Iterator[None]:
        self.constructions += 1
        original, made = nn.Module.register_parameter, []

        def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            original(module, name, parameter)
            made.append(parameter)

        nn.Module.register_parameter = register
        try:
            yield
        finally:
            nn.Module.register_parameter = original
        for parameter in {parameter for parameter in made if parameter is not None}:
            self._release(parameter, torch.full_like(parameter.data, torch.nan))

    @contextmanager
    def gathered(self, parameter: nn.Parameter, modify: bool = False) -> Iterator[None]:
        self.gathers.append((parameter, modify))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        gathered = parameter.data = self.whole[parameter].clone()
        try:
            yield
        finally:
            changed = modify and self.is_main
            self._release(parameter, gathered.clone() if changed else self.whole[parameter])
            gathered.fill_(torch.nan)  # its memory is used for the next one
            self.open -= 1

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(self.whole[parameter].shape)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_loading_gathers_one_parameter_at_a_time(make_policy, write_policy, tmp_path, changes):
    model = make_policy(4, **changes)
    folder = write_policy(model, tmp_path / "model", shard_bytes=30_000)
    sharding = FakeSharding()
    loaded = load_policy(folder, sharding=sharding)
    parameters = dict(loaded.named_parameters())
    assert (sharding.constructions, sharding.most_open, sharding.open) == (1, 1, 0)
    assert [parameter for parameter, _ in sharding.gathers] == list(parameters.values())
    assert all(modify for _, modify in sharding.gathers)
    for name, parameter in model.named_parameters():
        assert parameters[name].numel() == 0
        assert torch.equal(sharding.whole[parameters[name]], parameter)


def test_only_the_main_rank_reads(policy_folder, monkeypatch):
    monkeypatch.setattr(loading, "_read", lambda *_: pytest.fail("another rank has read a tensor"))
    sharding = FakeSharding(is_main=False)
    loaded = load_policy(policy_folder, sharding=sharding)
    # It takes part in every gather, in the same order, and leaves the values to the main rank.
    assert [parameter for parameter, modify in sharding.gathers if modify] == list(loaded.parameters())
    assert all(value.isnan().all() for value in sharding.whole.values())


def test_a_model_that_does_not_fit_is_refused_before_anything_is_gathered(folder):
    fields = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 64}
    (folder / "config.json").write_text(json.dumps(fields))
    for is_main in (True, False):
        sharding = FakeSharding(is_main)
        with pytest.raises(UserError, match=r"mlp\.gate_proj\.weight has shape \[48, 32\], .* \[64, 32\]"):
            load_policy(folder, sharding=sharding)
        assert sharding.gathers == []


def test_a_broken_config_is_refused_before_ranks_make_the_model(folder):
    fields = json.loads((folder / "config.json").read_text()) | {"hidden_act": "sillu"}
    (folder / "config.json").write_text(json.dumps(fields))
    sharding = FakeSharding()
    with pytest.raises(UserError, match=r"config\.json .*sillu"):
        load_policy(folder, sharding=sharding)
    assert sharding.constructions == 0


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_saving_gathers_one_parameter_at_a_time(make_policy, tmp_path, shard_bytes):
    model, expected = make_policy(4), make_policy(4)
    sharding = FakeSharding()
    sharding.adopt(model)
    save_weights(model, tmp_path, sharding=sharding, shard_bytes=shard_bytes)
    assert (sharding.most_open, sharding.open) == (1, 0)
    assert sharding.gathers == [(parameter, False) for parameter in model.parameters()]
    write_config(tmp_path, expected.config, torch.float32)
    assert_same_weights(load_policy(tmp_path), expected)


def test_only_the_main_rank_writes(make_policy, tmp_path):
    model = make_policy(4)
    sharding = FakeSharding(is_main=False)
    sharding.adopt(model)
    save_weights(model, tmp_path, sharding=sharding, shard_bytes=30_000)
    assert list(tmp_path.iterdir()) == []
    assert [parameter for parameter, _ in sharding.gathers] == list(model.parameters())


def test_saved_values_are_copies_made_while_gathered(make_policy, tmp_path):
    model = make_policy(2)
    sharding = FakeSharding()
    sharding.adopt(model)
    save_weights(model, tmp_path, sharding=sharding, value_of=lambda parameter: parameter.detach().double() * 2)
    held = load_file(tmp_path / WEIGHTS)
    for name, parameter in model.named_parameters():
        assert torch.equal(held[name], sharding.whole[parameter].double() * 2)


# --- what can be wrong with a folder ---


def edit_config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v != "removed"}))

    return damage


def edit_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def edit_header(change: Callable[[dict], object], tail: bytes = b"") -> Callable[[Path], None]:
    """Change a safetensors header, leaving the bytes behind it (and ``tail`` after them)."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        text = json.dumps(change(header)).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :] + tail)

    return damage


def edit_entry(**changes: object) -> Callable[[Path], None]:
    name = "model.norm.weight"
    return edit_header(lambda header: header | {name: header[name] | changes})


def write(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode()) and None


def cut(size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


CONFIG_FAULTS = {
    "no config": (remove("config.json"), ["config.json is missing", "not a model folder"]),
    "config cut short": (write("config.json", '{"model_type": "lla'), ["config.json is damaged"]),
    "config binary": (write("config.json", b"\xff\xfe\x00\x01"), ["config.json is damaged"]),
    "config a list": (write("config.json", "[1, 2]"), ["config.json is damaged", "no JSON object"]),
    "config null": (write("config.json", "null"), ["config.json is damaged", "no JSON object"]),
    "another architecture": (edit_config(model_type="mistral"), ["config.json", "'mistral'", "only Llama"]),
    "no architecture": (edit_config(model_type="removed"), ["config.json", "model_type is None"]),
    "no heads": (edit_config(n_future_tokens="removed"), ["config.json", "n_future_tokens >= 1, not None"]),
    "zero heads": (edit_config(n_future_tokens=0), ["config.json", "n_future_tokens >= 1, not 0"]),
    "half a head": (edit_config(n_future_tokens=1.5), ["config.json", "n_future_tokens >= 1, not 1.5"]),
    "no blocks": (edit_config(num_hidden_layers=0), ["config.json", "num_hidden_layers >= 1, not 0"]),
    "a block too few": (
        edit_config(num_hidden_layers=2),
        ["weights hold model.layers.2", "config.json says num_hidden_layers = 2"],
    ),
    "blocks a text": (edit_config(num_hidden_layers="3"), ["config.json", "num_hidden_layers"]),
    "heads do not divide": (edit_config(num_attention_heads=5), ["config.json", "attention heads"]),
    "no attention heads": (edit_config(num_attention_heads=0), ["config.json describes no Llama"]),
    "unknown activation": (edit_config(hidden_act="silo"), ["config.json", "silo"]),
    "unknown rotary type": (edit_config(rope_parameters={"rope_type": "spiral"}), ["config.json", "spiral"]),
    "padding beyond the vocabulary": (edit_config(pad_token_id=99), ["config.json", "adding_idx"]),
    "unknown dtype": (edit_config(dtype="float17"), ["config.json", "float17"]),
}
WEIGHT_FAULTS = {
    "no weights": (remove(WEIGHTS), ["copy has no safetensors weights"]),
    "empty file": (write(WEIGHTS, b""), [WEIGHTS, "damaged"]),
    "five bytes": (cut(5), [WEIGHTS, "damaged"]),
    "cut in the header": (cut(100), [WEIGHTS, "damaged", "header is longer"]),
    "cut in a tensor": (cut(-10), [WEIGHTS, "damaged", "it ends within tensor"]),
    "garbage": (write(WEIGHTS, bytes(range(256)) * 9), [WEIGHTS, "damaged"]),
    "a header of garbage": (write(WEIGHTS, struct.pack("<Q", 64) + b"\xfe" * 99), [WEIGHTS, "damaged"]),
    "not safetensors": (write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n" * 3), [WEIGHTS, "damaged"]),
    "a header that is a list": (edit_header(lambda header: list(header)), [WEIGHTS, "damaged", "no JSON object"]),
    "bytes behind the tensors": (edit_header(lambda header: header, tail=b"more"), [WEIGHTS, "it should have"]),
    "an unknown dtype": (edit_entry(dtype="Q4"), [WEIGHTS, "damaged", "dtype", "model.norm.weight"]),
    "an entry without place": (edit_entry(data_offsets=None), [WEIGHTS, "damaged", "model.norm.weight"]),
    "a place before the start": (edit_entry(data_offsets=[-128, 0]), [WEIGHTS, "impossible", "model.norm.weight"]),
    "a shape of texts": (edit_entry(shape=["32"]), [WEIGHTS, "impossible", "model.norm.weight"]),
    "a shape that needs more bytes": (edit_entry(shape=[33]), [WEIGHTS, "wrong number of bytes", "model.norm.weight"]),
    "two tensors in one place": (edit_entry(data_offsets=[0, 128]), [WEIGHTS, "does not begin where"]),
    "a missing tensor": (
        edit_weights(lambda held: {k: v for k, v in held.items() if k != "mtp_heads.1.mlp.up_proj.weight"}),
        ["copy lacks 1 tensors", "mtp_heads.1.mlp.up_proj.weight"],
    ),
    "a missing head": (
        edit_weights(lambda held: {k: v for k, v in held.items() if not k.startswith("mtp_heads.2")}),
        ["copy lacks 9 tensors", "mtp_heads.2.input_layernorm.weight"],
    ),
    "a wrong shape": (
        edit_weights(lambda held: held | {"lm_head.weight": torch.zeros(60, 32)}),
        [WEIGHTS, "lm_head.weight has shape [60, 32]", "[61, 32]"],
    ),
    "transposed": (
        edit_weights(lambda held: {k: v.T.contiguous() if "mlp" in k else v for k, v in held.items()}),
        [WEIGHTS, "mlp.gate_proj.weight has shape [32, 48]"],
    ),
    "quantised": (
        edit_weights(lambda held: {k: v.to(torch.int8) if "mlp" in k else v for k, v in held.items()}),
        [WEIGHTS, "stored as I8", "quantised"],
    ),
}
INDEX_FAULTS = {
    "index cut short": (write(INDEX, '{"weight_map": {'), [INDEX, "damaged"]),
    "index a list": (write(INDEX, "[]"), [INDEX, "damaged"]),
    "index without a map": (write(INDEX, "{}"), [INDEX, "damaged"]),
    "map of numbers": (write(INDEX, '{"weight_map": {"lm_head.weight": 1}}'), [INDEX, "damaged"]),
    "empty map": (write(INDEX, '{"weight_map": {}}'), ["no safetensors weights"]),
}
FAULTS = CONFIG_FAULTS | WEIGHT_FAULTS | INDEX_FAULTS


@pytest.mark.parametrize(("damage", "parts"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_folder_is_named(folder, damage, parts):
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_policy(folder)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert str(folder) in message
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/config\.json is missing"):
        load_policy(tmp_path / "nowhere")


def test_a_missing_or_damaged_shard_is_named(policy, write_policy, tmp_path):
    folder = write_policy(policy, tmp_path / "model", shard_bytes=30_000)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{shard} is damaged"):
        load_policy(folder)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard} is missing"):
        load_policy(folder)


def test_read_llama_config(policy_folder):
    config = read_llama_config(policy_folder)
    assert (config.n_future_tokens, config.num_hidden_layers, config.num_key_value_heads) == (4, 3, 2)
    assert read_llama_config(policy_folder, n_future_tokens=2).n_future_tokens == 2


# --- tokenizers ---


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({}, "has no tokenizer that loads"),
        ({"tokenizer.json": "{"}, "has no tokenizer that loads"),
        ({"tokenizer.json": "[]"}, "has no tokenizer that loads"),
        ({"tokenizer.json": '{"model": {}}', "tokenizer_config.json": "[]"}, "has no tokenizer that loads"),
    ],
)
def test_a_folder_without_a_tokenizer(folder, files, part):
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=part) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_is_never_looked_for_on_the_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="micro-policy does not exist"):
        load_tokenizer(Path("micro-policy"))
