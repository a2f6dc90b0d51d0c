"""The tracker against a real MLflow server behind a proxy that fails in every way we could think of."""

import logging
import threading
import time
from types import SimpleNamespace

import pytest

from wmtp_ds import mlflow_client
from wmtp_ds.errors import RunError
from wmtp_ds.tracking import start_tracking
from wmtp_ds.tracking_sync import sync_run

STEPS = 300
FAULTS = ["500", "401", "400", "404", "garbage", "empty", "hang", "drop", "dead"]


def fail(proxy, fault):
    """From now on the server fails in this way; "ok" mends it."""
    if fault == "dead":  # nobody listens any more
        proxy.close()
        return
    if fault == "ok":
        proxy.close()
        proxy.open()
    proxy.mode = fault


@pytest.fixture
def config(proxy, tmp_path):
    return SimpleNamespace(tracking_uri=proxy.uri, experiment=tmp_path.name, s3_artifacts="", parent_run_id="")


@pytest.fixture
def client(server):
    return mlflow_client.connect(server)


def start(config, run_dir, **options):
    values = {"run_name": "a run", "run_dir": run_dir, "tags": {"t": 1}, "params": {"a": 1}} | options
    return start_tracking(config, **values)


def train(tracker, steps, pause=0.0):
    """Log like a training loop; returns the seconds that logging took in all, and the longest one."""
    total = longest = 0.0
    for step in steps:
        begin = time.perf_counter()
        tracker.log(step, {"train/loss": 1.0 / (step + 1), "optim/lr": 1e-4})
        took = time.perf_counter() - begin
        total, longest = total + took, max(longest, took)
        time.sleep(pause)
    return total, longest


def everything(client, points, run_id, steps):
    """Assert that MLflow has exactly what was logged: nothing lost, nothing twice."""
    assert points(client, run_id, "train/loss") == [(step, 1.0 / (step + 1)) for step in steps]
    assert points(client, run_id, "optim/lr") == [(step, 1e-4) for step in steps]
    run = client.get_run(run_id)
    assert run.data.params == {"a": "1"}
    assert run.data.tags["t"] == "1"
    assert len(client.search_runs([run.info.experiment_id])) == 1
    return run


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_is_wrong_from_the_start(fault, config, proxy, client, tmp_path, points, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    fail(proxy, fault)
    begin = time.monotonic()
    tracker = start(config, tmp_path / "run")
    assert time.monotonic() - begin < 0.5
    total, longest = train(tracker, range(STEPS), pause=0.001)
    assert total / STEPS < 0.01, "logging waits for the server"  # whose first answer takes a second, if any comes
    assert longest < 0.9
    begin = time.monotonic()
    assert not tracker.finish(timeout=4)
    assert time.monotonic() - begin < 6
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2, warnings  # one at the first failure, one at the end
    assert "Training goes on" in warnings[0]
    assert f"wmtp-ds track sync {tmp_path / 'run'}" in warnings[1]
    if fault == "401":
        assert "MLFLOW_TRACKING_PASSWORD" in warnings[0]
    fail(proxy, "ok")
    report = sync_run(tmp_path / "run")
    assert everything(client, points, report.run_id, range(STEPS)).info.status == "FINISHED"


@pytest.mark.parametrize("fault", ["500", "401", "404", "garbage", "400", "drop", "dead"])
def test_a_server_that_recovers_gets_it_all(fault, config, proxy, client, tmp_path, points, caplog):
    tracker = start(config, tmp_path / "run")
    assert tracker.wait_for_run_id(30)
    train(tracker, range(100))
    fail(proxy, fault)
    train(tracker, range(100, 200))
    while "Training goes on" not in caplog.text:
        time.sleep(0.01)
    fail(proxy, "ok")
    train(tracker, range(200, STEPS))
    assert tracker.finish()
    everything(client, points, tracker.run_id, range(STEPS))


def test_answers_that_are_lost_double_nothing(config, proxy, client, tmp_path, points):
    proxy.mode = "lose answers"
    tracker = start(config, tmp_path / "run")
    train(tracker, range(50))
    flips = threading.Event()

    def flip():
        while not flips.wait(0.02):
            proxy.mode = "ok" if proxy.mode == "lose answers" else "lose answers"

    flipping = threading.Thread(target=flip, daemon=True)
    flipping.start()
    train(tracker, range(50, STEPS), pause=0.005)
    flips.set()
    flipping.join()
    proxy.mode = "ok"
    assert tracker.finish()
    everything(client, points, tracker.run_id, range(STEPS))


def test_a_slow_server_slows_nothing(config, proxy, client, tmp_path, points):
    proxy.delay = 0.3
    tracker = start(config, tmp_path / "run")
    total, _ = train(tracker, range(STEPS), pause=0.001)
    assert total / STEPS < 0.01
    assert tracker.finish()  # waits as long as there is progress
    everything(client, points, tracker.run_id, range(STEPS))


def test_a_server_that_is_away(config, proxy, client, tmp_path, points):
    uri = config.tracking_uri
    config.tracking_uri = "http://127.0.0.1:9"
    tracker = start(config, tmp_path / "run")
    train(tracker, range(STEPS))
    begin = time.monotonic()
    assert tracker.wait_for_run_id(5) is None
    assert not tracker.finish(timeout=5)
    assert time.monotonic() - begin < 11
    with pytest.raises(RunError, match="did not take everything"):
        sync_run(tmp_path / "run", attempts=1)
    report = sync_run(tmp_path / "run", tracking_uri=uri)
    everything(client, points, report.run_id, range(STEPS))


@pytest.mark.parametrize("status", ["KILLED", "FAILED"])
def test_killed_and_failed_leave_within_the_time_given(status, config, proxy, tmp_path):
    """Also if the server makes progress all the time."""
    tracker = start(config, tmp_path / "run")
    assert tracker.wait_for_run_id(30)
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("x")
        tracker.log_artifact(tmp_path / f"{number}.txt")
    proxy.delay = 0.3
    train(tracker, range(10))
    begin = time.monotonic()
    assert not tracker.finish(status, timeout=1)
    assert time.monotonic() - begin < 2
    proxy.delay = 0.0
    assert sync_run(tmp_path / "run").status == status


def test_a_server_that_never_answers_is_waited_for_as_long_as_promised(config, proxy, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    tracker = start(config, tmp_path / "run")
    assert tracker.wait_for_run_id(30)
    proxy.mode = "hang"
    train(tracker, range(10))
    begin = time.monotonic()
    assert not tracker.finish(timeout=0.5)
    assert 0.4 < time.monotonic() - begin < 1.5
    proxy.mode = "ok"
    assert sync_run(tmp_path / "run").status == "FINISHED"


def test_a_full_artifact_store_holds_back_no_metric(config, proxy, client, tmp_path, points):
    proxy.mode = "no artifacts"
    (tmp_path / "run" / "best").mkdir(parents=True)
    for name in ("a.txt", "b.txt"):
        (tmp_path / "run" / "best" / name).write_text(name)
    tracker = start(config, tmp_path / "run")
    tracker.log_artifact(tmp_path / "run" / "best", "checkpoints")
    train(tracker, range(STEPS))
    assert not tracker.finish(timeout=5)
    assert everything(client, points, tracker.run_id, range(STEPS)).info.status == "FINISHED"
    with pytest.raises(RunError, match="Nothing is lost"):
        sync_run(tmp_path / "run", attempts=1)
    proxy.mode = "ok"
    assert sync_run(tmp_path / "run").artifact_files == 2
    everything(client, points, tracker.run_id, range(STEPS))
    listed = client.list_artifacts(tracker.run_id, "checkpoints/best")
    assert [file.path for file in listed] == ["checkpoints/best/a.txt", "checkpoints/best/b.txt"]
