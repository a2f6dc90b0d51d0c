"""Shards of checkpoints are pickles: those of others do not run, wherever they are read."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from attack import Attack

from wmtp_ds.checkpoint_files import write_manifest
from wmtp_ds.engine import Engine, saved_classes
from wmtp_ds.errors import UserError
from wmtp_ds.shards import FORCE, FORCE_NOT, check_shards, plain_data_only
from wmtp_ds.universal import convert


@pytest.fixture
def never(tmp_path: Path) -> Path:
    return tmp_path / "never"


def checkpoint(root: Path, content: Any) -> Path:
    """A folder with the files that DeepSpeed's shards have, and a manifest that fits them."""
    folder = root / "step_00000004"
    folder.mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save(content, folder / f"zero_pp_rank_0_{name}" if name.startswith("mp") else folder / name)
    write_manifest(folder, step=4, world_size=2, global_batch=4)
    return folder


def own() -> dict[str, Any]:
    """What a shard of DeepSpeed's holds: tensors, plain types, and a few of its classes."""
    stage, scaler, dynamic = saved_classes()
    scalers = [scaler(1.0), dynamic(2.0**16, 2.0, 1000, 1.0, 1, False, True)]
    shapes = {"a": torch.Size([2, 3])}
    return {"stage": stage(3), "scalers": scalers, "shapes": shapes, "t": torch.ones(2), "modules": {"a"}, "n": None}


def test_shards_of_our_own_are_read(tmp_path: Path) -> None:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    folder = checkpoint(tmp_path, own())
    check_shards(folder, saved_classes())
    with plain_data_only(saved_classes()):
        found = TorchCheckpointEngine().load(str(next(folder.glob("*optim*"))), map_location="cpu")
    assert found["scalers"][1].cur_scale == 2.0**16
    assert found["stage"] == 3
    assert FORCE not in os.environ


@pytest.mark.parametrize("user", [{}, {FORCE_NOT: "1"}, {FORCE: "0"}], ids=str)
def test_deepspeed_runs_no_code(
    tmp_path: Path, never: Path, monkeypatch: pytest.MonkeyPatch, user: dict[str, str]
) -> None:
    """Without the first look, too; whatever the user has set, which stays as it was."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    for name in (FORCE, FORCE_NOT):
        monkeypatch.delenv(name, raising=False)
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    folder = checkpoint(tmp_path, own() | {"evil": Attack(never)})
    shard = str(next(folder.glob("*optim*")))
    with pytest.raises(UserError, match="is never run"), plain_data_only(saved_classes()):
        TorchCheckpointEngine().load(shard, map_location="cpu")
    assert not never.exists()
    assert {name: os.environ[name] for name in (FORCE, FORCE_NOT) if name in os.environ} == user
    monkeypatch.delenv(FORCE, raising=False)
    TorchCheckpointEngine().load(shard, map_location="cpu")
    assert never.exists(), "the attack is a real one"


def test_a_resume_refuses_them_before_deepspeed_reads(tmp_path: Path, never: Path) -> None:
    folder = checkpoint(tmp_path, {"evil": Attack(never)})
    engine = Engine.__new__(Engine)  # one that would fail at whatever comes next
    with pytest.raises(UserError, match=r"_states\.pt was not read: it asks for \w+\.mkdir to be run") as found:
        engine.load_state(folder.parent, folder.name, strict=True)
    assert found.value.exit_code == 2
    assert not never.exists()


@pytest.mark.parametrize("kind", ["pickle", "text", "empty"])
def test_what_is_no_shard(tmp_path: Path, never: Path, kind: str) -> None:
    content = {"pickle": pickle.dumps(Attack(never)), "text": b"hello", "empty": b""}[kind]
    folder = tmp_path / "step_00000004"
    folder.mkdir()
    (folder / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt was not read: it is no file of torch\.save"):
        check_shards(folder, saved_classes())
    assert not never.exists()


def test_a_conversion_refuses_them(tmp_path: Path, never: Path) -> None:
    """In the process of its own in which DeepSpeed's program converts."""
    folder = checkpoint(tmp_path, {"evil": Attack(never)})
    with pytest.raises(UserError, match="to be run") as found:
        convert(folder)
    assert found.value.exit_code == 2
    assert not never.exists()
    assert not list((tmp_path / ".universal").glob("*"))
