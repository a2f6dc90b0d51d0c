"""The tracker and the handoff against MLflow's basic authentication: right and wrong passwords, and no permission."""

import logging
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import torch
from mlflow_server import PASSWORD, READER, READER_PASSWORD, USER

from wmtp_ds import mlflow_client
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.handoff import load_value_head, locate_critic, save_value_head
from wmtp_ds.tracking import start_tracking
from wmtp_ds.tracking_state import TrackingState
from wmtp_ds.tracking_sync import sync_run

WRONG = "wr0ng pa/ssword"
STEPS = range(20)


@pytest.fixture
def config(server, tmp_path):
    return SimpleNamespace(tracking_uri=server, experiment=tmp_path.name, s3_artifacts="", parent_run_id="")


@pytest.fixture
def critic(tmp_path):
    """A ``checkpoint_best`` as a critic exports it."""
    tensors = {"norm.weight": torch.ones(4), "output.weight": torch.rand(1, 4), "output.bias": torch.zeros(1)}
    facts = {"hidden_size": 4, "type": "linear", "activation": "sigmoid", "trunk_fingerprint": "ab"}
    save_value_head(tmp_path / "run" / "checkpoint_best" / "value_head.safetensors", tensors, **facts)
    return tmp_path / "run" / "checkpoint_best"


def train(config, run_dir, critic):
    """A run of twenty steps with all that can be tracked, up to its end."""
    tracker = start_tracking(config, run_name="a run", run_dir=run_dir, tags={"stage": "critic"}, params={"a.b": 1})
    for step in STEPS:
        tracker.log(step, {"train/loss": 1.0 / (step + 1), "optim/lr": 1e-4})
    tracker.log_artifact(critic, "checkpoints")
    tracker.set_tags({"note": "later"})
    return tracker


def everything(client, points, run_id):
    """Assert that MLflow has exactly what was logged, once."""
    run = client.get_run(run_id)
    assert points(client, run_id, "train/loss") == [(step, 1.0 / (step + 1)) for step in STEPS]
    assert points(client, run_id, "optim/lr") == [(step, 1e-4) for step in STEPS]
    assert run.data.params == {"a.b": "1"}
    assert {"stage": "critic", "note": "later"}.items() <= run.data.tags.items()
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a run")
    (folder,) = client.list_artifacts(run_id)
    (best,) = client.list_artifacts(run_id, folder.path)
    assert [file.path for file in client.list_artifacts(run_id, best.path)] == [
        "checkpoints/checkpoint_best/value_head.safetensors"
    ]
    assert len(client.search_runs([run.info.experiment_id])) == 1


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def written(folder: Path) -> str:
    """All that lies in a folder, as text."""
    return "".join(path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file())


def test_a_run_and_its_handoff_with_the_right_password(config, server, critic, tmp_path, points, caplog):
    caplog.set_level(logging.DEBUG)
    tracker = train(config, tmp_path / "run", critic)
    assert tracker.finish()
    client = mlflow_client.connect(server)
    everything(client, points, tracker.run_id)
    assert warnings(caplog) == []
    found = locate_critic(
        f"runs:/{tracker.run_id}/checkpoints/checkpoint_best", tracking_uri=server, cache_dir=tmp_path / "cache"
    )
    weights = load_value_head(critic / "value_head.safetensors").state_dict["output.weight"]
    assert torch.equal(load_value_head(found).state_dict["output.weight"], weights)
    assert PASSWORD not in caplog.text + written(tmp_path / "run") + str(client.get_run(tracker.run_id).to_dictionary())


def test_a_wrong_password_is_one_warning_and_sync_completes_the_run(
    config, server, critic, tmp_path, points, caplog, monkeypatch
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", WRONG)
    tracker = train(config, tmp_path / "run", critic)
    assert not tracker.finish(timeout=10)
    first, last = warnings(caplog)
    assert "401" in first
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in first
    assert "Training goes on" in first
    assert f"wmtp-ds track sync {tmp_path / 'run'}" in last
    with pytest.raises(RunError, match=r"401(.|\n)*MLFLOW_TRACKING_PASSWORD(.|\n)*Nothing is lost"):
        sync_run(tmp_path / "run", attempts=1)
    uri = "runs:/0123abcd/checkpoints"
    with pytest.raises(UserError, match=r"401.*MLFLOW_TRACKING_PASSWORD"):
        locate_critic(uri, tracking_uri=server, cache_dir=tmp_path / "cache")

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    report = sync_run(tmp_path / "run")
    client = mlflow_client.connect(server)
    everything(client, points, report.run_id)
    assert (report.metric_points, report.artifact_files, report.metric_lines) == (40, 1, 20)
    again = sync_run(tmp_path / "run")
    assert (again.run_id, again.metric_points, again.artifact_files) == (report.run_id, 0, 0)
    # The cursor is lost, as after a kill between MLflow's answer and its being noted: all of it is sent again.
    state = TrackingState.load(tmp_path / "run")
    state.sent_bytes = state.sent_lines = 0
    state.unsent_params, state.unsent_tags = list(state.params), list(state.tags)
    state.artifacts[0].sent, state.artifacts[0].done = False, {}
    state.save(tmp_path / "run")
    assert sync_run(tmp_path / "run").metric_points == 40
    everything(client, points, report.run_id)
    for secret in (WRONG, PASSWORD):
        assert secret not in caplog.text + written(tmp_path / "run")


def test_a_password_that_changes_while_training(config, server, critic, tmp_path, points, caplog, monkeypatch):
    tracker = start_tracking(config, run_name="a run", run_dir=tmp_path / "run", tags={}, params={})
    assert tracker.wait_for_run_id(30)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", WRONG)
    tracker.log(1, {"a": 1.0})
    assert not tracker.finish(timeout=10)
    assert "401" in warnings(caplog)[0]
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    assert sync_run(tmp_path / "run").run_id == tracker.run_id
    assert points(mlflow_client.connect(server), tracker.run_id, "a") == [(1, 1.0)]


def test_a_user_who_may_only_read(config, server, critic, tmp_path, points, caplog, monkeypatch):
    assert train(config, tmp_path / "first", critic).finish()  # makes the experiment, whose owner its maker is
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", READER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", READER_PASSWORD)
    tracker = start_tracking(config, run_name="a run", run_dir=tmp_path / "run", tags={}, params={})
    tracker.log(1, {"a": 1.0})
    assert not tracker.finish(timeout=10)
    assert "MLFLOW_TRACKING_USERNAME" in warnings(caplog)[0]
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    assert points(mlflow_client.connect(server), sync_run(tmp_path / "run").run_id, "a") == [(1, 1.0)]


def test_credentials_in_the_uri_work_and_stay_secret(config, server, critic, tmp_path, points, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name)
    encoded = quote(PASSWORD, safe="")
    config.tracking_uri = server.replace("http://", f"http://{USER}:{encoded}@")
    tracker = train(config, tmp_path / "run", critic)
    assert tracker.finish()
    client = mlflow_client.connect(server)
    everything(client, points, tracker.run_id)
    told = caplog.text + written(tmp_path / "run") + str(client.get_run(tracker.run_id).to_dictionary())
    assert PASSWORD not in told
    assert encoded not in told
    # Later, in another shell: the stored address asks for the credentials, the environment has them.
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name)
    state = TrackingState.load(tmp_path / "run")
    assert state.tracking_uri == server
    state.sent_bytes = 0
    state.save(tmp_path / "run")
    with pytest.raises(RunError, match="MLFLOW_TRACKING_PASSWORD"):
        sync_run(tmp_path / "run", attempts=1)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    sync_run(tmp_path / "run")
    everything(client, points, tracker.run_id)


def test_a_run_that_is_gone_names_the_mend(config, server, critic, tmp_path, points):
    """This server answers 403 for a run that it does not have, as it does for one that the user may not see."""
    tracker = train(config, tmp_path / "run", critic)
    assert tracker.finish()
    state = TrackingState.load(tmp_path / "run")
    state.run_id, state.sent_bytes = "f" * 32, 0
    state.save(tmp_path / "run")
    with pytest.raises(RunError, match=r"has no run ffff.*(.|\n)*--new-run"):
        sync_run(tmp_path / "run", attempts=1)
    again = sync_run(tmp_path / "run", new_run=True).run_id
    assert len(points(mlflow_client.connect(server), again, "train/loss")) == len(STEPS)


def test_parent_and_child(config, server, critic, tmp_path):
    client = mlflow_client.connect(server)
    experiment = client.create_experiment(config.experiment)
    parent = client.create_run(experiment, run_name="parent").info.run_id
    config.parent_run_id = parent
    tracker = train(config, tmp_path / "run", critic)
    assert tracker.finish()
    (child,) = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert child.info.run_id == tracker.run_id


def test_a_token_in_the_git_remote_that_mlflow_run_has_tagged(config, server, tmp_path, monkeypatch):
    """`mlflow run` makes its run with the address of the remote as it is."""
    client = mlflow_client.connect(server)
    tags = {"mlflow.source.git.repoURL": "https://me:ghp_t0ken@example.org/x.git", "mlflow.project.entryPoint": "x"}
    outer = client.create_run(client.create_experiment(config.experiment), tags=tags).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", outer)
    tracker = start_tracking(config, run_name="a run", run_dir=tmp_path / "run", tags={}, params={})
    assert tracker.finish()
    found = client.get_run(outer).data.tags
    assert found["mlflow.source.git.repoURL"] == "https://***@example.org/x.git"
    assert found["mlflow.project.entryPoint"] == "x"
