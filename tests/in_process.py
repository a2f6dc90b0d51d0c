"""Runs commands in this process, as a terminal would see them, with a limit of time on each."""

import io
import os
import signal
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from hypothesis import HealthCheck, Phase, settings

from wmtp_ds.cli.main import main


def examples(count: int) -> settings:
    """The same examples on every machine and every day."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


class Hang(BaseException):
    """A command took longer than it may; no ``except Exception`` catches it."""


@dataclass(frozen=True)
class Done:
    """What came of a command. Anything but an exit, a traceback that is, is raised where it is run."""

    code: int
    out: str
    err: str


def command(*arguments: object, environ: Mapping[str, str] | None = None, seconds: float = 10.0) -> Done:
    """Run ``wmtp-ds`` with these arguments."""
    # Strict: what cannot be encoded must not be printed.
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict", write_through=True) for _ in range(2))

    def too_long(*_: object) -> None:
        raise Hang(f"{seconds} s: {' '.join(map(str, arguments))[:300]}")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    code = 0
    try:
        with redirect_stdout(out), redirect_stderr(err), patch.dict(os.environ, environ or {}):
            main([str(argument) for argument in arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    texts = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    return Done(code, *texts)
