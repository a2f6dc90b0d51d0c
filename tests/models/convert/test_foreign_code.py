"""Model folders of somebody who means ill: nothing in them runs, whichever command is given them.

Each folder would make the file ``never``. Every command ends with 0 (what is harmful was not looked at) or with 2.
"""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack import Attack
from in_process import command
from small_models import edit, pickled
from transformers import LlamaConfig, LlamaForSequenceClassification

from wmtp_ds.errors import UserError
from wmtp_ds.models.convert import tokenizer as tokenizers_of
from wmtp_ds.models.convert.importing import import_model
from wmtp_ds.models.loading import load_policy, load_tokenizer
from wmtp_ds.models.reward import load_reward_model

CODE = "import pathlib\npathlib.Path({never!r}).touch()\n"


@pytest.fixture
def never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an attack would make. Nobody is asked for permission, either."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question whether code may run"))
    return tmp_path / "never"


def test_the_attack_is_a_real_one(tmp_path: Path, never: Path) -> None:
    pickle.loads(pickle.dumps(Attack(never)))
    assert never.exists()
    never.rmdir()
    torch.save({"a": Attack(never)}, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert never.exists()


def safetensors(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[Any], *offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}}


LYING = {
    "longer than the file": safetensors({}, length=2**40),
    "longer than memory": safetensors({}, length=2**63),
    "beyond the end": safetensors(tensor([1000], 0, 4000)),
    "negative": safetensors(tensor([4], -16, 0)),
    "overlap": safetensors({**tensor([4], 0, 16), "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
    "more values than bytes": safetensors(tensor([2**40], 0, 16)),
    "product beyond 64 bits": safetensors(tensor([2**62, 2**62, 0], 0, 16)),
    "endless product": safetensors(tensor([10**4000] * 4000, 0, 16)),
    "odd dtype": safetensors(tensor([4], 0, 16, dtype="OBJECT")),
    "list for dtype": safetensors(tensor([4], 0, 16, dtype=[])),
    "texts for numbers": safetensors(tensor(["4"], "0", "16")),
    "infinite": safetensors(b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 16]}}'),
    "deep": safetensors(b"[" * 100_000),
    "no object": safetensors(b"[1]"),
    "digits": safetensors(b'{"a": 1' + b"0" * 1_000_000 + b"}"),
    "pickle": pickle.dumps(Attack(Path("never"))),
}


def _weights(name: str) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, never: Path) -> None:
        (folder / "model.safetensors").unlink()
        target = folder / name
        torch.save({"model.embed_tokens.weight": Attack(never)}, target)

    return spoil


def _bare_pickle(folder: Path, never: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Attack(never)}, protocol=2))


def _climbing(index: str, name: str) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, never: Path) -> None:
        torch.save({"a": Attack(never)}, folder.parent / "outside.bin")
        (folder.parent / "outside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").unlink()
        (folder / index).write_text(json.dumps({"weight_map": {"a": name.format(parent=folder.parent)}}))

    return spoil


def _config(**changes: Any) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, never: Path) -> None:
        (folder / "modeling_evil.py").write_text(CODE.format(never=str(never)))
        (folder / "configuration_evil.py").write_text(CODE.format(never=str(never)))
        edit(folder / "config.json", **changes)

    return spoil


def _tokenizer(*missing: str, **changes: Any) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, never: Path) -> None:
        (folder / "tokenization_evil.py").write_text(CODE.format(never=str(never)))
        edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]}, **changes)
        for name in missing:
            (folder / name).unlink()
            (folder / "vocab.json").write_text("{}")
            (folder / "merges.txt").write_text("")

    return spoil


def _content(name: str, make: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    return lambda folder, never: (folder / name).write_bytes(make(never)) and None


def _pickle_of(never: Path) -> bytes:
    return pickle.dumps(Attack(never))


AUTO_MAP = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
AUTO_MAP |= {"AutoModelForSequenceClassification": "modeling_evil.Evil"}
# How a folder is spoilt, and whether it must be refused by whatever reads weights and tokenizer.
FOLDERS: dict[str, tuple[Callable[[Path, Path], None], bool]] = {
    "pytorch_model.bin": (_weights("pytorch_model.bin"), True),
    "consolidated.00.pth": (_weights("consolidated.00.pth"), True),
    "bare pickle": (_bare_pickle, True),
    "index that climbs": (_climbing("model.safetensors.index.json", "../outside.safetensors"), True),
    "index with a path": (_climbing("model.safetensors.index.json", "{parent}/outside.safetensors"), True),
    "index with nothing": (_climbing("model.safetensors.index.json", ""), True),
    "index with dots": (_climbing("model.safetensors.index.json", ".."), True),
    "index of pickles that climbs": (_climbing("pytorch_model.bin.index.json", "../outside.bin"), True),
    "auto_map": (_config(auto_map=AUTO_MAP), False),
    "another model_type": (_config(auto_map=AUTO_MAP, model_type="evil", architectures=["EvilForCausalLM"]), True),
    "attention from the hub": (_config(attn_implementation="evil/kernel"), True),
    "attention from the hub, privately": (_config(_attn_implementation="evil/kernel@main:attention"), True),
    "experts from the hub": (_config(experts_implementation={"": "evil/kernel"}), True),
    "tokenizer with code": (_tokenizer(), False),
    "tokenizer class with code": (_tokenizer(tokenizer_class="Evil"), False),
    "tokenizer of code alone": (_tokenizer("tokenizer.json", tokenizer_class="Evil"), True),
    "tokenizer.json of a pickle": (_content("tokenizer.json", _pickle_of), True),
    "safetensors of a pickle": (_content("model.safetensors", _pickle_of), True),
    **{
        f"safetensors: {name}": (_content("model.safetensors", lambda _, content=content: content), True)  # type: ignore[misc]
        for name, content in LYING.items()
    },
}


@pytest.mark.parametrize("name", FOLDERS)
def test_model_folders(make_llama: Callable[..., Path], tmp_path: Path, never: Path, name: str) -> None:
    spoil, refused = FOLDERS[name]
    folder = make_llama("evil")
    edit(folder / "config.json", n_future_tokens=1)
    spoil(folder, never)
    imported = command("model", "import", folder, tmp_path / "dest", seconds=60)
    assert imported.code == (2 if refused else 0), imported
    assert "trust_remote_code" not in imported.err, "advice that nobody should take"
    exported = command("model", "export", folder, tmp_path / "exported", seconds=60)
    assert exported.code in (0, 2), exported
    shown = command("model", "info", folder, seconds=60)
    assert shown.code in (0, 2), shown
    # What ranks do when they start.
    for load in (load_policy, load_tokenizer):
        try:
            load(folder)
        except UserError as error:
            assert "trust_remote_code" not in str(error)  # noqa: PT017
    assert not never.exists()
    if not refused:  # and nothing of it has come along
        assert not list((tmp_path / "dest").glob("*.py"))
        assert "auto_map" not in "".join(file.read_text() for file in (tmp_path / "dest").glob("*.json"))


REWARD_FOLDERS = (
    *("pytorch_model.bin", "bare pickle", "index that climbs", "auto_map", "another model_type", "tokenizer with code"),
    *("attention from the hub", "tokenizer of code alone", "safetensors of a pickle", "safetensors: beyond the end"),
)


@pytest.mark.parametrize("name", REWARD_FOLDERS)
def test_reward_models(tokenizer_folder: Path, tmp_path: Path, never: Path, name: str) -> None:
    spoil, refused = FOLDERS[name]
    folder = tmp_path / "reward"
    sizes = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    spoil(folder, never)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"problem_id": "1", "instruction": "add", "output": "x = 1", "is_correct": true}\n')
    options = ("--reward-model", folder, "--input", data, "--output", tmp_path / "scored.jsonl")
    done = command("data", "label", *options, seconds=60)
    assert done.code == (2 if refused else 0), done
    assert "trust_remote_code" not in done.err
    if name not in ("tokenizer with code", "tokenizer of code alone", "auto_map"):
        with pytest.raises(UserError):
            load_reward_model(folder)
    assert not never.exists()


def test_releases(make_release: Callable[..., Any], tmp_path: Path, never: Path) -> None:
    """Meta's layout: weights, and a tokenizer.model, that are pickles with code."""
    folder, _ = make_release("release")
    [weights] = folder.glob("*.pth")
    good = weights.read_bytes()
    torch.save({"tok_embeddings.weight": Attack(never)}, weights)
    done = command("model", "import", folder, tmp_path / "dest", seconds=60)
    assert done.code == 2
    assert "to be run" in done.err
    weights.write_bytes(good)
    for file in (*folder.glob("tokenizer.model"), *folder.parent.glob("tokenizer.model")):
        file.write_bytes(pickle.dumps(Attack(never)))
    done = command("model", "import", folder, tmp_path / "dest", seconds=60)
    assert done.code == 2, done
    assert not never.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64, b"GGUF\x03\0\0\0" + bytes(1000), pickle.dumps([1]), b"\xff" * 9],
)
def test_gguf_files(tmp_path: Path, never: Path, content: bytes) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(content + pickle.dumps(Attack(never)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (folder / "evil.py").write_text(CODE.format(never=str(never)))
    done = command("model", "import", folder, tmp_path / "dest", seconds=60)
    assert done.code == 2, done
    assert not never.exists()


def test_the_tokenizer_of_a_gguf_file_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def from_pretrained(*_: Any, **keywords: Any) -> None:
        given.update(keywords)
        raise ValueError("enough")

    monkeypatch.setattr(tokenizers_of.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="enough"):
        tokenizers_of._make(tokenizers_of.TokenizerSource("gguf", tmp_path / "a.gguf"), {})
    assert given["trust_remote_code"] is False
    assert given["local_files_only"] is True


def test_object_arrays_are_no_caches(tmp_path: Path, never: Path) -> None:
    """An index or scores beside the data that are pickles: made anew."""
    data = tmp_path / "rows.jsonl"
    data.write_text('{"problem_id": "1", "instruction": "add", "output": "x = 1", "is_correct": true}\n')
    evil = np.array([Attack(never)], dtype=object)
    np.savez(tmp_path / "evil.npz", offset=evil, text=evil, key=evil)
    (tmp_path / "evil.npz").replace(tmp_path / ".rows.jsonl.index.npz")
    done = command("data", "stats", data, "--json")
    assert done.code == 0
    assert json.loads(done.out)["rows"] == 1

    from wmtp_ds.rewards import ScoreCache

    cache = ScoreCache(tmp_path, ["a"], 1)
    np.save(cache.path, evil, allow_pickle=True)
    assert np.isnan(cache.load()).all()
    assert not never.exists()


def test_a_pickled_folder_that_is_sound_still_works(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    import_model(pickled(make_llama()), tmp_path / "dest")
    assert (tmp_path / "dest/model.safetensors").is_file()
