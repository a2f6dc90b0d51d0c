"""A SQLite store, a real MLflow server, and a proxy before it that misbehaves as told."""

import base64
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from wmtp_ds import mlflow_client, tracking


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    """Defaults that MLflow's client needs are set in the process; each test gets its own."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AWS_"))]:
        monkeypatch.delenv(name)
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(tracking, "FLUSH_INTERVAL", 0.05)
    monkeypatch.setattr(tracking, "LONGEST_INTERVAL", 0.2)


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> str:
    """One SQLite store for all tests: its first opening takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    here = os.getcwd()
    os.chdir(Path(uri.removeprefix("sqlite:///")).parent)  # MLflow puts artifacts into the current folder
    try:
        mlflow_client.connect(uri).search_experiments()
    finally:
        os.chdir(here)
    return uri


@pytest.fixture
def client(store):
    return mlflow_client.connect(store)


@pytest.fixture
def config(store, tmp_path):
    """An ``mlflow`` table with an experiment of its own, whose artifacts lie in ``tmp_path``."""
    return SimpleNamespace(
        tracking_uri=store,
        experiment=tmp_path.name,
        s3_artifacts=f"file://{tmp_path}/artifacts",
        parent_run_id="",
    )


class FaultyProxy:
    """Passes requests on to the real server, unless ``mode`` says otherwise."""

    def __init__(self, target: str) -> None:
        self.mode: str = "ok"
        self.delay = 0.0
        self.credentials = ""  # user:password that requests must bring
        self.requests = 0
        host, port = target.removeprefix("http://").split(":")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def do_GET(self) -> None:
                proxy.requests += 1
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                time.sleep(proxy.delay)
                self.answer(*proxy.respond(self.command, self.path, body, dict(self.headers)))

            do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

            def answer(self, status: int, kind: str, body: bytes) -> None:
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    pass  # the client has given up

            def log_message(self, *arguments: object) -> None:
                pass

        self._target = (host, int(port))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def respond(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, str, bytes]:
        if self.credentials:
            wanted = "Basic " + base64.b64encode(self.credentials.encode()).decode()
            if headers.get("Authorization") != wanted:
                return 401, "text/plain", b"You are not authenticated."
        if self.mode == "500":
            return 500, "text/html", b"<h1>Internal Server Error</h1>"
        if self.mode == "401":
            return 401, "text/plain", b"You are not authenticated."
        if self.mode == "400":
            return 400, "application/json", b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}'
        if self.mode == "404":
            return 404, "text/html", b"not found"
        if self.mode == "garbage":
            return 200, "text/html", b"<html>Please log in to the hotel's network</html>"
        if self.mode == "empty":
            return 200, "application/json", b"{}"
        if self.mode == "hang":
            time.sleep(3.0)
            return 500, "text/plain", b"late"
        status, kind, answer = self._forward(method, path, body, headers)
        if self.mode == "lose answers":  # the server did it, and nobody hears of it
            return 502, "text/plain", b"bad gateway"
        if self.mode == "no artifacts" and method == "PUT":
            return 507, "text/plain", b"no space left"
        return status, kind, answer

    def _forward(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, str, bytes]:
        connection = http.client.HTTPConnection(*self._target, timeout=30)
        kept = {name: value for name, value in headers.items() if name.lower() not in ("host", "connection")}
        connection.request(method, path, body=body, headers=kept)
        response = connection.getresponse()
        return response.status, response.headers.get("Content-Type", ""), response.read()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[str]:
    """A real MLflow server, as its own command starts it."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = (folder / "log.txt").open("wb")
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    uri = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    try:
        while True:
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log.txt").read_text()
                assert time.monotonic() < deadline, "the MLflow server did not start"
                time.sleep(0.1)
        yield uri
    finally:
        process.terminate()
        process.wait(20)
        log.close()


@pytest.fixture
def proxy(server) -> Iterator[FaultyProxy]:
    faulty = FaultyProxy(server)
    yield faulty
    faulty.close()


def points(client, run_id: str, name: str) -> list[tuple[int, float]]:
    """Every (step, value) of a metric that MLflow has, duplicates and all."""
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


@pytest.fixture(name="points")
def _points_fixture():
    return points
