"""Value head files: round trips, files that do not fit, files that are damaged, files that attack."""

import json
import os
import pickle
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from wmtp_ds.errors import UserError
from wmtp_ds.handoff import (
    ValueHeadFile,
    check_value_head,
    load_value_head,
    read_value_head_metadata,
    save_value_head,
)

D = 8
TRUNK = "ab" * 32


def weights(head_type="mlp", size=D, dtype=torch.float32):
    torch.manual_seed(0)
    tensors = {"norm.weight": torch.rand(size), "output.weight": torch.rand(1, size), "output.bias": torch.rand(1)}
    if head_type == "mlp":
        tensors |= {"hidden.weight": torch.rand(size, size), "hidden.bias": torch.rand(size)}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def save(path, head_type="mlp", **options):
    values = {"hidden_size": D, "type": head_type, "activation": "sigmoid", "trunk_fingerprint": TRUNK} | options
    save_value_head(path, weights(head_type), **values)
    return path


def fits(head, **options):
    values = {"hidden_size": D, "type": "mlp", "activation": "sigmoid", "trunk_fingerprint": TRUNK} | options
    return check_value_head(head, **values)


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_round_trip(tmp_path, head_type):
    path = save(tmp_path / "deep" / "value_head.safetensors", head_type)
    head = load_value_head(path)
    assert (head.hidden_size, head.type, head.activation) == (D, head_type, "sigmoid")
    assert (head.trunk_fingerprint, head.path) == (TRUNK, path)
    expected = weights(head_type)
    assert set(head.state_dict) == set(expected)
    assert all(torch.equal(head.state_dict[name], expected[name]) for name in expected)
    assert [child.name for child in path.parent.iterdir()] == ["value_head.safetensors"]
    assert read_value_head_metadata(path) == {
        "format": "pt",
        "hidden_size": "8",
        "type": head_type,
        "activation": "sigmoid",
        "trunk_fingerprint": TRUNK,
    }
    assert fits(head, type=head_type) == []


def test_weights_of_any_dtype_and_layout_become_float32(tmp_path):
    tensors = weights(dtype=torch.bfloat16)
    tensors["hidden.weight"] = tensors["hidden.weight"].t().requires_grad_()
    path = tmp_path / "value_head.safetensors"
    save_value_head(path, tensors, hidden_size=D, type="mlp", activation="none", trunk_fingerprint="")
    head = load_value_head(path)
    assert {tensor.dtype for tensor in head.state_dict.values()} == {torch.float32}
    assert torch.equal(head.state_dict["hidden.weight"], tensors["hidden.weight"].detach().float())


def test_a_pt_file(tmp_path):
    path = tmp_path / "critic.pt"
    torch.save({"value_head_state_dict": weights("linear"), "activation": "none", "step": 7}, path)
    head = load_value_head(path)
    assert (head.hidden_size, head.type, head.activation, head.trunk_fingerprint) == (D, "linear", "none", None)
    warnings = fits(head, type="linear", activation="none")
    assert len(warnings) == 1
    assert "no trunk fingerprint" in warnings[0]


def test_what_a_file_does_not_say_is_warned_about(tmp_path):
    path = tmp_path / "value_head.safetensors"
    save_file(weights(), path)
    head = load_value_head(path)
    assert (head.hidden_size, head.type, head.activation, head.trunk_fingerprint) == (D, "mlp", None, None)
    assert [warning.split(" does")[0].split(" has")[0] for warning in fits(head)] == [str(path)] * 2


# What does not fit: both sides and the mend are named.


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hidden_size": 4096}, ["hidden size of 8", "policy's is 4096", "train a critic on this policy"]),
        ({"type": "linear"}, ["type is 'mlp'", "value_head.type is 'linear'", 'set value_head.type = "mlp"']),
        ({"activation": "none"}, ["'sigmoid'", "value_head.activation is 'none'", "set value_head.activation"]),
        ({"trunk_fingerprint": "cd" * 32}, ["abababababab", "cdcdcdcdcdcd", "models.policy.path"]),
    ],
)
def test_misfits(tmp_path, given, words):
    head = load_value_head(save(tmp_path / "value_head.safetensors"))
    with pytest.raises(UserError) as error:
        fits(head, **given)
    assert all(word in str(error.value) for word in [*words, str(head.path)])


def test_all_misfits_at_once(tmp_path):
    head = load_value_head(save(tmp_path / "value_head.safetensors"))
    with pytest.raises(UserError) as error:
        fits(head, type="linear", activation="none", trunk_fingerprint="cd" * 32)
    assert str(error.value).count("\n  - ") == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("hidden.bias"), r"missing hidden\.bias, unexpected nothing"),
        (lambda t: t.update({"proj.weight": torch.ones(1)}), r"missing nothing, unexpected proj\.weight"),
        (lambda t: t.update({"output.weight": torch.ones(1, 7)}), r"has shape \[1, 7\], which is not \[1, 8\]"),
        (lambda t: t.update({"norm.weight": torch.ones(9)}), r"norm\.weight .* has shape \[9\]"),
        (lambda t: t["hidden.weight"].__setitem__((3, 3), float("nan")), r"hidden\.weight .* not finite"),
        (lambda t: t["output.bias"].fill_(float("inf")), r"output\.bias .* not finite"),
        (lambda t: t.clear() or t.update({"x": torch.ones(1)}), r"missing .*norm\.weight"),
    ],
)
def test_weights_that_make_no_value_head(tmp_path, change, message):
    tensors = weights()
    change(tensors)
    path = tmp_path / "value_head.safetensors"
    metadata = {"hidden_size": "8", "type": "mlp", "activation": "sigmoid", "trunk_fingerprint": TRUNK}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match=message):
        load_value_head(path)
    with pytest.raises(UserError, match=message):
        save_value_head(path, tensors, hidden_size=D, type="mlp", activation="sigmoid", trunk_fingerprint="")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"hidden_size": "eight"}, "hidden_size = 'eight'"),
        ({"hidden_size": "9" * 5000}, "no whole number"),
        ({"hidden_size": "²"}, "no whole number"),
        ({"hidden_size": "-8"}, "no whole number"),
        ({"hidden_size": "16"}, "as hidden size 16 asks for"),
        ({"type": "transformer"}, "'transformer'; there are: linear, mlp"),
        ({"type": "linear"}, "unexpected hidden.bias, hidden.weight"),
    ],
)
def test_metadata_that_make_no_sense(tmp_path, metadata, message):
    path = tmp_path / "value_head.safetensors"
    save_file(weights(), path, metadata=metadata)
    with pytest.raises(UserError, match=message):
        load_value_head(path)


# Damage and attacks


class Attack:
    """Unpickled, it makes the folder ``taken_over``."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("save_as", ["torch zip", "torch legacy", "plain pickle", "a pickle called safetensors"])
def test_a_malicious_file_runs_nothing(tmp_path, save_as):
    target = tmp_path / "taken_over"
    content = {"value_head_state_dict": weights(), "extra": Attack(target)}
    path = tmp_path / ("value_head.safetensors" if "safetensors" in save_as else "critic.pt")
    if save_as.startswith("torch"):
        torch.save(content, path, _use_new_zipfile_serialization=save_as == "torch zip")
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"refused: it holds more than weights|cannot be read") as error:
        load_value_head(path)
    assert "\n  Mend: " in str(error.value)
    assert not target.exists()
    pickle.loads(pickle.dumps(Attack(target)))  # the attack is a real one
    assert target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no 'value_head_state_dict' \\(it holds: list\\)"),
        ({"state_dict": {}}, "it holds: state_dict"),
        ({"value_head_state_dict": [1]}, "holds no 'value_head_state_dict'"),
        ({"value_head_state_dict": {"norm.weight": 1.0}}, "no tensors: norm.weight"),
        ({"value_head_state_dict": {}}, "missing norm.weight"),
    ],
)
def test_a_pt_of_another_make(tmp_path, content, message):
    path = tmp_path / "critic.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match=message):
        load_value_head(path)


def header(text: str, length: int | None = None) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


@pytest.mark.parametrize("name", ["value_head.safetensors", "critic.pt"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        header("{}", 2**63),
        header("{", 1),
        header("[1, 2]"),
        header('{"__metadata__": [1]}'),
        header("[" * 50_000),
        header('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'),
        header(json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})),
        b"\x80\x04garbage",
        b"PK\x03\x04 not a zip",
    ],
)
def test_damaged_files_are_the_users_error(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=name):
        load_value_head(path)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 700), flips=st.lists(st.tuples(st.integers(0, 700), st.integers(1, 255)), max_size=3))
def test_a_damaged_file_never_gives_a_traceback(tmp_path_factory, cut, flips):
    path = save(tmp_path_factory.mktemp("damaged") / "value_head.safetensors")
    data = bytearray(path.read_bytes())
    for place, value in flips:
        data[place % len(data)] ^= value
    path.write_bytes(data[: len(data) - cut])
    try:
        head = load_value_head(path)
    except UserError:
        return
    assert isinstance(head, ValueHeadFile)


def test_a_file_that_is_not_there(tmp_path):
    for name in ("value_head.safetensors", "critic.pt"):
        with pytest.raises(UserError, match="No such file"):
            load_value_head(tmp_path / name)
