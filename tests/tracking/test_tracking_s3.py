"""Artifacts on S3: the tracker sends them there, the next stage has its critic from there, and a bucket may fail."""

import json
import logging
import os
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import boto3
import pytest
import torch
from mlflow.store.artifact.s3_artifact_repo import _cached_get_s3_client
from moto.s3.exceptions import S3ClientError
from moto.s3.models import S3Backend
from moto.server import ThreadedMotoServer

from wmtp_ds import mlflow_client
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.handoff import load_value_head, locate_critic, save_value_head
from wmtp_ds.tracking import start_tracking
from wmtp_ds.tracking_sync import sync_run

SECRET = "pl4nted/AWS+secret-key"
BEST = "checkpoints/checkpoint_best"


@pytest.fixture(scope="module")
def s3():
    """The address of an S3 server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


@pytest.fixture
def keys(s3, monkeypatch, tmp_path, _own_environment):
    """A user's environment for S3."""
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIApl4nted")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))


@pytest.fixture
def bucket(s3, keys, tmp_path):
    """A bucket of the test's own."""
    made = boto3.resource("s3", endpoint_url=s3).Bucket(tmp_path.name.replace("_", "-"))
    made.create()
    return made


@pytest.fixture
def config(store, bucket, tmp_path):
    """An ``mlflow`` table whose artifacts lie in the bucket."""
    location = f"s3://{bucket.name}/runs"
    return SimpleNamespace(tracking_uri=store, experiment=tmp_path.name, s3_artifacts=location, parent_run_id="")


@pytest.fixture
def critic(tmp_path):
    """A ``checkpoint_best`` as a critic exports it."""
    tensors = {"norm.weight": torch.ones(4), "output.weight": torch.rand(1, 4), "output.bias": torch.zeros(1)}
    facts = {"hidden_size": 4, "type": "linear", "activation": "sigmoid", "trunk_fingerprint": "ab"}
    save_value_head(tmp_path / "run" / "checkpoint_best" / "value_head.safetensors", tensors, **facts)
    (tmp_path / "run" / "checkpoint_best" / "metrics.json").write_text("{}")
    return tmp_path / "run" / "checkpoint_best"


def train(config, run_dir, critic, timeout=30.0):
    tracker = start_tracking(config, run_name="critic", run_dir=run_dir, tags={}, params={"a": 1})
    tracker.log_artifact(critic, "checkpoints")
    tracker.log(1, {"train/loss": 0.5})
    return tracker, tracker.finish(timeout=timeout)


def test_the_critic_goes_to_the_bucket_and_to_the_next_stage(
    config, server, bucket, critic, tmp_path, caplog, monkeypatch
):
    """Tracked by a server with passwords, which tells where the artifacts are and does not touch them."""
    caplog.set_level(logging.DEBUG)
    config.tracking_uri = server
    tracker, complete = train(config, tmp_path / "run", critic)
    assert complete
    root = f"runs/{tracker.run_id}/artifacts/{BEST}"
    assert [file.key for file in bucket.objects.all()] == [f"{root}/metrics.json", f"{root}/value_head.safetensors"]
    weights = load_value_head(critic / "value_head.safetensors").state_dict["output.weight"]
    for number, uri in enumerate(
        [f"runs:/{tracker.run_id}/{BEST}", f"mlflow://{tracker.experiment_id}/{tracker.run_id}/artifacts/checkpoints"]
    ):
        found = locate_critic(uri, tracking_uri=server, cache_dir=tmp_path / f"cache{number}")
        assert torch.equal(load_value_head(found).state_dict["output.weight"], weights)
        assert [path.name for path in found.parent.parent.rglob("*") if path.is_file()] == ["value_head.safetensors"]
    kept = "".join(path.read_text() for path in (tmp_path / "run").iterdir() if path.is_file())
    ours = "".join(record.getMessage() for record in caplog.records if record.name.startswith("wmtp_ds"))
    told = kept + ours + str(mlflow_client.connect(server).get_run(tracker.run_id).to_dictionary())
    assert SECRET not in told
    assert "AKIApl4nted" not in told


def refuses(bucket, monkeypatch):
    statement = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject", "Resource": "*"}
    bucket.Policy().put(Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
    return bucket.Policy().delete


def is_full(bucket, monkeypatch):
    context = monkeypatch.context()

    def no_room(*_, **__):
        raise S3ClientError("InsufficientStorage", "The bucket is full")

    context.__enter__().setattr(S3Backend, "put_object", no_room)
    return lambda: context.__exit__(None, None, None)


def is_gone(bucket, monkeypatch):
    bucket.delete()
    return bucket.create


@pytest.mark.parametrize(
    ("fault", "said"), [(refuses, "403|AccessDenied"), (is_full, "InsufficientStorage"), (is_gone, "NoSuchBucket")]
)
def test_a_bucket_that_fails_costs_no_metric_and_sync_fills_it(
    fault, said, config, bucket, critic, client, tmp_path, caplog, monkeypatch
):
    mend = fault(bucket, monkeypatch)
    tracker, complete = train(config, tmp_path / "run", critic, timeout=10)
    assert not complete
    first, last = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "AWS_SECRET_ACCESS_KEY" in first
    assert "Training goes on" in first
    assert "(missing: 1 artifacts; last trouble: " in last
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"train/loss": 0.5})
    with pytest.raises(RunError, match=rf"({said})(.|\n)*Nothing is lost"):
        sync_run(tmp_path / "run", attempts=1)
    uri = f"runs:/{tracker.run_id}/{BEST}"
    with pytest.raises(UserError, match=r"track sync RUN_DIR|bucket does not exist"):
        locate_critic(uri, tracking_uri=config.tracking_uri, cache_dir=tmp_path / "cache")
    mend()
    assert sync_run(tmp_path / "run").artifact_files == 2
    again = sync_run(tmp_path / "run")
    assert (again.artifact_files, again.metric_points) == (0, 0)
    assert len(list(bucket.objects.all())) == 2
    assert locate_critic(uri, tracking_uri=config.tracking_uri, cache_dir=tmp_path / "cache").is_file()


def test_without_boto3_the_mend_is_said(config, critic, tmp_path, caplog, monkeypatch):
    _cached_get_s3_client.cache_clear()
    monkeypatch.setitem(sys.modules, "boto3", None)
    _, complete = train(config, tmp_path / "run", critic, timeout=10)
    assert not complete
    assert "artifacts on S3 need boto3: pip install boto3" in caplog.text


def test_a_bucket_that_does_not_answer_holds_up_no_process(config, bucket, critic, tmp_path, monkeypatch):
    """boto3 uploads on threads that Python waits for at its end: one that hangs would hold the rank for minutes."""
    program = """
        import os, socket, sys, time
        from pathlib import Path
        from types import SimpleNamespace
        from wmtp_ds import rank
        from wmtp_ds.tracking import start_tracking

        dead = socket.create_server(("127.0.0.1", 0))  # takes connections and never answers
        os.environ["MLFLOW_S3_ENDPOINT_URL"] = f"http://127.0.0.1:{dead.getsockname()[1]}"
        uri, experiment, location, root = sys.argv[1:]
        config = SimpleNamespace(tracking_uri=uri, experiment=experiment, s3_artifacts=location, parent_run_id="")

        def work():
            tracker = start_tracking(config, run_name="r", run_dir=Path(root, "run"), tags={}, params={})
            tracker.log_artifact(Path(root, "run", "checkpoint_best"), "checkpoints")
            dead.accept()  # the upload has begun
            begin = time.monotonic()
            assert not tracker.finish("KILLED", timeout=1)
            assert time.monotonic() - begin < 3
            print("begun", time.time(), flush=True)
            return 0

        rank._TIDY_SECONDS = 1.0
        sys.exit(rank.run_rank(work))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    command += [config.tracking_uri, config.experiment, config.s3_artifacts, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.time() - float(done.stdout.split()[1]) < 20
