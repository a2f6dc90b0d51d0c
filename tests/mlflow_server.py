"""A real MLflow server with basic authentication, and a proxy before it that misbehaves as told."""

import base64
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from wmtp_ds.meeting import free_port

ADMIN = ("admin", "adm1n of the t3sts")
# Of the user that trains. What must be quoted in a URL is in it.
USER, PASSWORD = "trainer", "p/ss w0rd:tr41ner"
# Of one who may read, by default, and nothing else.
READER, READER_PASSWORD = "reader", "only t0 look at"


class MlflowServer:
    """`mlflow server --app-name basic-auth` on a free port, its stores in a folder; SQLite.

    Args:
        folder: for its databases, artifacts and log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "auth.ini").write_text(
            "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
            f"database_uri = sqlite:///{folder}/users.db\n"
            # Checking a password takes 50 ms of a core, each time.
            "auth_cache_ttl_seconds = 3600\n"
        )

    def start(self) -> None:
        """Start it, and return once it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_"))}
        environment |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "for the forms of its pages",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with (self.folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its workers end with it
            )
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            except OSError:
                assert self._process.poll() is None, (self.folder / "log.txt").read_text()
                assert time.monotonic() < deadline, "the MLflow server did not start"
                time.sleep(0.1)

    def kill(self) -> None:
        """End it at once, with its workers; harmless if it has ended."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def add_user(self, name: str, password: str) -> None:
        """A user who may read everything and make experiments."""
        request = urllib.request.Request(
            f"{self.uri}/api/2.0/mlflow/users/create",
            json.dumps({"username": name, "password": password}).encode(),
            {"Content-Type": "application/json", "Authorization": basic(*ADMIN)},
        )
        urllib.request.urlopen(request, timeout=30).close()


def basic(user: str, password: str) -> str:
    """The header of basic authentication."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


class FaultyProxy:
    """Passes requests on to the real server, unless ``mode`` says otherwise."""

    def __init__(self, target: str) -> None:
        self.mode: str = "ok"
        self.delay = 0.0
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
                if proxy.mode == "drop":  # the connection ends without an answer
                    return
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
        self._handler = Handler
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.open()
        self.uri = f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        """Answer; again, after :meth:`close`, under the same address."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._port = self._server.server_address[1]
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def respond(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, str, bytes]:
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
        """Refuse connections, as a machine does whose server has died; harmless if it does so already."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
