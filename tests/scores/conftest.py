"""A small checkout with finished reference scores."""

import os
import shutil
from pathlib import Path

import pytest
from score_checkout import work, write_rows

from wmtp_ds.models.micro import make_micro_models
from wmtp_ds.scores.scoring import Scoring

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs, data, models and finished scores; read only."""
    root = tmp_path_factory.mktemp("scores")
    for name in ("stage_configs", "ds_configs"):
        (root / name).symlink_to(REPOSITORY / name)
    data = root / "storage/data/sample"
    data.mkdir(parents=True)
    write_rows(data / "train.jsonl")
    write_rows(data / "validation.jsonl", 6, seed=1)
    models = root / "storage/models"
    policy, reference = models / "micro-policy", models / "micro-reference"
    # Few merges, so that solutions have many tokens.
    make_micro_models(
        data=data / "validation.jsonl", policy=policy, reference=reference, trunk_layers=1, vocab_size=300
    )
    before = Path.cwd()
    os.chdir(root)
    try:
        Scoring(work()).run()
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def here(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change; the current directory."""
    root = tmp_path / "checkout"
    shutil.copytree(prepared, root, symlinks=True, copy_function=shutil.copy2)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def there(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same to be read alone."""
    monkeypatch.chdir(prepared)
    return prepared
