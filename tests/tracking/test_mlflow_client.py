"""Secrets, tracking URIs, and how MLflow's errors are told."""

import os
import string
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp_ds import mlflow_client
from wmtp_ds.errors import UserError
from wmtp_ds.mlflow_client import clean_tracking_uri, explain, is_secret_key, mask_secrets


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://me:pw@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg2://u:p@ss@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        ("see https://a:b@c and https://d:e@f.", "see https://***@c and https://***@f."),
        ("https://host/x?token=abc&page=2", "https://host/x?token=***&page=2"),
        ("https://host/x?X-Amz-Signature=abc", "https://host/x?X-Amz-Signature=***"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("mail me@example.org, 5 tokens", "mail me@example.org, 5 tokens"),
        ("the password is hunter2222", "the password is ***"),
        ("TOKENIZERS_PARALLELISM is ignored", "TOKENIZERS_PARALLELISM is ignored"),
    ],
)
def test_mask_secrets(text, masked):
    environ = {
        "MLFLOW_TRACKING_PASSWORD": "hunter2222",
        "MY_TOKEN": "true",  # too short for a secret
        "TOKENIZERS_PARALLELISM": "ignored",
        "HOME": "/home/me",
    }
    assert mask_secrets(text, environ) == masked


words = st.text(string.ascii_letters + string.digits + "!$&'()*+,;=-._~:@%", min_size=6, max_size=30)


@given(password=words, before=st.text(max_size=20), after=st.text(max_size=20))
def test_a_password_in_the_environment_never_survives(password, before, after):
    masked = mask_secrets(before + password + after, {"AWS_SECRET_ACCESS_KEY": password})
    assert password not in masked


@given(user=words, password=words)
def test_credentials_in_a_url_never_survive(user, password):
    masked = mask_secrets(f"cannot reach http://{user}:{password}@example.org/path", {})
    assert masked == "cannot reach http://***@example.org/path"


@pytest.mark.parametrize("key", ["password", "hub.token", "MLFLOW_TRACKING_TOKEN", "x.api_key", "aws.secret"])
def test_secret_keys(key):
    assert is_secret_key(key)


@pytest.mark.parametrize("key", ["models.policy.tokenizer_path", "perf/tokens_per_s", "training.beta", "keys"])
def test_other_keys(key):
    assert not is_secret_key(key)


def test_credentials_move_into_the_environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "old")
    assert clean_tracking_uri("https://me:s%40cret-1@host:5000/sub") == "https://host:5000/sub"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "s@cret-1"
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    assert mask_secrets("s@cret-1 or s%40cret-1") == "*** or ***"


def test_a_database_keeps_its_password_which_is_masked_from_then_on():
    uri = "postgresql://me:datab4se-pw@host/mlflow"
    assert clean_tracking_uri(uri) == uri
    assert mask_secrets("password authentication failed: datab4se-pw") == "password authentication failed: ***"


def test_sqlite_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert clean_tracking_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert clean_tracking_uri("sqlite:///a/b.db?timeout=3") == f"sqlite:///{tmp_path}/a/b.db?timeout=3"
    assert clean_tracking_uri(f"sqlite:///{tmp_path}/x.db") == f"sqlite:///{tmp_path}/x.db"
    assert not list(tmp_path.iterdir())
    assert clean_tracking_uri("sqlite:///:memory:") == "sqlite:///:memory:"
    assert clean_tracking_uri("http://host:5000") == "http://host:5000"


def test_what_the_user_has_set_is_left_alone(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    mlflow_client.prepare(timeout=10, retries=0)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    with mlflow_client.patience(600):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"


def test_boto3_does_not_ask_five_times(monkeypatch):
    mlflow_client.prepare(10, 0)
    assert os.environ["AWS_MAX_ATTEMPTS"] == "2"
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "7")
    mlflow_client.prepare(10, 0)
    assert os.environ["AWS_MAX_ATTEMPTS"] == "7"


def test_mlflow_run_says_where(monkeypatch):
    configured, theirs = "sqlite:///mlflow.db", "http://theirs:5000"
    assert mlflow_client.inherited_tracking_uri(configured) == configured
    monkeypatch.setenv("MLFLOW_TRACKING_URI", theirs)  # by itself it is for other programs
    assert mlflow_client.inherited_tracking_uri(configured) == configured
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123abcd")
    assert mlflow_client.inherited_tracking_uri(configured) == theirs
    assert mlflow_client.inherited_tracking_uri("") == ""


def test_under_mlflow_run_a_critic_comes_from_its_server(monkeypatch):
    from wmtp_ds import assembly

    asked = {}

    def locate(uri, **where):
        asked.update(where, uri=uri)
        raise UserError("enough")

    monkeypatch.setenv("MLFLOW_RUN_ID", "0123abcd")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://theirs:5000")
    monkeypatch.setattr(assembly, "locate_critic", locate)
    config = SimpleNamespace(
        training=SimpleNamespace(needs_critic=True),
        experiment=SimpleNamespace(critic_checkpoint="runs:/0123abcd/checkpoints"),
        mlflow=SimpleNamespace(tracking_uri="sqlite:///mlflow.db"),
        checkpoint=SimpleNamespace(save_dir="checkpoints/x"),
    )
    with pytest.raises(UserError, match="enough"):
        assembly.fetch_critic(SimpleNamespace(config=config))
    assert asked["tracking_uri"] == "http://theirs:5000"


def test_each_caller_gets_the_timeout_that_it_wants():
    """A handoff, which waits longer, does not make the tracker of the same process wait as long."""
    mlflow_client.prepare(timeout=30, retries=2)
    mlflow_client.prepare(timeout=10, retries=0)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    with mlflow_client.patience(600):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "600"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"


def test_explanations_are_one_short_line():
    assert explain(ValueError()) == "ValueError"
    assert explain(ValueError("a\n  b")) == "a b"
    assert len(explain(ValueError("x" * 5000))) == 300
    assert explain(RuntimeError("upload " + "/path" * 100 + ": AccessDenied")).startswith("upload /path")
    assert ": AccessDenied (check the bucket, AWS_" in explain(
        RuntimeError("upload " + "/path" * 100 + ": AccessDenied")
    )
    assert explain(ValueError("run 3f40122 is odd")) == "run 3f40122 is odd"  # no 401
    assert "pip install boto3" in explain(ModuleNotFoundError("No module named 'boto3'"))
    assert "MLFLOW_TRACKING_PASSWORD" in explain(RuntimeError("failed with error code 401 != 200"))
    assert "pw" not in explain(RuntimeError("API request to http://me:pw@host failed"))


def test_no_other_module_imports_mlflow_at_its_top():
    root = Path(mlflow_client.__file__).parent
    offenders = [
        path.name
        for path in root.rglob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith(("import mlflow", "from mlflow"))
    ]
    assert offenders == []
