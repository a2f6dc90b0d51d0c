"""What tracking costs a step whose server is good, slow or dead; and a server that is killed again and again."""

import json
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow_server import PASSWORD, USER, MlflowServer
from tracking_soak import soak

from wmtp_ds import mlflow_client
from wmtp_ds.tracking import start_tracking
from wmtp_ds.tracking_sync import sync_run

pytestmark = pytest.mark.soak


@pytest.mark.launch
def test_a_step_is_at_most_two_percent_slower(workspace: Path) -> None:
    found = soak(workspace, rounds=6, seconds=40, seed=0)
    print(json.dumps(found))
    noise = found["off again"]["typically_off_by"]
    for kind in ("good", "slow", "dead"):
        # What the tracker can cost at most, however busy the machine is with other things ...
        assert found[kind]["in_calls"] + found[kind]["thread"] <= 0.02, kind
        # ... and what the clock says, as far as it can be told from noise.
        assert found[kind]["slower"] <= 0.02 + noise, kind


def test_a_server_that_is_killed_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL, some seconds of nothing, and a new server on the same stores: MLflow ends with every point, once."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.setattr("wmtp_ds.tracking.FLUSH_INTERVAL", 0.05)
    monkeypatch.setattr("wmtp_ds.tracking.LONGEST_INTERVAL", 1.0)
    chance = random.Random(3)
    server = MlflowServer(tmp_path)
    server.start()
    steps = 0
    (tmp_path / "artifacts-to-send").mkdir()
    config = SimpleNamespace(tracking_uri=server.uri, experiment="e", s3_artifacts="", parent_run_id="")
    try:
        server.add_user(USER, PASSWORD)
        tracker = start_tracking(config, run_name="r", run_dir=tmp_path / "run", tags={"t": 1}, params={"a": 1})
        for kill in range(8):
            (tmp_path / "artifacts-to-send" / f"{kill}.bin").write_bytes(chance.randbytes(200_000))
            tracker.log_artifact(tmp_path / "artifacts-to-send" / f"{kill}.bin")
            until = time.monotonic() + chance.uniform(0.2, 3.0)
            while time.monotonic() < until:
                steps += 1
                tracker.log(steps, {"train/loss": 1.0 / steps, "optim/lr": 1e-4})
                time.sleep(0.002)
            server.kill()
            steps += 1
            tracker.log(steps, {"train/loss": 1.0 / steps, "optim/lr": 1e-4})
            server.start()
        if not tracker.finish():
            sync_run(tmp_path / "run")
        assert sync_run(tmp_path / "run").metric_points == 0
        client = mlflow_client.connect(server.uri)
        (run,) = client.search_runs([tracker.experiment_id])
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert sorted((p.step, p.value) for p in history) == [(s, 1.0 / s) for s in range(1, steps + 1)]
        assert [file.path for file in client.list_artifacts(run.info.run_id)] == [f"{kill}.bin" for kill in range(8)]
        assert (run.info.status, run.data.params, run.data.tags["t"]) == ("FINISHED", {"a": "1"}, "1")
    finally:
        server.kill()
