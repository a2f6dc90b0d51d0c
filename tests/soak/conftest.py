"""The workspace of the launch tests."""

from pathlib import Path

import pytest
from conftest import make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout with the micro models and small data in it."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))
