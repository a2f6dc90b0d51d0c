"""The fingerprint of a trunk: what it covers, to the byte, and what it leaves out."""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from wmtp_ds.errors import UserError
from wmtp_ds.models.fingerprint import (
    FILE_NAME,
    compute_trunk_fingerprint,
    is_trunk,
    read_trunk_fingerprint,
    store_trunk_fingerprint,
)
from wmtp_ds.models.loading import save_weights

WEIGHTS = "model.safetensors"
TRUNK = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.")  # of three blocks, the last is head 1
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def slow_fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """From the definition: names in order, dtype, shape, bytes, of embeddings and trunk."""
    digest = hashlib.sha256()
    for name in sorted(name for name in tensors if name.startswith(TRUNK)):
        tensor = tensors[name]
        digest.update(name.encode() + b"\0" + DTYPES[tensor.dtype].encode() + b"\0")
        digest.update(",".join(str(size) for size in tensor.shape).encode() + b"\0")
        integers = tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
        digest.update(np.ascontiguousarray(integers.numpy()).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_definition(make_policy, write_policy, tmp_path, dtype):
    model = make_policy(3).to(dtype)
    folder = write_policy(model, tmp_path / "model")
    expected = slow_fingerprint({name: parameter.detach() for name, parameter in model.named_parameters()})
    assert compute_trunk_fingerprint(folder) == expected


def test_how_the_weights_are_cut_into_files_does_not_matter(policy, policy_folder, write_policy, tmp_path):
    expected = compute_trunk_fingerprint(policy_folder)
    for shard_bytes in (1, 20_000, 100_000):
        folder = write_policy(policy, tmp_path / str(shard_bytes), shard_bytes=shard_bytes)
        assert compute_trunk_fingerprint(folder) == expected
    # Another order in the file, and transformers' own writing.
    held = load_file(policy_folder / WEIGHTS)
    reordered = Path(shutil.copytree(policy_folder, tmp_path / "reordered"))
    (reordered / WEIGHTS).unlink()
    for number, name in enumerate(reversed(held)):
        save_file({name: held[name]}, reordered / f"{number:03}.safetensors")
    assert compute_trunk_fingerprint(reordered) == expected
    LlamaForCausalLM.from_pretrained(policy_folder).save_pretrained(tmp_path / "plain")
    assert compute_trunk_fingerprint(tmp_path / "plain") == expected


def test_every_tensor_of_the_trunk_counts_and_no_other(policy, folder):
    before = compute_trunk_fingerprint(folder)
    held = load_file(folder / WEIGHTS)
    kinds = {True: 0, False: 0}
    for name in held:
        changed = held[name].clone()
        changed.view(-1)[-1] += 1.0
        save_file(held | {name: changed}, folder / WEIGHTS)
        counts = name.startswith(TRUNK)
        kinds[counts] += 1
        assert (compute_trunk_fingerprint(folder) != before) == counts, name
    assert kinds == {True: 19, False: 9 + 1 + 1 + 27}  # head 1, the norm, lm_head, three more heads


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_bit(folder, policy_folder, data):
    content = bytearray((policy_folder / WEIGHTS).read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    name = data.draw(st.sampled_from(sorted(header)))
    start, stop = header[name]["data_offsets"]
    place = 8 + length + data.draw(st.integers(start, stop - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    (folder / WEIGHTS).write_bytes(content)
    changed = compute_trunk_fingerprint(folder) != compute_trunk_fingerprint(policy_folder)
    assert changed == name.startswith(TRUNK)


def test_names_dtypes_and_shapes_count(folder):
    held = load_file(folder / WEIGHTS)
    found = {compute_trunk_fingerprint(folder)}
    name = "model.layers.0.mlp.up_proj.weight"
    for changes in (
        {name: held[name].T.contiguous()},
        {name: held[name].reshape(-1)},
        {name: held[name].bfloat16()},
        {name: held[name].view(torch.int32)},  # the same bytes
        {f"{name}.renamed": held[name]},
    ):
        kept = {key: value for key, value in held.items() if key != name}
        save_file(kept | changes, folder / WEIGHTS)
        found.add(compute_trunk_fingerprint(folder))
    assert len(found) == 6


def test_config_says_where_the_trunk_ends(folder):
    before = compute_trunk_fingerprint(folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 2}))
    assert compute_trunk_fingerprint(folder) != before
    (folder / "config.json").write_text(json.dumps(fields | {"n_future_tokens": 1, "rope_theta": 7}))
    assert compute_trunk_fingerprint(folder) == before


def test_a_value_head_beside_the_weights_does_not_count(folder):
    before = compute_trunk_fingerprint(folder)
    save_file(
        {"output.weight": torch.ones(1, 32), "model.layers.0.x": torch.ones(1)}, folder / "value_head.safetensors"
    )
    assert compute_trunk_fingerprint(folder) == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", True),
        ("model.layers.0.mlp.up_proj.weight", True),
        ("model.layers.9.mlp.up_proj.weight", True),
        ("model.layers.10.mlp.up_proj.weight", False),
        ("model.layers.11.mlp.up_proj.weight", False),
        ("model.layers.odd.weight", False),
        ("model.layers", False),
        ("model.layers.", False),
        ("model.norm.weight", False),
        ("lm_head.weight", False),
        ("mtp_heads.0.mlp.up_proj.weight", False),
        ("other.model.layers.0.weight", False),
    ],
)
def test_is_trunk(name, expected):
    assert is_trunk(name, num_hidden_layers=11) == expected


def test_stored_beside_the_weights(folder):
    assert read_trunk_fingerprint(folder) is None
    stored = store_trunk_fingerprint(folder)
    assert stored == compute_trunk_fingerprint(folder) == read_trunk_fingerprint(folder)
    assert json.loads((folder / FILE_NAME).read_text()) == {"sha256": stored}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS, FILE_NAME]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"sha256": null}', '{"sha256": 5}', '{"sha256": "ab"}', '{"sha256": "' + "g" * 64 + '"}'],
)
def test_a_damaged_fingerprint_is_named(folder, text):
    (folder / FILE_NAME).write_text(text)
    with pytest.raises(UserError, match=f"{FILE_NAME} is damaged"):
        read_trunk_fingerprint(folder)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"num_hidden_layers": "3"}', "null"])
def test_a_config_that_does_not_say_where_the_trunk_ends(folder, text):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is (missing|damaged)"):
        compute_trunk_fingerprint(folder)


def test_a_folder_that_cannot_be_written_to_is_only_warned_about(folder, monkeypatch, caplog):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert store_trunk_fingerprint(folder) == compute_trunk_fingerprint(folder)
    assert "not stored" in caplog.text
    assert not os.path.exists(folder / FILE_NAME)


def test_large_tensors_are_read_in_pieces(policy_folder, monkeypatch):
    expected = compute_trunk_fingerprint(policy_folder)
    monkeypatch.setattr("wmtp_ds.models.fingerprint._READ_BYTES", 1000)
    assert compute_trunk_fingerprint(policy_folder) == expected


def test_an_export_of_trained_heads_keeps_the_fingerprint(make_policy, write_policy, tmp_path):
    """A critic fits every policy with the trunk that it was trained on, whatever was done to the heads."""
    model = make_policy(4)
    before = store_trunk_fingerprint(write_policy(model, tmp_path / "before"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(TRUNK):
                parameter.add_(1.0)
    (tmp_path / "after").mkdir()
    shutil.copy(tmp_path / "before" / "config.json", tmp_path / "after")
    save_weights(model, tmp_path / "after")
    assert store_trunk_fingerprint(tmp_path / "after") == before
