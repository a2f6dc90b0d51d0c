"""Finding a critic by path and by each form of URI, in a SQLite store and on a real server."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wmtp_ds import mlflow_client
from wmtp_ds.errors import UserError
from wmtp_ds.handoff import load_value_head, locate_critic, parse_critic_uri, save_value_head
from wmtp_ds.tracking import start_tracking

D = 4


@pytest.fixture
def checkpoint(tmp_path):
    """A ``checkpoint_best`` as a critic exports it."""
    folder = tmp_path / "checkpoints" / "critic" / "checkpoint_best"
    tensors = {"norm.weight": torch.ones(D), "output.weight": torch.rand(1, D), "output.bias": torch.zeros(1)}
    save_value_head(
        folder / "value_head.safetensors",
        tensors,
        hidden_size=D,
        type="linear",
        activation="sigmoid",
        trunk_fingerprint="ab",
    )
    (folder / "metrics.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    return folder


def track(uri, tmp_path, folder):
    """A finished critic run that has the checkpoint as its artifact; its id and its experiment's."""
    artifacts = f"file://{tmp_path}/artifacts" if uri.startswith("sqlite") else ""
    config = SimpleNamespace(tracking_uri=uri, experiment=tmp_path.name, s3_artifacts=artifacts, parent_run_id="")
    tracker = start_tracking(config, run_name="critic", run_dir=tmp_path / "run", tags={}, params={})
    tracker.log_artifact(folder, "checkpoints")
    assert tracker.finish()
    return tracker.run_id, tracker.experiment_id


# Paths


def test_local_forms(checkpoint, tmp_path):
    file = checkpoint / "value_head.safetensors"
    options = {"tracking_uri": "", "cache_dir": tmp_path / "cache"}
    for path in (checkpoint, checkpoint.parent, file, f"{checkpoint}/"):
        assert locate_critic(str(path), **options) == file
    pt = tmp_path / "critic.pt"
    pt.write_bytes(b"")
    assert locate_critic(f"  {pt} ", **options) == pt
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "there is no critic at nowhere(.|\n)*--stage critic"),
        ("empty", r"holds no value_head\.safetensors.*\(it holds: nothing\)"),
        ("other", r"\(it holds: adapter\.bin\)"),
        ("other/adapter.bin", "neither .safetensors nor .pt"),
        ("", "the critic checkpoint is empty"),
    ],
)
def test_paths_without_a_critic(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter.bin").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        locate_critic(path, tracking_uri="", cache_dir=tmp_path / "cache")


# The form of a URI


@pytest.mark.parametrize(
    ("text", "artifact"),
    [
        ("runs:/0123abcd/checkpoints/checkpoint_best", "runs:/0123abcd/checkpoints/checkpoint_best"),
        ("runs:/r-1/value_head.safetensors", "runs:/r-1/value_head.safetensors"),
        ("mlflow://8/0123abcd/artifacts/checkpoints/", "runs:/0123abcd/checkpoints"),
        ("mlflow-artifacts:/8/r/artifacts/x", "mlflow-artifacts:/8/r/artifacts/x"),
        ("mlflow-artifacts://host:5000/8/r/artifacts/x", "mlflow-artifacts://host:5000/8/r/artifacts/x"),
        ("  runs:/r/p ", "runs:/r/p"),
    ],
)
def test_uris(text, artifact):
    assert parse_critic_uri(text).artifact_uri == artifact


def test_the_parts_of_an_mlflow_uri():
    parsed = parse_critic_uri("mlflow://8/0123abcd/artifacts/checkpoints/checkpoint_best")
    assert (parsed.kind, parsed.experiment_id, parsed.run_id) == ("mlflow", "8", "0123abcd")
    assert parsed.path == "checkpoints/checkpoint_best"


@pytest.mark.parametrize("text", ["checkpoints/critic", "/abs/x.pt", "./runs", "a:b/c", "~/x", "runs/x", "C:/x"])
def test_everything_else_is_a_path(text):
    assert parse_critic_uri(text).kind == "path"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "runs:/",
        "runs:/id",
        "runs:/id/",
        "runs:id/path",
        "runs://id/path",
        "runs:/../path",
        "runs:/id/../other",
        "runs:/id/a/../../b",
        "runs:/id/%2e%2e/b",
        "runs:/id/%252e%252e/b",
        "runs:/id/a%2f..%2fb",
        "runs:/id/a\\..\\b",
        "runs:/id/./b",
        "runs:/id//b",
        "runs:/id/a?b=c",
        "runs:/id/a#b",
        "runs:/id/a%00b",
        "mlflow:8/r/artifacts/x",
        "mlflow:/8/r/artifacts/x",
        "mlflow://8/r/artifacts",
        "mlflow://8/r/artifacts/",
        "mlflow://8/r/x",
        "mlflow://8/artifacts/x",
        "mlflow:///r/artifacts/x",
        "mlflow://8/r/artifacts/../../9/r/artifacts/x",
        "mlflow-artifacts:x",
        "mlflow-artifacts:/",
        "mlflow-artifacts:/8/../9",
        "mlflow-artifacts://user:secret-pw@host/x",
        "s3://bucket/x",
        "models:/name/1",
        "https://host/x",
        "file:///etc/passwd",
        "RUNS:/id/x",
    ],
)
def test_uris_that_are_refused(text):
    with pytest.raises(UserError, match="Mend: ") as error:
        parse_critic_uri(text)
    assert "secret-pw" not in str(error.value)


@given(st.text(max_size=40))
def test_parsing_never_gives_a_traceback(text):
    for prefix in ("", "runs:/", "mlflow://", "mlflow-artifacts:/", "runs:/id/"):
        try:
            parsed = parse_critic_uri(prefix + text)
        except UserError:
            continue
        if parsed.kind != "path":
            assert ".." not in parsed.path.replace("\\", "/").split("/")


# Artifacts


def same(path, checkpoint, cache):
    assert path.is_relative_to(cache)
    head, original = load_value_head(path), load_value_head(checkpoint / "value_head.safetensors")
    assert torch.equal(head.state_dict["output.weight"], original.state_dict["output.weight"])
    # Only the value head came, and no half of anything is left.
    assert [file.name for file in cache.rglob("*") if file.is_file()] == ["value_head.safetensors"]
    assert not list(cache.glob(".download-*"))


@pytest.mark.parametrize("where", ["store", "server"])
def test_every_form_of_uri(where, request, checkpoint, tmp_path):
    uri = request.getfixturevalue(where)
    run_id, experiment_id = track(uri, tmp_path, checkpoint)
    best = "checkpoints/checkpoint_best"
    forms = [f"runs:/{run_id}/{best}", f"mlflow://{experiment_id}/{run_id}/artifacts/checkpoints"]
    if where == "store":
        forms.append(f"runs:/{run_id}/{best}/value_head.safetensors")
    else:
        forms.append(f"mlflow-artifacts:/{experiment_id}/{run_id}/artifacts/{best}")
        forms.append(forms[-1].replace(":/", f"://{uri.removeprefix('http://')}/", 1))
    for number, form in enumerate(forms):
        cache = tmp_path / f"cache{number}"
        same(locate_critic(form, tracking_uri=uri, cache_dir=cache), checkpoint, cache)
    # What is in the cache is replaced: the artifact may have changed.
    next(cache.rglob("*.safetensors")).write_bytes(b"old")
    same(locate_critic(form, tracking_uri=uri, cache_dir=cache), checkpoint, cache)


@pytest.mark.parametrize("where", ["store", "server"])
def test_artifacts_that_are_not_there(where, request, checkpoint, tmp_path):
    uri = request.getfixturevalue(where)
    run_id, experiment_id = track(uri, tmp_path, checkpoint)
    missing = "f" * 32
    for text, message in [
        (f"runs:/{missing}/checkpoints", rf"names the run {missing}, which MLflow at .* does not have"),
        (f"mlflow://987/{run_id}/artifacts/checkpoints", rf"says experiment 987, .* experiment {experiment_id}\."),
        (f"runs:/{run_id}/checkpoint", r"\(it holds: nothing\)(.|\n)*track sync"),
        (f"runs:/{run_id}/checkpoints/checkpoint_best/critic.pt", r"beside it: metrics\.json"),
    ]:
        with pytest.raises(UserError, match=message):
            locate_critic(text, tracking_uri=uri, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_stores_that_cannot_have_it(store, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"mlflow\.tracking_uri is empty"):
        locate_critic("runs:/r/p", tracking_uri="", cache_dir=cache)
    with pytest.raises(UserError, match="no MLflow database at"):
        locate_critic("runs:/r/p", tracking_uri=f"sqlite:///{tmp_path}/x/none.db", cache_dir=cache)
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match=r"served by a tracking server(.|\n)*http"):
        locate_critic("mlflow-artifacts:/8/r/artifacts/x", tracking_uri=store, cache_dir=cache)


def test_a_server_that_is_away(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"cannot get the critic(.|\n)*give the critic's local folder") as error:
        locate_critic("runs:/r/p", tracking_uri="http://me:hunter22@127.0.0.1:9", cache_dir=tmp_path)
    assert "hunter22" not in str(error.value)


def test_a_download_that_breaks_leaves_nothing(checkpoint, store, tmp_path, monkeypatch):
    run_id, _ = track(store, tmp_path, checkpoint)
    cache = tmp_path / "cache"
    uri = f"runs:/{run_id}/checkpoints"
    good = locate_critic(uri, tracking_uri=store, cache_dir=cache)
    before = good.read_bytes()

    def broken(artifact_uri, dst_path, tracking_uri):
        with open(f"{dst_path}/value_head.safetensors", "wb") as file:
            file.write(before[:10])
        raise OSError("connection reset")

    mlflow_client.prepare(10, 0)
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", broken)
    with pytest.raises(UserError, match="connection reset"):
        locate_critic(uri, tracking_uri=store, cache_dir=cache)
    assert good.read_bytes() == before
    assert not list(cache.glob(".download-*"))
