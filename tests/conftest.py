"""What several folders of tests share: a small checkout to run commands in."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow_server import MlflowServer

REPOSITORY = Path(__file__).resolve().parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:  # which shares this machine with other workers
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch would take all cores
    # What tests leave behind is looked for in a folder of the worker's own; sandboxes run in it as other users.
    _own = tempfile.TemporaryDirectory(prefix="tests-")
    Path(_own.name).chmod(0o1777)
    os.environ["TMPDIR"] = tempfile.tempdir = _own.name


# The files that take a minute and more, the longest first.
LONGEST = (
    "test_readme.py",
    "test_launch_signals.py",
    "test_launch_parity.py",
    "test_launch_tracking.py",
    "test_launch_bad_numbers.py",
    "test_launch_runs.py",
    "test_launch_ranks.py",
    "test_launch_slurm.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins early, so that no worker is left with it at the end."""

    def place(item: pytest.Item) -> int:
        if item.path.name in LONGEST:
            return LONGEST.index(item.path.name)
        return len(LONGEST) + (item.get_closest_marker("launch") is None)

    items.sort(key=place)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout, with the micro models and a little data, where the local configs are valid.

    Shared by all tests: only ``checkpoints/`` in it may be written to, and mlflow is best turned off.
    """
    from wmtp_ds.models.micro import make_micro_models

    root = tmp_path_factory.mktemp("checkout")
    for name in ("stage_configs", "ds_configs", "bin"):
        (root / name).symlink_to(REPOSITORY / name)
    data = root / "storage" / "data" / "sample"
    data.mkdir(parents=True)
    for name, count in (("train", 40), ("validation", 8)):
        rows = [
            {
                "problem_id": str(number // 2),
                "instruction": f"Add {number}.",
                "output": f"def f(x):\n    return x + {number}\n",
                "is_correct": number % 2 == 0,
                "difficulty": 1 + number % 11,
            }
            for number in range(count)
        ]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = root / "storage" / "models"
    make_micro_models(
        data=data / "train.jsonl",
        policy=models / "micro-policy",
        reference=models / "micro-reference",
        hidden_size=64,
        trunk_layers=1,
    )
    return root


@pytest.fixture
def own_variables() -> Iterator[None]:
    """Defaults that MLflow's client needs are set in the process; they go with the test."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of one SQLite store for all tests: its first opening takes seconds."""
    from wmtp_ds import mlflow_client

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    with contextlib.chdir(folder):  # MLflow puts artifacts into the current folder
        mlflow_client.connect(uri).search_experiments()
    return uri


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[MlflowServer]":
    """A real MLflow server with basic authentication, shared by all tests: it takes seconds to start."""
    from mlflow_server import PASSWORD, READER, READER_PASSWORD, USER, MlflowServer

    server = MlflowServer(tmp_path_factory.mktemp("mlflow-server"))
    try:
        server.start()
        server.add_user(USER, PASSWORD)
        server.add_user(READER, READER_PASSWORD)
        yield server
    finally:
        server.kill()


@pytest.fixture
def saved_figures(monkeypatch: pytest.MonkeyPatch) -> "list[Figure]":
    """The figures that matplotlib has saved; they stay readable after they are closed."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    original = Figure.savefig

    def savefig(self: Figure, *arguments: object, **keywords: object) -> None:
        figures.append(self)
        original(self, *arguments, **keywords)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures
