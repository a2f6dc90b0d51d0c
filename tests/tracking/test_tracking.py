"""The tracker against a real SQLite store: what MLflow ends up with, resumes, secrets, full disks."""

import errno
import json
import logging
import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from wmtp_ds import tracking_state
from wmtp_ds.cli.track import track
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.plots import read_series
from wmtp_ds.tracking import NullTracker, git_state, start_tracking
from wmtp_ds.tracking_sender import metric_key
from wmtp_ds.tracking_state import (
    Journal,
    MetricLine,
    TrackingState,
    decode_line,
    encode_line,
    files_below,
    read_chunk,
    read_metrics,
)
from wmtp_ds.tracking_sync import sync_run


def start(config, run_dir, **options):
    values = {"run_name": "a run", "run_dir": run_dir, "tags": {}, "params": {}} | options
    return start_tracking(config, **values)


def logged(tracker, steps, name="train/loss"):
    for step in steps:
        tracker.log(step, {name: 1.0 / (step + 1)})


def losses(steps):
    return [(step, 1.0 / (step + 1)) for step in steps]


# The whole way


def test_a_run_reaches_mlflow(config, client, tmp_path, points):
    tracker = start(
        config,
        tmp_path / "run",
        tags={"stage": "critic", "world_size": 2},
        params={"training.learning_rate": 1e-4, "data.bins": [1, 2], "x.flag": True, "x.none": None},
    )
    for step in range(30):
        tracker.log(step, {"train/loss": 2.0 - step / 100, "optim/grad_norm": float(step)})
    tracker.set_tags({"note": "later"})
    folder = tmp_path / "checkpoint_best"
    (folder / "deep").mkdir(parents=True)
    (folder / "value_head.safetensors").write_bytes(b"weights")
    (folder / "deep" / "metrics.json").write_text("{}")
    config_file = tmp_path / "config.toml"
    config_file.write_text("x = 1")
    tracker.log_artifact(folder, "checkpoints")
    tracker.log_artifact(config_file)
    assert tracker.finish("FINISHED")

    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a run"
    assert client.get_experiment(run.info.experiment_id).name == config.experiment
    assert run.data.params == {
        "training.learning_rate": "0.0001",
        "data.bins": "[1, 2]",
        "x.flag": "true",
        "x.none": "",
    }
    assert {"stage": "critic", "world_size": "2", "note": "later"}.items() <= run.data.tags.items()
    assert points(client, tracker.run_id, "train/loss") == [(step, 2.0 - step / 100) for step in range(30)]
    assert len(points(client, tracker.run_id, "optim/grad_norm")) == 30
    listed = [file.path for file in client.list_artifacts(tracker.run_id, "checkpoints/checkpoint_best")]
    assert listed == [
        "checkpoints/checkpoint_best/deep",
        "checkpoints/checkpoint_best/value_head.safetensors",
    ]
    copy = client.download_artifacts(
        tracker.run_id, "checkpoints/checkpoint_best/value_head.safetensors", str(tmp_path)
    )
    assert Path(copy).read_bytes() == b"weights"
    assert [f.path for f in client.list_artifacts(tracker.run_id) if not f.is_dir] == ["config.toml"]


def test_numbers_that_are_none_arrive(config, client, tmp_path, caplog):
    tracker = start(config, tmp_path / "run")
    tracker.log(1, {"nan": math.nan, "inf": math.inf, "low": -math.inf, "whole": 3, "text": "seven"})
    assert tracker.finish()
    metrics = client.get_run(tracker.run_id).data.metrics
    assert math.isnan(metrics["nan"])
    assert metrics["inf"] == sys.float_info.max
    assert metrics["low"] == -sys.float_info.max
    assert metrics["whole"] == 3.0
    assert "text" not in metrics
    assert "text is no number" in caplog.text
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["metrics"] == {"nan": "nan", "inf": "inf", "low": "-inf", "whole": 3.0}
    values = read_metrics(tmp_path / "run" / "metrics.jsonl")[1]
    assert math.isnan(values["nan"])
    assert values["inf"] == math.inf


def test_names_and_values_are_cut_to_the_limits(config, client, tmp_path):
    long_key = "k" * 400
    tracker = start(config, tmp_path / "run", params={"long": "é" * 9000, long_key: 1}, tags={"long": "t" * 9000})
    tracker.log(0, {"odd/näme[0]": 1.0, "../up": 2.0, "m" * 400: 3.0})
    assert tracker.finish()
    data = client.get_run(tracker.run_id).data
    assert data.params["long"] == "é" * 6000
    assert data.params["k" * 250] == "1"
    assert len(data.tags["long"]) == 8000
    assert data.metrics == {"odd/n_me_0_": 1.0, "up": 2.0, "m" * 250: 3.0}


@pytest.mark.parametrize(
    ("name", "key"), [("", "_"), ("a//b", "a/b"), ("/a", "a"), ("./..", "_"), ("td/mean k:1", "td/mean k:1")]
)
def test_metric_keys(name, key):
    assert metric_key(name) == key


def test_many_points_go_in_batches(config, client, tmp_path, points):
    tracker = start(config, tmp_path / "run")
    for step in range(60):
        tracker.log(step, {f"layer/{i}": float(i) for i in range(50)})
    tracker.log(60, {f"wide/{i}": float(i) for i in range(1500)})
    assert tracker.finish()
    assert points(client, tracker.run_id, "layer/49") == [(step, 49.0) for step in range(60)]
    assert points(client, tracker.run_id, "wide/1499") == [(60, 1499.0)]


def test_a_child_run_and_the_experiments_artifact_location(config, client, tmp_path):
    config.parent_run_id = "0123456789abcdef0123456789abcdef"
    config.s3_artifacts = "s3://bucket/prefix"
    tracker = start(config, tmp_path / "run")
    assert tracker.wait_for_run_id(30) is not None
    assert tracker.finish()
    run = client.get_run(tracker.run_id)
    assert run.data.tags["mlflow.parentRunId"] == config.parent_run_id
    assert client.get_experiment(run.info.experiment_id).artifact_location == "s3://bucket/prefix"


def test_another_artifact_location_is_warned_about(config, client, tmp_path, caplog):
    assert start(config, tmp_path / "one").finish()
    config.s3_artifacts = "s3://elsewhere"
    assert start(config, tmp_path / "two").finish()
    assert "mlflow.s3_artifacts = 's3://elsewhere' has no effect" in caplog.text


def test_the_run_of_mlflow_run_is_used(config, client, store, tmp_path, monkeypatch, points):
    experiment_id = client.create_experiment(config.experiment, artifact_location=config.s3_artifacts)
    outer = client.create_run(experiment_id, run_name="given by mlflow run")
    client.log_param(outer.info.run_id, "config", "x.toml")
    monkeypatch.setenv("MLFLOW_RUN_ID", outer.info.run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    config.tracking_uri = "sqlite:////nowhere/else.db"
    tracker = start(config, tmp_path / "run", params={"config": "x.toml", "a.b": 1})
    logged(tracker, range(3))
    assert tracker.finish()
    assert tracker.run_id == outer.info.run_id
    run = client.get_run(outer.info.run_id)
    assert run.info.run_name == "a run"
    assert run.data.params == {"config": "x.toml", "a.b": "1"}
    assert points(client, tracker.run_id, "train/loss") == losses(range(3))


def test_tracking_off_writes_the_file_alone_and_can_be_sent_later(config, client, store, tmp_path, points):
    config.tracking_uri = ""
    tracker = start(config, tmp_path / "run", params={"a": 1})
    assert isinstance(tracker, NullTracker)
    logged(tracker, range(5))
    tracker.log_artifact(tmp_path / "run" / "nothing.txt")
    assert tracker.run_id is None
    assert tracker.wait_for_run_id() is None
    assert tracker.finish()
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == {s: {"train/loss": v} for s, v in losses(range(5))}
    with pytest.raises(UserError, match=r"trained with tracking off(.|\n)*--tracking-uri"):
        sync_run(tmp_path / "run")
    report = sync_run(tmp_path / "run", tracking_uri=store)
    assert points(client, report.run_id, "train/loss") == losses(range(5))
    assert client.get_run(report.run_id).data.params == {"a": "1"}
    assert report.missing_artifacts == [str(tmp_path / "run" / "nothing.txt")]


def test_tracking_off_imports_no_mlflow(tmp_path):
    program = """
        import sys
        from pathlib import Path
        from types import SimpleNamespace
        from wmtp_ds.tracking import start_tracking
        import wmtp_ds.cli.track, wmtp_ds.handoff, wmtp_ds.early_stopping
        config = SimpleNamespace(tracking_uri="", experiment="e", s3_artifacts="", parent_run_id="")
        tracker = start_tracking(config, run_name="r", run_dir=Path(sys.argv[1]), tags={}, params={})
        tracker.log(1, {"a": 1.0})
        tracker.finish()
        assert not {"mlflow", "torch", "transformers"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), tmp_path / "run"], check=True)


def test_the_default_store_is_made_quietly(tmp_path):
    program = """
        import logging
        from pathlib import Path
        from types import SimpleNamespace
        from wmtp_ds.tracking import start_tracking
        logging.basicConfig(level=logging.INFO)
        uri = "sqlite:///deep/er/mlflow.db"
        config = SimpleNamespace(tracking_uri=uri, experiment="e", s3_artifacts="", parent_run_id="")
        tracker = start_tracking(config, run_name="r", run_dir=Path("run"), tags={}, params={})
        tracker.log(1, {"a": 1.0})
        assert tracker.finish(timeout=60)
    """
    environment = {**os.environ, "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (tmp_path / "deep" / "er" / "mlflow.db").exists()
    state = TrackingState.load(tmp_path / "run")
    assert state.tracking_uri == f"sqlite:///{tmp_path}/deep/er/mlflow.db"  # so that sync works from any folder


# Resume


def test_resume_goes_on_with_the_run(config, client, tmp_path, points, caplog):
    first = start(config, tmp_path / "run", params={"lr": 0.1, "seed": 1})
    logged(first, range(5))
    first.finish("KILLED")
    caplog.clear()
    second = start(config, tmp_path / "run", params={"lr": 0.2, "seed": 1, "new": 2}, resume_run_id=first.run_id)
    logged(second, range(5, 8))
    assert second.wait_for_run_id() == first.run_id
    assert second.finish()
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1", "seed": "1", "new": "2"}
    assert run.data.tags["resumed.lr"] == "0.2"
    assert "resumed.seed" not in run.data.tags
    assert "logged as tags resumed.*: lr" in caplog.text
    assert points(client, first.run_id, "train/loss") == losses(range(8))
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_a_step_that_is_computed_again_is_not_sent_twice(config, client, tmp_path, points):
    first = start(config, tmp_path / "run")
    logged(first, range(10))
    first.log(8, {"perf/step_time": 1.0})
    first.finish("KILLED")
    second = start(config, tmp_path / "run", resume_run_id=first.run_id)
    second.go_back(5)
    logged(second, range(6, 12))
    second.log(8, {"perf/step_time": 2.0, "val/loss": math.nan})
    second.finish("KILLED")
    third = start(config, tmp_path / "run", resume_run_id=first.run_id)
    third.go_back(7)
    logged(third, range(8, 13))
    third.log(8, {"val/loss": math.nan})
    assert third.finish()
    assert points(client, first.run_id, "train/loss") == losses(range(13))
    assert points(client, first.run_id, "perf/step_time") == [(8, 1.0), (8, 2.0)]
    assert len(points(client, first.run_id, "val/loss")) == 1
    assert "perf/step_time" not in read_metrics(tmp_path / "run" / "metrics.jsonl")[8]
    assert client.get_run(first.run_id).data.tags["attempts"] == "3"


def test_a_rollback_is_told_apart_and_the_last_value_counts(config, client, tmp_path, points):
    """Steps 1 to 6; a spike; back to 3, whereupon step 5 is passed over; then back to 4, by a kill."""
    run_dir, file = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    tracker = start(config, run_dir, params={"a": 1})
    logged(tracker, range(1, 7))
    tracker.log(6, {"val/loss": 9.0})
    tracker.go_back(3)
    assert sorted(read_metrics(file)) == [1, 2, 3]
    logged(tracker, [4])
    tracker.log(6, {"train/loss": 0.1})
    tracker.log(7, {"train/loss": 0.2})
    assert tracker.finish("KILLED")
    tracker = start(config, run_dir, resume_run_id=tracker.run_id)
    tracker.go_back(4)
    tracker.log(6, {"train/loss": 0.1})
    tracker.log(7, {"train/loss": 0.3})
    assert tracker.finish()

    lines = [json.loads(line) for line in file.read_text().splitlines()]
    told = [(line["step"], line.get("attempt", 1), bool(line["metrics"]), "replayed" in line) for line in lines]
    assert told == [
        *((step, 1, True, False) for step in (1, 2, 3, 4, 5, 6, 6)),
        *((3, 2, False, False), (4, 2, True, True), (6, 2, True, False), (7, 2, True, False)),
        *((4, 3, False, False), (6, 3, True, True), (7, 3, True, False)),
    ]
    course = dict(losses(range(1, 5))) | {6: 0.1, 7: 0.3}
    assert read_metrics(file) == {step: {"train/loss": loss} for step, loss in course.items()}
    assert read_series(file, "train/loss") == (list(course), list(course.values()))
    assert read_series(file, "val/loss") == ([], [])

    def last_values():
        history = sorted(client.get_metric_history(tracker.run_id, "train/loss"), key=lambda point: point.timestamp)
        return {point.step: point.value for point in history}

    sent = points(client, tracker.run_id, "train/loss")
    assert sent == sorted([*losses(range(1, 7)), (6, 0.1), (7, 0.2), (7, 0.3)]), "each value once"
    # Nothing can be taken back in MLflow: what was passed over stays.
    assert last_values() == course | {5: 1 / 6}
    run = client.get_run(tracker.run_id)
    assert run.data.metrics["train/loss"] == 0.3
    assert run.data.tags["attempts"] == "3"
    # Sync adds nothing, not even from the beginning; and as a new run it makes the same again.
    assert sync_run(run_dir).metric_points == 0
    state = TrackingState.load(run_dir)
    state.sent_bytes = state.sent_lines = 0
    state.save(run_dir)
    sync_run(run_dir)
    assert points(client, tracker.run_id, "train/loss") == sent
    assert points(client, sync_run(run_dir, new_run=True).run_id, "train/loss") == sent


def test_a_resume_where_the_run_stopped_is_no_new_attempt(config, client, tmp_path):
    first = start(config, tmp_path / "run")
    logged(first, range(1, 4))
    first.finish("KILLED")
    second = start(config, tmp_path / "run", resume_run_id=first.run_id)
    second.go_back(3)
    logged(second, range(4, 6))
    assert second.finish()
    assert "attempt" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "attempts" not in client.get_run(first.run_id).data.tags


def test_a_value_that_comes_back_is_sent_again(config, client, tmp_path):
    """MLflow has 1.0 and then 2.0: the 1.0 of a third attempt is not the one that it had first."""
    tracker = start(config, tmp_path / "run")
    for value in (1.0, 2.0, 1.0):
        tracker.go_back(3)
        tracker.log(4, {"a": value})
        time.sleep(0.002)
    for value in (1.0, 3.0, 1.0):  # within one attempt, too
        tracker.log(4, {"a": value})
        time.sleep(0.002)
    assert tracker.finish()
    history = sorted(client.get_metric_history(tracker.run_id, "a"), key=lambda point: point.timestamp)
    assert [point.value for point in history] == [1.0, 2.0, 1.0, 3.0, 1.0]


def test_a_clock_that_goes_back_does_not_bring_old_values_back(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    late = time.time_ns() // 1_000_000 + 10**9
    journal.append(4, {"a": 1.0}, time_ms=late)
    assert journal.go_back(3) == 2
    journal.append(4, {"a": 2.0})
    _, _, line = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert decode_line(line).time_ms > late


def test_going_back_while_the_disk_is_full(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append(1, {"a": 1.0})

    def no_room(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(tracking_state.os, "write", no_room)
        journal.append(2, {"a": 2.0})
        assert journal.go_back(1) == 2
    journal.append(2, {"a": 3.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == {1: {"a": 1.0}, 2: {"a": 3.0}}


def test_a_resume_elsewhere_continues_the_run_too(config, client, tmp_path, points):
    first = start(config, tmp_path / "one")
    logged(first, range(3))
    first.finish("FAILED")
    second = start(config, tmp_path / "two", resume_run_id=first.run_id)
    logged(second, range(3, 5))
    assert second.finish()
    assert second.run_id == first.run_id
    assert points(client, first.run_id, "train/loss") == losses(range(5))


def test_a_run_that_no_server_made_resumes_without_an_id(config, client, tmp_path, points):
    good = config.tracking_uri
    config.tracking_uri = "http://127.0.0.1:9"  # nobody listens on the discard port
    first = start(config, tmp_path / "run", params={"a": 1})
    logged(first, range(4))
    assert not first.finish("KILLED", timeout=5)
    config.tracking_uri = good
    second = start(config, tmp_path / "run", params={"a": 1}, resume=True)
    logged(second, range(4, 6))
    assert second.finish()
    assert points(client, second.run_id, "train/loss") == losses(range(6))


def test_a_new_run_in_an_old_directory_keeps_the_old_files(config, client, tmp_path, points):
    first = start(config, tmp_path / "run")
    logged(first, range(3))
    first.finish()
    second = start(config, tmp_path / "run")
    logged(second, range(2))
    assert second.finish()
    assert second.run_id != first.run_id
    assert points(client, second.run_id, "train/loss") == losses(range(2))
    assert len(read_metrics(tmp_path / "run" / "previous" / "001" / "metrics.jsonl")) == 3
    assert sync_run(tmp_path / "run" / "previous" / "001").run_id == first.run_id


def test_a_damaged_state_does_not_stop_a_resume(config, client, tmp_path, points, caplog):
    first = start(config, tmp_path / "run")
    logged(first, range(3))
    first.finish()
    (tmp_path / "run" / "tracking.json").write_text('{"version": 1, "experi')
    with pytest.raises(UserError, match=r"tracking\.json is damaged"):
        sync_run(tmp_path / "run")
    second = start(config, tmp_path / "run", resume_run_id=first.run_id)
    logged(second, range(3, 4))
    assert second.finish()
    assert points(client, first.run_id, "train/loss") == losses(range(4))
    assert "is damaged" in caplog.text


# A kill, and sync


def killed_run(config, run_dir, steps=40):
    """Train in another process, which dies without a word once MLflow has the run."""
    program = """
        import os, sys
        from pathlib import Path
        from types import SimpleNamespace
        from wmtp_ds import tracking
        tracking.FLUSH_INTERVAL = 0.01
        uri, experiment, artifacts, run_dir, steps = sys.argv[1:]
        config = SimpleNamespace(
            tracking_uri=uri, experiment=experiment, s3_artifacts=artifacts, parent_run_id=""
        )
        tracker = tracking.start_tracking(
            config, run_name="r", run_dir=Path(run_dir), tags={}, params={"a": 1}
        )
        for step in range(int(steps)):
            tracker.log(step, {"train/loss": 1.0 / (step + 1)})
            if step == 20:
                assert tracker.wait_for_run_id(60)
        os._exit(9)
    """
    arguments = [config.tracking_uri, config.experiment, config.s3_artifacts, str(run_dir), str(steps)]
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program), *arguments])
    assert result.returncode == 9


def test_sync_completes_a_killed_run_and_twice_is_once(config, client, tmp_path, points):
    killed_run(config, tmp_path / "run")
    report = sync_run(tmp_path / "run")
    run = client.get_run(report.run_id)
    assert run.info.status == "KILLED"
    assert points(client, report.run_id, "train/loss") == losses(range(40))
    again = sync_run(tmp_path / "run")
    assert (again.metric_points, again.metric_lines) == (0, 40)
    # Even when the cursor is lost: the kill came after MLflow had taken the points.
    state = TrackingState.load(tmp_path / "run")
    state.sent_bytes = state.sent_lines = 0
    state.unsent_params = ["a"]
    state.save(tmp_path / "run")
    assert sync_run(tmp_path / "run").metric_points == 40
    assert points(client, report.run_id, "train/loss") == losses(range(40))
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_sync_leaves_a_living_run_alone(config, tmp_path):
    tracker = start(config, tmp_path / "run")
    with pytest.raises(RunError, match=rf"still going on \(process {os.getpid()}\)"):
        sync_run(tmp_path / "run")
    tracker.finish()
    sync_run(tmp_path / "run")


def test_a_second_trainer_in_the_directory_is_warned_about(config, tmp_path, caplog):
    first = start(config, tmp_path / "run")
    second = start(config, tmp_path / "run", resume=True)
    assert "is in use" in caplog.text
    second.finish()
    first.finish()


def test_sync_of_a_deleted_run_names_the_mend(config, client, tmp_path, points):
    tracker = start(config, tmp_path / "run", params={"a": 1}, tags={"t": "x"})
    (tmp_path / "run" / "note.txt").write_text("note")
    tracker.log_artifact(tmp_path / "run" / "note.txt")
    logged(tracker, range(3))
    assert tracker.finish()
    client.delete_run(tracker.run_id)
    state = TrackingState.load(tmp_path / "run")
    state.sent_bytes = 0
    state.save(tmp_path / "run")
    with pytest.raises(RunError, match=r"was deleted(.|\n)*--new-run"):
        sync_run(tmp_path / "run")
    report = sync_run(tmp_path / "run", new_run=True)
    assert report.run_id != tracker.run_id
    run = client.get_run(report.run_id)
    assert points(client, report.run_id, "train/loss") == losses(range(3))
    assert run.data.params == {"a": "1"}
    assert run.data.tags["t"] == "x"
    assert [file.path for file in client.list_artifacts(report.run_id)] == ["note.txt"]
    assert run.info.status == "FINISHED"


def test_a_run_that_is_deleted_while_training_loses_nothing(config, client, tmp_path, points, caplog):
    tracker = start(config, tmp_path / "run")
    logged(tracker, range(3))
    assert tracker.wait_for_run_id(30)
    client.delete_run(tracker.run_id)
    logged(tracker, range(3, 6))
    assert not tracker.finish(timeout=5)
    assert "was deleted" in caplog.text
    client.restore_run(tracker.run_id)
    sync_run(tmp_path / "run")
    assert points(client, tracker.run_id, "train/loss") == losses(range(6))


def test_sync_on_the_command_line(config, client, tmp_path, points):
    runner = CliRunner()
    config.tracking_uri, good = "", config.tracking_uri
    tracker = start(config, tmp_path / "run")
    logged(tracker, range(3))
    tracker.finish()
    result = runner.invoke(track, ["sync", str(tmp_path / "run"), "--tracking-uri", good, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["metric_points"], report["metric_lines"], report["status"]) == (3, 3, "FINISHED")
    assert points(client, report["run_id"], "train/loss") == losses(range(3))
    result = runner.invoke(track, ["sync", str(tmp_path / "run")])
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "MLflow has all 3 lines" in result.stderr
    result = runner.invoke(track, ["sync", str(tmp_path)])
    assert isinstance(result.exception, UserError)
    assert f"Did you mean {tmp_path / 'run'}?" in str(result.exception)
    assert "Example: wmtp-ds track sync" in runner.invoke(track, ["sync", "--help"]).output


# Artifacts


def test_artifacts_that_change_vanish_or_climb_out(config, client, tmp_path, caplog):
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "metrics.json").write_text("old")
    (tmp_path / "outside.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "outside.txt")
    tracker = start(config, tmp_path / "run")
    tracker.log_artifact(folder, "checkpoints")
    while TrackingState.load(tmp_path / "run").artifacts[0].sent is False:
        time.sleep(0.02)
    (folder / "metrics.json").write_text("new!")
    tracker.log_artifact(folder, "checkpoints")
    tracker.log_artifact(tmp_path / "gone.txt")
    assert tracker.finish()
    listed = [file.path for file in client.list_artifacts(tracker.run_id, "checkpoints/best")]
    assert listed == ["checkpoints/best/metrics.json"]
    copy = client.download_artifacts(tracker.run_id, "checkpoints/best/metrics.json", str(tmp_path))
    assert Path(copy).read_text() == "new!"
    assert "gone.txt is gone and was not sent" in caplog.text


def test_an_artifact_that_cannot_be_sent_holds_up_no_other(config, client, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    for name in ("bad.txt", "good.txt"):
        (tmp_path / "run" / name).write_text(name)
    real = type(client).log_artifact

    def refuse(self, run_id, local_path, artifact_path=None):
        if local_path.endswith("bad.txt"):
            raise PermissionError("not that one")
        real(self, run_id, local_path, artifact_path)

    monkeypatch.setattr(type(client), "log_artifact", refuse)
    tracker = start(config, tmp_path / "run")
    tracker.log_artifact(tmp_path / "run" / "bad.txt")
    tracker.log_artifact(tmp_path / "run" / "good.txt")
    assert not tracker.finish()
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["good.txt"]
    monkeypatch.undo()
    assert sync_run(tmp_path / "run").artifact_files == 1
    assert len(client.list_artifacts(tracker.run_id)) == 2


def test_a_run_directory_may_be_moved_before_sync(config, client, tmp_path):
    config.tracking_uri, good = "", config.tracking_uri
    tracker = start(config, tmp_path / "run")
    (tmp_path / "run" / "plot.png").write_bytes(b"png")
    tracker.log_artifact(tmp_path / "run" / "plot.png", "plots")
    tracker.finish()
    (tmp_path / "run").rename(tmp_path / "moved")
    report = sync_run(tmp_path / "moved", tracking_uri=good)
    assert [file.path for file in client.list_artifacts(report.run_id, "plots")] == ["plots/plot.png"]


def test_files_below_follows_links_inside_only(tmp_path):
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "x").write_text("x")
    (tmp_path / "root" / "b").symlink_to("a/x")
    (tmp_path / "root" / "c").symlink_to("/etc/passwd")
    (tmp_path / "root" / "d").symlink_to("/etc")
    assert [name for name, _ in files_below(tmp_path / "root")] == ["b", "a/x"]


# The journal


def test_a_line_round_trips():
    metrics = {"a": 0.1, "b": math.inf, "c": -1e-300}
    for line in (MetricLine(7, 123, metrics), MetricLine(7, 123, metrics, frozenset({"a"}), 2)):
        assert decode_line(encode_line(line)) == line
    assert math.isnan(decode_line(encode_line(MetricLine(1, 1, {"n": math.nan}))).metrics["n"])


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"step": 1}',
        b'{"step": "x", "time": 1, "metrics": {}}',
        b'{"step": 1, "time": 1, "metrics": {"a": []}}',
        b'{"step": 1e999, "time": 1, "metrics": {}}',
    ],
)
def test_a_damaged_line_is_none(line):
    assert decode_line(line) is None


def test_a_line_that_was_cut_short_costs_itself_alone(config, client, tmp_path, points, caplog):
    config.tracking_uri, good = "", config.tracking_uri
    tracker = start(config, tmp_path / "run")
    logged(tracker, range(3))
    tracker.finish()
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "time": 17, "met')
    config.tracking_uri = good
    tracker = start(config, tmp_path / "run", resume=True)
    logged(tracker, range(4, 6))
    assert tracker.finish()
    assert points(client, tracker.run_id, "train/loss") == losses([0, 1, 2, 4, 5])
    assert "damaged lines" in caplog.text


def test_read_chunk_takes_whole_lines_and_restarts_on_a_replaced_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_chunk(path, 0, 10).n_lines == 0
    whole = encode_line(MetricLine(1, 1, {"a": 1.0, "b": 2.0})) + encode_line(MetricLine(2, 1, {"a": 1.0}))
    path.write_bytes(whole + b'{"step": 3')
    assert [line.step for line in read_chunk(path, 0, 100).lines] == [1, 2]
    assert read_chunk(path, 0, 100).end == len(whole)
    assert [line.step for line in read_chunk(path, 0, 2).lines] == [1]
    assert read_chunk(path, len(whole), 100).n_lines == 0
    assert [line.step for line in read_chunk(path, 10_000, 100).lines] == [1, 2]


def test_a_full_disk_keeps_lines_until_there_is_room(tmp_path, monkeypatch, caplog):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append(1, {"a": 1.0})
    real, room = os.write, {"bytes": 20}

    def write(descriptor, data):
        if room["bytes"] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = real(descriptor, data[: room["bytes"]])
        room["bytes"] -= taken
        return taken

    monkeypatch.setattr(tracking_state.os, "write", write)
    journal.append(2, {"a": 2.0})  # partly written, then taken back
    journal.append(3, {"a": 3.0})
    assert caplog.text.count("cannot write") == 1
    assert read_metrics(tmp_path / "metrics.jsonl") == {1: {"a": 1.0}}
    monkeypatch.setattr(tracking_state.os, "write", real)
    journal.append(4, {"a": 4.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == {s: {"a": float(s)} for s in (1, 2, 3, 4)}
    assert all(decode_line(line) for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines())


def test_a_state_that_cannot_be_written_does_not_stop_training(config, client, tmp_path, monkeypatch, points, caplog):
    def no_room(self, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", no_room)
    tracker = start(config, tmp_path / "run")
    logged(tracker, range(3))
    assert tracker.finish()
    assert points(client, tracker.run_id, "train/loss") == losses(range(3))
    assert caplog.text.count("tracking.json") == 1


def test_a_run_directory_that_cannot_be_made_is_the_users_error(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the run directory"):
        start(config, tmp_path / "file" / "run")


# Secrets and git


def test_secrets_reach_neither_files_nor_mlflow(config, client, store, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    secret = "pl4nted-s3cret"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", secret)
    config.tracking_uri = f"http://someone:{secret}@127.0.0.1:9"
    tracker = start(
        config,
        tmp_path / "run",
        params={"mlflow.tracking_uri": config.tracking_uri, "hub.token": "hf_abc", "models.tokenizer_path": "x/y"},
        tags={"note": f"password {secret}"},
    )
    tracker.log(1, {"a": 1.0})
    assert not tracker.finish(timeout=5)
    report = sync_run(tmp_path / "run", tracking_uri=store)
    data = client.get_run(report.run_id).data
    assert data.params == {
        "mlflow.tracking_uri": "http://***@127.0.0.1:9",
        "hub.token": "***",
        "models.tokenizer_path": "x/y",
    }
    everything = caplog.text + "".join(path.read_text() for path in (tmp_path / "run").iterdir())
    assert "127.0.0.1:9" in everything
    assert secret not in everything + str(data.to_dictionary())
    assert "hf_abc" not in everything


def test_git_state(tmp_path, monkeypatch):
    assert git_state(tmp_path) == {}

    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-b", "trunk")
    assert git_state(tmp_path) == {}  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert git_state(tmp_path) == {
        "git.commit": commit,
        "git.branch": "trunk",
        "git.dirty": "false",
        "mlflow.source.git.commit": commit,
    }
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path)["git.dirty"] == "true"
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == {}


def test_git_tags_are_added(config, client, tmp_path, monkeypatch):
    monkeypatch.setattr("wmtp_ds.tracking.git_state", lambda cwd: {"git.commit": "abc", "git.dirty": "false"})
    tracker = start(config, tmp_path / "run", tags={"git.dirty": "true"})
    assert tracker.finish()
    tags = client.get_run(tracker.run_id).data.tags
    assert (tags["git.commit"], tags["git.dirty"]) == ("abc", "true")


def test_the_config_classes_fit():
    """The tracker reads these fields of the ``mlflow`` table."""
    from wmtp_ds.config.schema import MlflowConfig

    table = MlflowConfig()
    needed = SimpleNamespace(tracking_uri="sqlite:///mlflow.db", s3_artifacts="", parent_run_id="")
    assert all(getattr(table, name) == value for name, value in vars(needed).items())
    assert table.experiment
