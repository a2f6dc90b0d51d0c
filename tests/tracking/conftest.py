"""A real MLflow server, and a proxy before it that misbehaves as told."""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from mlflow_server import PASSWORD, USER, FaultyProxy

from wmtp_ds import mlflow_client, tracking


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, own_variables):
    """Each test begins without a server's variables."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AWS_"))]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(tracking, "FLUSH_INTERVAL", 0.05)
    monkeypatch.setattr(tracking, "LONGEST_INTERVAL", 0.2)


@pytest.fixture
def client(store):
    return mlflow_client.connect(store)


@pytest.fixture
def config(store, tmp_path):
    """An ``mlflow`` table with an experiment of its own, whose artifacts lie in ``tmp_path``."""
    return SimpleNamespace(
        tracking_uri=store,
        experiment=tmp_path.name,
        s3_artifacts=f"file://{tmp_path}/artifacts",
        parent_run_id="",
    )


@pytest.fixture
def server(mlflow_server, monkeypatch, _own_environment) -> str:
    """The address of a real MLflow server, with a user's name and password in the environment."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    return mlflow_server.uri


@pytest.fixture
def proxy(server) -> Iterator[FaultyProxy]:
    faulty = FaultyProxy(server)
    yield faulty
    faulty.close()


def points(client, run_id: str, name: str) -> list[tuple[int, float]]:
    """Every (step, value) of a metric that MLflow has, duplicates and all."""
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


@pytest.fixture(name="points")
def _points_fixture():
    return points
