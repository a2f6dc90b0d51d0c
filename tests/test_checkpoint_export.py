"""Exports of checkpoints: of the config that the run had, and made once."""

import hashlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from wmtp_ds import checkpoint_export
from wmtp_ds.checkpoint_export import export_beside, export_checkpoint
from wmtp_ds.checkpoint_files import write_manifest
from wmtp_ds.config import load_config
from wmtp_ds.errors import RunError


@pytest.fixture
def checkpoint(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whole, of a baseline's run; its shards are none."""
    monkeypatch.chdir(checkout)
    folder = tmp_path / "run" / "step_00000004"
    folder.mkdir(parents=True)
    resolved = load_config(Path("stage_configs/local/baseline.toml"), checks=False, environ={})
    (folder / "config.toml").write_text(resolved.toml())
    write_manifest(folder, step=4, world_size=2, global_batch=8)
    return folder


def test_variables_of_today_do_not_change_a_run_of_yesterday(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(_: Path) -> Path:
        raise RunError("it came to the shards")

    monkeypatch.setattr(checkpoint_export, "convert", convert)
    monkeypatch.setenv("WMTP_MODELS__POLICY__PATH", "gone")
    with pytest.raises(RunError, match="it came to the shards"):
        export_checkpoint(checkpoint, tmp_path / "export")


def test_two_at_once_make_one_export(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def slow(source: Path, final: Path, **_: Any) -> Path:
        made.append(source)
        shutil.rmtree(final, ignore_errors=True)
        time.sleep(0.3)
        final.mkdir()
        checksum = hashlib.sha256((source / "manifest.json").read_bytes()).hexdigest()
        (final / "metrics.json").write_text(json.dumps({"manifest": checksum}))
        return final

    monkeypatch.setattr(checkpoint_export, "_export", slow)
    with ThreadPoolExecutor() as pool:
        folders = list(pool.map(export_beside, [checkpoint, checkpoint]))
    assert made == [checkpoint]
    assert folders == [checkpoint.with_name("exported_step_00000004")] * 2
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["exported_step_00000004", checkpoint.name]
    export_beside(checkpoint)
    assert made == [checkpoint]
