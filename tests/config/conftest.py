"""A small world on disk for configurations."""

from pathlib import Path

import pytest
from config_workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The small world, as the current directory."""
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)
