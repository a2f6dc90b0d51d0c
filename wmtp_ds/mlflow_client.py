"""The one door to MLflow's client: imported late, quiet, impatient, and never given a secret to repeat.

MLflow takes seconds to import, logs its database migrations, waits minutes for a dead server and puts the
tracking URI, password included, into its error messages. Tracking and handoff go through here instead.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from wmtp_ds.masking import MASK, mask_urls

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_SECRET_VARIABLE = re.compile(r"(PASSWORD|PASSWD|SECRET|TOKEN|API_?KEY|ACCESS_KEY)(_|$)", re.IGNORECASE)
_SECRET_KEY = re.compile(r"(^|[._-])(password|passwd|secret|token|api_?key|access_key|credentials?)$", re.IGNORECASE)
_REFUSED = re.compile(r"\b40[13]\b")
# What boto3 says where a bucket, its credentials or its server are not what they should be.
_S3_TROUBLE = re.compile(
    r"NoSuchBucket|AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|Unable to locate credentials"
    r"|bucket does not exist|endpoint URL|\b(Put|Get|Head)Object operation"
)
# Shorter values of secret-looking variables ("1", "true") are ordinary words, not secrets.
_SHORTEST_SECRET = 6

_registered_secrets: set[str] = set()
# What was set here, so that a later caller's wish can be told from the user's.
_chosen: dict[str, str] = {}
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"

# Only set where the user has not: MLflow's own defaults wait 120 s and try eight times.
_QUIET_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "AWS_MAX_ATTEMPTS": "2",  # boto3 asks five times, and waits two minutes for each answer
    "GIT_PYTHON_REFRESH": "quiet",
}
_NOISY_LOGGERS = ("mlflow", "alembic", "urllib3.connectionpool")


def is_secret_key(key: str) -> bool:
    """Whether a config key's or variable's name says that its value is a secret (``mlflow.token``)."""
    return bool(_SECRET_KEY.search(key))


def mask_secrets(text: str, environ: Mapping[str, str] | None = None) -> str:
    """Return ``text`` with every secret replaced by ``***``.

    Covered are user names and passwords in URLs, tokens in URL queries, the values of environment variables
    whose names speak of a secret (``MLFLOW_TRACKING_PASSWORD``), and the credentials of every tracking URI
    that :func:`clean_tracking_uri` has seen.
    """
    environ = os.environ if environ is None else environ
    secrets = set(_registered_secrets)
    secrets.update(
        value for name, value in environ.items() if len(value) >= _SHORTEST_SECRET and _SECRET_VARIABLE.search(name)
    )
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return mask_urls(text)


def inherited_tracking_uri(configured: str) -> str:
    """The tracking URI that is to be used: that of the `mlflow run` which started us, or the configured one.

    `mlflow run` has made a run on its own server and named both in the environment; a config that turns tracking off
    ("") is heeded all the same.
    """
    inherited = os.environ.get("MLFLOW_TRACKING_URI") if os.environ.get("MLFLOW_RUN_ID") else None
    return (inherited or configured) if configured else ""


def clean_tracking_uri(uri: str) -> str:
    """Return the tracking URI in the form that is safe to hand to MLflow from any directory.

    - ``http(s)://user:password@host``: the credentials move to ``MLFLOW_TRACKING_USERNAME`` and
      ``MLFLOW_TRACKING_PASSWORD``, where MLflow looks for them, so that no error message can repeat them;
    - a relative SQLite path becomes absolute;
    - a database URI keeps its password (SQLAlchemy needs it), which is masked from then on.
    """
    if uri.startswith("sqlite:///"):
        name, mark, query = uri.removeprefix("sqlite:///").partition("?")
        if name and name != ":memory:":
            return f"sqlite:///{os.path.abspath(name)}{mark}{query}"
        return uri
    parts = urlsplit(uri)
    if parts.password:
        _remember_secret(parts.password)
    if parts.scheme in ("http", "https") and "@" in parts.netloc:
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return uri


def _remember_secret(encoded: str) -> None:
    plain = unquote(encoded)
    _registered_secrets.update(
        form for form in (encoded, plain, quote(plain, safe="")) if len(form) >= _SHORTEST_SECRET
    )


def prepare(timeout: int, retries: int) -> None:
    """Import MLflow (seconds, the first time), silenced.

    Parameters
    ----------
    timeout, retries:
        Seconds to wait for one HTTP answer, and how often MLflow itself asks again; environment variables
        that the user has set win.
    """
    wanted = {_TIMEOUT: str(timeout), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries), **_QUIET_DEFAULTS}
    for name, value in wanted.items():
        if os.environ.get(name) in (None, _chosen.get(name)):
            os.environ[name] = _chosen[name] = value
    import mlflow.tracking  # noqa: F401

    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def connect(uri: str, *, timeout: int = 10, retries: int = 0) -> MlflowClient:
    """Return a client of the store at ``uri`` (from :func:`clean_tracking_uri`).

    A SQLite store that is not there is created, with its folder, which takes seconds. Raises whatever MLflow raises:
    :func:`explain` makes it readable.
    """
    prepare(timeout, retries)
    if uri.startswith("sqlite:////"):
        Path(uri.removeprefix("sqlite:///").partition("?")[0]).parent.mkdir(parents=True, exist_ok=True)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


@contextmanager
def patience(seconds: int) -> Iterator[None]:
    """Let HTTP requests take ``seconds`` inside: a server answers an upload once it has stored all of it.

    A timeout that the user has set stays.
    """
    before = os.environ.get(_TIMEOUT)
    if before is not None and before == _chosen.get(_TIMEOUT) and float(before) < seconds:
        os.environ[_TIMEOUT] = str(seconds)
    try:
        yield
    finally:
        if before is not None:
            os.environ[_TIMEOUT] = before


def error_code(error: BaseException) -> str:
    """MLflow's name of the error (``RESOURCE_DOES_NOT_EXIST``), or an empty string."""
    code: Any = getattr(error, "error_code", "")
    return code if isinstance(code, str) else ""


def is_forbidden(error: BaseException) -> bool:
    """Whether the server knows the user and refuses; with basic authentication also what it does not have."""
    return error_code(error) == "PERMISSION_DENIED" or bool(re.search(r"\berror code 403\b", str(error)))


def explain(error: BaseException) -> str:
    """Say in one line, without secrets, what went wrong with MLflow, with a hint where one is known."""
    text = " ".join(str(error).split()) or type(error).__name__
    # Of whole response bodies the beginning tells what they are; what boto3 says comes last, after long paths.
    text = mask_secrets(text)
    text = text if len(text) <= 300 else f"{text[:180]}...{text[-117:]}"
    lower = str(error).lower()
    if isinstance(error, ImportError) and "boto3" in lower:
        return f"{text} (artifacts on S3 need boto3: pip install boto3)"
    if _S3_TROUBLE.search(str(error)):
        return f"{text} (check the bucket, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and MLFLOW_S3_ENDPOINT_URL)"
    if _REFUSED.search(lower) or error_code(error) in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return f"{text} (check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN)"
    return text
