"""A SQLite store, a real MLflow server, and a proxy before it that misbehaves as told."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow_server import PASSWORD, USER, FaultyProxy

from wmtp_ds import mlflow_client, tracking


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    """Defaults that MLflow's client needs are set in the process; each test gets its own."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AWS_"))]:
        monkeypatch.delenv(name)
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(tracking, "FLUSH_INTERVAL", 0.05)
    monkeypatch.setattr(tracking, "LONGEST_INTERVAL", 0.2)


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> str:
    """One SQLite store for all tests: its first opening takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    here = os.getcwd()
    os.chdir(Path(uri.removeprefix("sqlite:///")).parent)  # MLflow puts artifacts into the current folder
    try:
        mlflow_client.connect(uri).search_experiments()
    finally:
        os.chdir(here)
    return uri


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
