"""Properties: nothing that a user can type ends in a traceback, later layers win, resolved TOML loads to itself."""

import json
import string
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wmtp_ds.config import ConfigError
from wmtp_ds.config.keys import all_keys, format_key, parse_key

KEYS = sorted(all_keys())
EXTRA_KEYS = [
    "data_sampling.curriculum_schedule[0].epoch_range",
    "data_sampling.curriculum_schedule[0].difficulty_weights.low",
    "data_sampling.difficulty_bins.low",
    "training.betas[0]",
    "experiment",
    "models.policy",
    "experiment.tags.x",
]
VALUES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "1", "-1", "1.5", "nan", "inf", "true", "2024-01-01", "'", '"', "\0", "\udc80", "9" * 400, "1e400"]
    ),
    st.sampled_from(["[]", "[[]]", "[0.0, 1.0]", "{}", "{a=1}", '{"a": null}', "[null]", "[" * 300]),
    st.sampled_from(["${experiment.name}", "${", "${training}", "${dataset.name}"]),
    st.sampled_from(["~/x", "/", "runs:/a/b", "runs:/", "mlflow://1/2/artifacts/..", "file:x", "http://["]),
    st.integers().map(str),
    st.floats().map(str),
)
OVERRIDES = st.one_of(
    st.text(max_size=16),
    st.builds("{}={}".format, st.one_of(st.sampled_from(KEYS + EXTRA_KEYS), st.text(max_size=10)), VALUES),
    st.builds("{}[{}]={}".format, st.sampled_from(KEYS), st.integers(0, 3), VALUES),
    st.builds("{}.{}={}".format, st.sampled_from(KEYS), st.sampled_from(["x", "0", "low"]), VALUES),
)
MANY = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def attempt(workspace, *overrides, environ=None):
    """The config, or what is wrong with it."""
    try:
        return workspace.load(*overrides, environ=environ), []
    except ConfigError as error:
        return None, error.problems


def check_problems(problems):
    for problem in problems:
        assert problem.message
        assert problem.mend
        assert problem.origin
        str(problem).encode()  # it can be printed


@MANY
@given(overrides=st.lists(OVERRIDES, max_size=4), stage=st.sampled_from(["baseline", "critic", "verifiable", "rho1"]))
def test_any_override_is_taken_or_is_a_config_error(workspace, overrides, stage):
    workspace.write_config(stage)
    resolved, problems = attempt(workspace, *overrides)
    if resolved:
        resolved.toml().encode()
    check_problems(problems)


NAMES = st.one_of(
    st.sampled_from(KEYS + EXTRA_KEYS).map(
        lambda key: "WMTP_" + key.replace("[", ".").replace("]", "").replace(".", "__").upper()
    ),
    st.text(string.ascii_uppercase + "_0", max_size=12).map(lambda name: f"WMTP_{name}"),
)


@MANY
@given(environ=st.dictionaries(NAMES, VALUES, max_size=3))
def test_any_variable_is_taken_or_is_a_config_error(workspace, environ):
    workspace.write_config("verifiable")
    check_problems(attempt(workspace, environ=environ)[1])


@MANY
@given(text=st.one_of(st.text(max_size=60), st.binary(max_size=60)))
def test_any_file_is_a_config_or_a_config_error(workspace, text):
    workspace.path("run.toml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError) as caught:  # no text of this length holds all that is required
        workspace.load()
    str(caught.value).encode()


# JSON whose keys mean something, with values that they should not have.
MODEL_KEYS = ["model_type", "num_hidden_layers", "n_future_tokens", "vocab_size", "hidden_size", "weight_map", "sha256"]
TOKENIZER_KEYS = ["model", "vocab", "added_tokens", "id", "content"]
DEEPSPEED_KEYS = ["zero_optimization", "stage", "offload_param", "device", "optimizer", "checkpoint"]
TENSOR_KEYS = ["__metadata__", "shape", "dtype", "data_offsets", "output.weight", "model.embed_tokens.weight", "type"]
JSON_KEYS = st.sampled_from([*MODEL_KEYS, *TOKENIZER_KEYS, *DEEPSPEED_KEYS, *TENSOR_KEYS, "problem_id", "output"])
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=5), st.just("llama")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(JSON_KEYS, inner, max_size=4)),
    max_leaves=8,
)
NAMED_FILES = [
    "ds/zero3.json",
    "models/policy/config.json",
    "models/policy/tokenizer.json",
    "models/policy/model.safetensors",
    "models/policy/model.safetensors.index.json",
    "models/policy/trunk_fingerprint.json",
    "critic/value_head.safetensors",
    "data/train.jsonl",
]


def damage(before, content, is_header):
    """A file's bytes: others altogether, or its JSON with some keys replaced."""
    size = 8 if is_header else 0
    if isinstance(content, bytes):
        return content
    if isinstance(content, dict):
        length = struct.unpack("<Q", before[:8])[0] if is_header else len(before)
        whole = before[size : size + length]
        content = json.loads(whole.splitlines()[0] if b"problem_id" in whole else whole) | content
    body = json.dumps(content).encode()
    return (struct.pack("<Q", len(body)) if is_header else b"") + body


@MANY
@given(
    content=st.one_of(st.binary(max_size=30), JSON, st.dictionaries(JSON_KEYS, JSON, min_size=1, max_size=3)),
    name=st.sampled_from(NAMED_FILES),
)
def test_any_file_that_is_named_is_read_or_is_a_config_error(workspace, content, name):
    workspace.write_config("verifiable")
    path = workspace.path(name)
    before = path.read_bytes() if path.exists() else b"{}"
    try:
        path.write_bytes(damage(before, content, name.endswith(".safetensors")))
        check_problems(attempt(workspace)[1])
    finally:
        path.write_bytes(before) if before != b"{}" else path.unlink()


# A key with values of the right type, so that every layer may set it.
TYPED = {
    "training.batch_size": st.integers(1, 8),
    "training.learning_rate": st.floats(1e-9, 1.0),
    "training.max_grad_norm": st.floats(0, 1e6),
    "training.gradient_checkpointing": st.booleans(),
    "training.scheduler": st.sampled_from(["constant", "linear", "cosine"]),
    "training.betas": st.lists(st.floats(0, 0.999), min_size=2, max_size=2),
    "runtime.seed": st.integers(0, 2**62),
    "dataset.name": st.text(string.ascii_letters + string.digits + " -'\"#=[]", min_size=1, max_size=8).filter(
        str.strip
    ),
}


def as_toml(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


@MANY
@given(
    data=st.data(),
    key=st.sampled_from(sorted(TYPED)),
    layers=st.sets(st.sampled_from(["extends", "file", "environment", "override"]), min_size=1),
)
def test_the_highest_layer_that_sets_a_key_wins(workspace, data, key, layers):
    values = {layer: data.draw(TYPED[key]) for layer in sorted(layers)}
    table, _, name = key.partition(".")

    def statement(layer):
        return f"{key} = {as_toml(values[layer])}\n" if layer in values else ""

    base = workspace.text("baseline")
    if name in ("batch_size", "learning_rate") or key == "dataset.name":
        lines = [line for line in base.splitlines() if not line.startswith(f"{name} = ") or 'name = "trial"' in line]
        base = "\n".join(lines) + "\n"
        # What the schema requires is set by some layer in any case.
        values.setdefault("extends", data.draw(TYPED[key]))
    if f"[{table}]" in base:
        inner = f"{name} = {as_toml(values['extends'])}\n" if "extends" in values else ""
        base = base.replace(f"[{table}]\n", f"[{table}]\n{inner}")
    else:
        base = statement("extends") + base
    workspace.write("base.toml", base)
    workspace.write("run.toml", 'extends = "base.toml"\n' + statement("file"))
    environ = {}
    if "environment" in values:
        environ[f"WMTP_{table}__{name}".upper()] = as_toml(values["environment"])
    overrides = [f"{key}={as_toml(values['override'])}"] if "override" in values else []

    resolved = workspace.load(*overrides, environ=environ)
    order = ("override", "environment", "file", "extends")
    winner = next(layer for layer in order if layer in values)
    assert resolved.flat()[key] == values[winner]
    assert resolved.origins[key].layer == winner


@MANY
@given(data=st.data(), stage=st.sampled_from(["baseline", "critic", "verifiable", "rho1"]))
def test_resolved_toml_loads_to_itself(workspace, data, stage):
    workspace.write_config(stage)
    chosen = data.draw(st.sets(st.sampled_from(sorted(TYPED))))
    overrides = [f"{key}={as_toml(data.draw(TYPED[key]))}" for key in sorted(chosen)]
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
    environ = {"WMTP_EXPERIMENT__DESCRIPTION": text.replace("${", "")}
    resolved = workspace.load(*overrides, environ=environ)
    workspace.write("run.toml", resolved.toml())
    again = workspace.load()
    assert again.config == resolved.config
    assert (again.hash(), again.toml()) == (resolved.hash(), resolved.toml())


PARTS = st.text(string.ascii_letters + "_-", min_size=1, max_size=5)


@given(st.lists(st.tuples(PARTS, st.lists(st.integers(0, 99), max_size=2)), min_size=1, max_size=4))
def test_keys_are_read_as_they_are_written(parts):
    path = tuple(item for name, indices in parts for item in (name, *indices))
    assert parse_key(format_key(path)) == path
