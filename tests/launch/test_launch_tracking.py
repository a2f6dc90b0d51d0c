"""Training tracked by a real MLflow server with passwords: `mlflow run`, the handoff, and a server that is slow."""

import json
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import REPOSITORY, run
from mlflow_server import PASSWORD, USER, FaultyProxy, MlflowServer
from ranks import run_ranks
from safetensors.torch import load_file

from wmtp_ds import mlflow_client

pytestmark = pytest.mark.launch

RANKS, STEPS = 4, 24
DELAY = 5.0  # seconds that the slow server takes for every answer
CREDENTIALS = {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}


@pytest.fixture(scope="module")
def client(mlflow_server: MlflowServer) -> Iterator[object]:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in CREDENTIALS.items():
            environment.setenv(name, value)
        yield mlflow_client.connect(mlflow_server.uri)


@dataclass
class Child:
    """A critic that `mlflow run` has trained, below a parent run."""

    parent: str
    experiment: str
    folder: Path
    said: str


@pytest.fixture(scope="module")
def critic(workspace: Path, mlflow_server: MlflowServer, client) -> Child:
    experiment = client.create_experiment("tracked")
    parent = client.create_run(experiment, run_name="parent").info.run_id
    (workspace / "MLproject").symlink_to(REPOSITORY / "MLproject")
    # Where it is tracked by itself, which must not matter under `mlflow run`.
    (workspace / "tracked-critic.toml").write_text(
        'extends = "stage_configs/local/critic.toml"\n'
        '[experiment]\nname = "tracked-critic"\nstage = "critic"\n'
        '[checkpoint]\nsave_dir = "tracked/critic"\n'
        "[training]\nmax_steps = 4\nlog_interval = 1\neval_interval = 4\n"
        "[data_sampling]\nn_samples = 32\n"
        f'[mlflow]\ntracking_uri = "sqlite:///never.db"\nparent_run_id = "{parent}"\n'
    )
    command = ["mlflow", "run", ".", "-e", "critic_training", "--env-manager=local", "--experiment-name", "tracked"]
    done = run(
        [*command, "-P", "config=tracked-critic.toml"],
        workspace,
        MLFLOW_TRACKING_URI=mlflow_server.uri,
        **CREDENTIALS,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return Child(parent, experiment, workspace / "tracked/critic", said)


def test_mlflow_run_makes_one_run_below_the_parent(critic: Child, client, workspace: Path) -> None:
    (tracked,) = client.search_runs([critic.experiment], f"tags.`mlflow.parentRunId` = '{critic.parent}'")
    assert json.loads((critic.folder / "run.json").read_text())["mlflow_run_id"] == tracked.info.run_id
    assert (tracked.info.status, tracked.info.run_name) == ("FINISHED", "tracked-critic")
    assert tracked.data.tags["mlflow.project.entryPoint"] == "critic_training"
    assert tracked.data.tags["stage"] == "critic"
    assert tracked.data.params["training.max_steps"] == "4"
    history = client.get_metric_history(tracked.info.run_id, "train/loss")
    assert [point.step for point in history] == [1, 2, 3, 4]
    assert {file.path for file in client.list_artifacts(tracked.info.run_id)} == {
        "config.toml",
        "checkpoints",
        "plots",
        "weights",
    }
    assert not (workspace / "never.db").exists()


@dataclass
class Slow:
    """A run whose server took five seconds for each answer while the loop ran."""

    folder: Path
    figures: dict[str, float]
    connections: list[list[int]]
    asked: int
    port: int


@pytest.fixture(scope="module")
def slow(critic: Child, workspace: Path, mlflow_server: MlflowServer, client) -> Slow:
    """`verifiable` on four ranks, its critic from the server."""
    proxy = FaultyProxy(mlflow_server.uri)
    out = workspace / "tracked"
    run_id = json.loads((critic.folder / "run.json").read_text())["mlflow_run_id"]
    job = {
        "stage": "verifiable",
        "config": "stage_configs/local/verifiable.toml",
        "override": [
            f'experiment.critic_checkpoint="mlflow://{critic.experiment}/{run_id}/artifacts/checkpoints"',
            'checkpoint.save_dir="tracked/verifiable"',
            "checkpoint.save_final=false",
            f"training.max_steps={STEPS}",
            "training.batch_size=1",
            "training.gradient_accumulation_steps=1",
            "training.log_interval=1",
            "training.eval_interval=12",
            "data_sampling.n_samples=96",
            f'mlflow.tracking_uri="{proxy.uri}"',
            'mlflow.experiment="tracked"',
            f'mlflow.parent_run_id="{critic.parent}"',
        ],
    }
    asked: list[int] = []
    over = threading.Event()

    def watch() -> None:
        for name, delay in (("begun-0", DELAY), ("ended-0.json", 0.0)):
            while not (out / name).exists() and not over.wait(0.02):
                pass
            proxy.delay = delay
            asked.append(proxy.requests)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        driver = Path(__file__).with_name("tracked_driver.py")
        done = run_ranks(driver, [str(out), json.dumps(job)], RANKS, workspace, **CREDENTIALS)
    finally:
        over.set()
        watcher.join()
        proxy.close()
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("done\n") >= RANKS
    figures = json.loads((out / "ended-0.json").read_text())
    connections = [json.loads((out / f"connected-{rank}.json").read_text()) for rank in range(RANKS)]
    return Slow(out / "verifiable", figures, connections, asked[1] - asked[0], urlsplit(proxy.uri).port or 0)


def test_the_loop_never_waits_for_a_server_that_takes_five_seconds(slow: Slow) -> None:
    """At most two percent of the loop's time is spent in the tracker, and the server was asked meanwhile."""
    assert slow.asked >= 1
    assert slow.figures["calls"] >= STEPS
    assert slow.figures["seconds"] <= 0.02 * slow.figures["loop"], slow.figures


def test_what_the_slow_server_was_told_is_complete(slow: Slow, critic: Child, client) -> None:
    run_id = json.loads((slow.folder / "run.json").read_text())["mlflow_run_id"]
    tracked = client.get_run(run_id)
    assert tracked.info.status == "FINISHED"
    assert tracked.data.tags["mlflow.parentRunId"] == critic.parent
    lines = [json.loads(line) for line in (slow.folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("train/loss", "td/mean", "val/loss"):
        wanted = [(line["step"], line["metrics"][name]) for line in lines if name in line["metrics"]]
        assert len(wanted) >= 2
        assert [(p.step, p.value) for p in client.get_metric_history(run_id, name)] == wanted


def test_the_pages_of_weights_are_on_the_server(slow: Slow, client, tmp_path: Path) -> None:
    """One for each evaluation, of four ranks, as they lie in the run's folder."""
    run_id = json.loads((slow.folder / "run.json").read_text())["mlflow_run_id"]
    listed = [file.path for file in client.list_artifacts(run_id, "weights")]
    assert listed == [f"weights/step_{step:08d}.{kind}" for step in (12, STEPS) for kind in ("html", "json")]
    for path in listed:
        fetched = Path(client.download_artifacts(run_id, path, str(tmp_path)))
        assert fetched.read_bytes() == (slow.folder / path).read_bytes()
    record = json.loads((slow.folder / listed[1]).read_text())
    assert record["solutions"] == RANKS
    assert sum(record["correct"]) + sum(record["incorrect"]) == record["tokens"] > 0


def test_the_other_ranks_never_talk_to_the_server(slow: Slow) -> None:
    talked = [slow.port in ports for ports in slow.connections]
    assert talked == [True] + [False] * (RANKS - 1)


def test_the_value_head_came_from_the_server(slow: Slow, critic: Child, workspace: Path) -> None:
    (fetched,) = (workspace / "tracked/.critics").rglob("value_head.safetensors")
    assert fetched.read_bytes() == (critic.folder / "checkpoint_best/value_head.safetensors").read_bytes()
    trained = load_file(slow.folder / "checkpoint_best/value_head.safetensors")
    assert trained.keys() == load_file(fetched).keys()


def test_the_password_is_nowhere(slow: Slow, critic: Child, mlflow_server: MlflowServer) -> None:
    """Checkpoints, exports, logs, and what the server keeps; its users' passwords are hashed."""
    places = [slow.folder, critic.folder, mlflow_server.folder]
    found = subprocess.run(["grep", "-rlF", PASSWORD, *map(str, places)], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, "")
    assert PASSWORD not in critic.said
