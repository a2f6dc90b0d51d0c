"""Conversions for another number of ranks: made once, whole or not at all, and of the checkpoint that is there."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wmtp_ds import universal
from wmtp_ds.checkpoint_files import MANIFEST, leftovers, read_manifest, verify_manifest, write_manifest
from wmtp_ds.errors import RunError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "step_00000004"
    folder.mkdir(parents=True)
    (folder / "shard.pt").write_bytes(b"shards of two ranks")
    write_manifest(folder, step=4, world_size=2, global_batch=8)
    return folder


class Converter:
    """In place of DeepSpeed's program; writes what that writes."""

    def __init__(self, code: int = 0, said: str = "done"):
        self.code, self.said, self.calls = code, said, 0

    def __call__(self, command: list[str], **keywords: Any) -> SimpleNamespace:
        self.calls += 1
        assert command[:4] == [sys.executable, "-P", "-m", "wmtp_ds.universal"]
        root, given, out = Path(command[4]), command[5], command[6]
        assert given == "--input_folder=step_00000004"
        output = root / out.removeprefix("--output_folder=")
        (output / "zero").mkdir(parents=True, exist_ok=True)
        (output / "zero" / "fp32.pt").write_bytes((root / "step_00000004" / "shard.pt").read_bytes().upper())
        if not self.code:
            (output.parent / "latest_universal").write_text(output.name)
        assert "RANK" not in keywords["env"]
        assert keywords["env"]["DS_ACCELERATOR"] == "cpu"
        return SimpleNamespace(returncode=self.code, stdout=f"a line\n{self.said}\n")


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Converter]:
    def use(*arguments: Any) -> Converter:
        made = Converter(*arguments)
        monkeypatch.setattr(subprocess, "run", made)
        monkeypatch.setenv("RANK", "0")
        return made

    return use


def test_a_conversion_is_made_once(saved: Path, converter) -> None:
    program = converter()
    folder = universal.convert(saved)
    assert folder == saved.parent / ".universal" / saved.name
    assert (folder / "zero" / "fp32.pt").read_bytes() == b"SHARDS OF TWO RANKS"
    assert verify_manifest(folder) is None
    assert read_manifest(folder)["world_size"] == 2
    assert sorted(path.name for path in folder.parent.iterdir()) == [saved.name]
    assert leftovers(saved.parent) == []
    assert universal.convert(saved) == folder
    assert program.calls == 1


def test_two_at_once_make_one_conversion(saved: Path, converter, monkeypatch: pytest.MonkeyPatch) -> None:
    program = converter()

    def slow(*arguments: Any, **keywords: Any) -> SimpleNamespace:
        done = program(*arguments, **keywords)
        time.sleep(0.3)
        return done

    monkeypatch.setattr(subprocess, "run", slow)
    with ThreadPoolExecutor() as pool:
        folders = list(pool.map(universal.convert, [saved, saved]))
    assert program.calls == 1
    assert folders[0] == folders[1]
    assert verify_manifest(folders[0]) is None
    assert sorted(path.name for path in saved.iterdir()) == [MANIFEST, "shard.pt"], "no lock is left behind"
    assert verify_manifest(saved) is None


def test_a_damaged_conversion_is_made_again(saved: Path, converter) -> None:
    program = converter()
    folder = universal.convert(saved)
    for damage in (b"shards of two ranks", b""):
        (folder / "zero" / "fp32.pt").write_bytes(damage)
        universal.convert(saved)
        assert verify_manifest(folder) is None
    (folder / MANIFEST).unlink()
    universal.convert(saved)
    assert program.calls == 4


def test_the_conversion_of_another_checkpoint_of_that_step_is_not_used(saved: Path, converter) -> None:
    """The run went back and saved the step again."""
    program = converter()
    folder = universal.convert(saved)
    (saved / "shard.pt").write_bytes(b"other shards")
    write_manifest(saved, step=4, world_size=2, global_batch=8)
    universal.convert(saved)
    assert (folder / "zero" / "fp32.pt").read_bytes() == b"OTHER SHARDS"
    assert program.calls == 2


def test_a_conversion_that_fails_says_what_was_tried(saved: Path, converter) -> None:
    converter(1, "OSError: [Errno 28] No space left on device")
    with pytest.raises(RunError) as caught:
        universal.convert(saved)
    said = str(caught.value)
    assert f"{saved} could not be converted for another number of ranks: OSError: [Errno 28] No space left" in said
    assert "go on with --num_gpus 2" in said
    assert f"Tried: cd {saved.parent} && {sys.executable} -m deepspeed.checkpoint.ds_to_universal --input_" in said
    # What is there of it is no conversion, and takes no room any longer.
    assert not (saved.parent / ".universal" / saved.name).exists()
    assert leftovers(saved.parent) == []
    converter()
    assert verify_manifest(universal.convert(saved)) is None


def test_a_folder_that_cannot_be_written(saved: Path, converter) -> None:
    converter()
    (saved.parent / ".universal").write_text("a file")
    with pytest.raises(RunError, match=r"could not be converted for another number of ranks: .*File exists"):
        universal.convert(saved)


def test_a_killed_conversion_is_cleared_away(saved: Path, converter) -> None:
    converter()
    left = saved.parent / ".universal" / f".partial-{saved.name}"
    (left / "tmp").mkdir(parents=True)
    assert leftovers(saved.parent) == [left]
    universal.convert(saved)
    assert not left.exists()
    shutil.rmtree(saved)
    assert leftovers(saved.parent) == [saved.parent / ".universal" / saved.name]


def test_the_program_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter runs beside the checkpoint, wherever the package was imported from."""
    monkeypatch.setenv("PYTHONPATH", "relative")
    environment = universal._environment()
    code = "import wmtp_ds; print(wmtp_ds.__file__)"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True)
    assert os.fsdecode(done.stdout).strip() == str(Path(universal.__file__).with_name("__init__.py"))
