"""Secrets of the environment and of the config are in nothing that a run writes or says: every byte is looked at.

One rank trains, saves, exports and ends; then it fails over rows whose loss is NaN, and reports them. MLflow is away
all the while, and gets the runs afterwards. Before and after, whatever prints a config does.
"""

import base64
import json
import os
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from in_process import Done, command
from ranks import run_ranks

from wmtp_ds.checkpoint_files import checkpoint_folders

pytestmark = pytest.mark.launch

# Of letters that URLs and base64 write otherwise.
SECRETS = {
    "MLFLOW_TRACKING_PASSWORD": "pw/9+x@Zq71-first~",
    "MLFLOW_TRACKING_TOKEN": "tok/8+w@Yp62-second~",
    "AWS_SECRET_ACCESS_KEY": "aws/7+v@Xo53-third~",
    "HF_TOKEN": "hf_/6+u@Wn44-fourth~",
    "in the URI": "uri/5+t@Vm35-fifth~",
    "in the query": "query/4+s@Ul26-sixth~",
    "in the bucket": "bucket/3+r@Tk17-seventh~",
}
USER = "someone"


def tracking_uri() -> str:
    password, token = (quote(SECRETS[name], safe="") for name in ("in the URI", "in the query"))
    return f"http://{USER}:{password}@127.0.0.1:9/mlflow?access_token={token}"


ENVIRON = {name: value for name, value in SECRETS.items() if name.isupper()} | {
    "WMTP_MLFLOW__TRACKING_URI": tracking_uri()
}
# Refused: they belong into the environment.
CREDENTIALS = f'mlflow.s3_artifacts="s3://key:{quote(SECRETS["in the bucket"], safe="")}@bucket/prefix"'


def forms(secret: str) -> dict[str, bytes]:
    """How a secret may be written."""
    found = {
        "plain": secret,
        "quoted": quote(secret, safe=""),
        "quoted, but for slashes": quote(secret),
        "as of a form": quote_plus(secret),
        "escaped": json.dumps(secret)[1:-1],
        "twice quoted": quote(quote(secret, safe=""), safe=""),
        "backwards": secret[::-1],
        "the end alone": secret.rpartition("@")[2],
    }
    coded = {
        f"base64 {kind} {shift}": base64.b64encode(b" " * shift + prefix + secret.encode())[4 if shift else 0 : -4]
        for kind, prefix in (("alone", b""), ("with the user", f"{USER}:".encode()), ("as a token", b"Bearer "))
        for shift in (0, 1, 2)
    }
    return {name: text.encode() for name, text in found.items()} | coded


FORMS = {(name, kind): text for name, secret in SECRETS.items() for kind, text in forms(secret).items()}


def leaks(content: bytes) -> list[tuple[str, str]]:
    return [place for place, text in FORMS.items() if text in content]


def test_the_search_finds_what_it_looks_for() -> None:
    secret = SECRETS["HF_TOKEN"]
    for content in (
        secret,
        quote(secret),
        base64.b64encode(f"{USER}:{secret}".encode()).decode(),
        f'{{"a": "{secret}"}}',
    ):
        assert leaks(b"x" * 7 + content.encode())
    assert not leaks(b"nothing")


def job(folder: str, **keywords: object) -> dict[str, object]:
    override = [
        f'checkpoint.save_dir="secrets/{folder}"',
        "training.max_steps=3",
        "training.n_epochs=1.0",
        "training.batch_size=4",
        "training.gradient_accumulation_steps=1",
        "training.eval_interval=2",
        "data_sampling.n_samples=12",
        "checkpoint.save_checkpoint_every=0.6",
        "stability.max_skipped_steps=1",
        'mlflow.s3_artifacts="s3://bucket/prefix"',
    ]
    return {"stage": "baseline", "config": "stage_configs/local/baseline.toml", "override": override} | keywords


@pytest.fixture(scope="module")
def said(workspace: Path) -> str:
    """All that the runs wrote to the terminal."""
    (workspace / "secrets").mkdir()
    jobs = workspace / "secrets/jobs"
    jobs.write_text(json.dumps([job("ended"), job("failed", faults=[[1, 0, "loss-nan"]])]))
    script = Path(__file__).with_name("faulty_driver.py")
    done = run_ranks(script, [str(jobs)], 1, workspace, 300, **ENVIRON)
    assert done.returncode == 0, done.stdout
    ends = json.loads((workspace / "secrets/ends.json").read_text())
    assert ends[0] == 0
    assert "not finite" in str(ends[1])
    for name in ("jobs", "ends.json"):  # the test's own
        (workspace / "secrets" / name).unlink()
    return done.stdout


def files(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_run_writes_and_says_no_secret(workspace: Path, said: str) -> None:
    assert "MLflow" in said, "the server that is away is warned about"
    assert not leaks(said.encode()), said
    found = files(workspace / "secrets")
    names = {path.name for path in found}
    assert {"config.toml", "run.json", "tracking.json", "metrics.jsonl", "manifest.json"} <= names
    assert any(path.parent.name == "bad_steps" for path in found)
    assert len(checkpoint_folders(workspace / "secrets/ended")) > 0
    assert (workspace / "secrets/ended/checkpoint_final/model.safetensors").is_file()
    leaky = {str(path): leaks(content) for path, content in found.items() if leaks(content)}
    assert not leaky


def test_the_configs_are_masked(workspace: Path, said: str) -> None:
    text = (workspace / "secrets/ended/config.toml").read_text()
    assert 'tracking_uri = "http://***@127.0.0.1:9/mlflow?access_token=***"' in text


def test_commands_say_no_secret(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    config = "stage_configs/local/baseline.toml"
    broken = [
        "--override",
        CREDENTIALS,
        "--override",
        f"mlflow.tracking_ur={tracking_uri()}",
        "--override",
        f"training.batch_size={tracking_uri()}",
    ]
    wrong = {"WMTP_MLFLOW__TRACKING_URI": tracking_uri().replace("http", "gopher"), "WMTP_MLFLOW__X": tracking_uri()}
    commands: list[tuple[int, Done]] = [
        (0, command("validate", config, environ=ENVIRON)),
        (0, command("validate", config, "--json", environ=ENVIRON)),
        (2, command("validate", config, *broken, environ=ENVIRON)),
        (2, command("validate", config, "--json", *broken, environ=ENVIRON)),
        (2, command("validate", config, environ=ENVIRON | wrong)),
        (0, command("show", config, environ=ENVIRON)),
        (0, command("show", config, "--json", environ=ENVIRON)),
        (0, command("plan", config, "--json", environ=ENVIRON, seconds=60)),
    ]
    (workspace / "leaky.toml").write_text(
        f'extends = "stage_configs/local/baseline.toml"\n[mlflow]\nx = "{tracking_uri()}\n'
    )
    commands.append((2, command("validate", "leaky.toml", environ=ENVIRON)))
    (workspace / "leaky.toml").unlink()
    for code, done in commands:
        assert done.code == code, done
        assert not leaks((done.out + done.err).encode()), done
    doctor = command("doctor", config, "--json", environ=ENVIRON, seconds=90)
    assert doctor.code in (0, 1)
    assert "127.0.0.1:9" in doctor.out
    assert not leaks((doctor.out + doctor.err).encode()), doctor.out


def test_what_is_sent_later_holds_no_secret(workspace: Path, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)
    folder = workspace / "secrets" / "store"
    folder.mkdir()
    before = dict(os.environ)
    try:
        uri = f"sqlite:///{folder}/mlflow.db"
        # Artifacts would go to the bucket: their location is the experiment's.
        state = workspace / "secrets/failed/tracking.json"
        state.write_text(json.dumps(json.loads(state.read_text()) | {"artifact_location": str(folder / "artifacts")}))
        done = command("track", "sync", "secrets/failed", "--tracking-uri", uri, seconds=120)
        refused = command("track", "sync", "secrets/ended", "--tracking-uri", tracking_uri(), seconds=120)
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
    assert done.code == 0, done
    assert refused.code == 1, refused
    for output in (done, refused):
        assert not leaks((output.out + output.err).encode()), output
    found = files(workspace / "secrets")
    assert any(path.name == "mlflow.db" for path in found)
    assert any("artifacts" in path.parts for path in found)
    leaky = {str(path): leaks(content) for path, content in found.items() if leaks(content)}
    assert not leaky
