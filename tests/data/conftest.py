"""The kinds of sandbox that this machine has, and what is left of a run."""

import os
import secrets
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from wmtp_ds.data.isolation import KINDS
from wmtp_ds.data.sandbox import sandbox_kind
from wmtp_ds.errors import RunError


def _why_not(kind: str) -> str:
    try:
        sandbox_kind((kind,))
    except RunError as error:
        return f"{kind} does not work here: {str(error).splitlines()[-1].strip()}"
    return ""


@pytest.fixture(params=KINDS)
def kinds(request: pytest.FixtureRequest) -> tuple[str]:
    """Each kind of sandbox that this machine has, alone."""
    why_not = _why_not(request.param)
    if why_not:
        pytest.skip(why_not)
    return (request.param,)


class Traces:
    """Processes and files that carry a name of their own, so that what is left of a run can be found."""

    def __init__(self) -> None:
        self.name = f"t{secrets.token_hex(6)}"
        self.places = [Path(place) for place in ("/tmp", "/var/tmp", "/dev/shm", "/run/lock", tempfile.gettempdir())]

    def mark(self, program: str) -> str:
        """The program, which gives itself the name first; MARK in it is the name, too."""
        named = f"import ctypes\nctypes.CDLL(None).prctl(15, b'{self.name}')\n"
        return named + textwrap.dedent(program).replace("MARK", self.name)

    def processes(self) -> list[str]:
        """Those of that name (as in /proc/PID/comm) that are not zombies."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if (entry / "comm").read_text().strip() == self.name and ") Z " not in (entry / "stat").read_text():
                    found.append(entry.name)
            except OSError:
                continue
        return found

    def files(self) -> list[str]:
        """Those of that name in the folders that everybody may write to."""
        return [str(path) for place in self.places if place.is_dir() for path in place.glob(f"*{self.name}*")]

    def assert_gone(self) -> None:
        """Processes get a moment to end."""
        deadline = time.monotonic() + 5
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.processes() == []
        assert self.files() == []


@pytest.fixture
def traces() -> Iterator[Traces]:
    """Traces of a run, of which nothing may be left when the test is done, nor any private folder of a sandbox."""
    found = Traces()
    before = _private_folders()
    yield found
    found.assert_gone()
    assert _private_folders() <= before


def _private_folders() -> set[str]:
    return {entry.name for entry in os.scandir(tempfile.gettempdir()) if entry.name.startswith("wmtp-sandbox-")}
