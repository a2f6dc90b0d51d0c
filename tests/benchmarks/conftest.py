"""One small run of the benchmark for all tests, and ways to start others."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from wmtp_ds.cli.main import main

REPOSITORY = Path(__file__).resolve().parents[2]
MEASURED = ("weighted", "td", "rho1-sequence", "rho1-batch", "reference", "torch-chunked-none")
ABSENT = ("liger-none", "cut-exact")  # skipped without a GPU, whether installed or not


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small products are slower on many threads, by far where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_here(*arguments: str) -> tuple[int, str, str]:
    """``wmtp-ds bench kernels`` in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(["bench", "kernels", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def call() -> Callable[..., tuple[int, str, str]]:
    return run_here


@pytest.fixture(scope="session")
def alone() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``python -m benchmarks`` with the folder kernels/ on the path, from elsewhere; ``code`` runs after it."""

    def start(
        arguments: list[str], code: str = "", environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        program = f"""
import runpy, sys
sys.argv = ["benchmarks", *{arguments!r}]
try:
    runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
except SystemExit as ended:
    left_with = ended.code
{code}
sys.exit(left_with)
"""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WMTP_")}
        kept |= {"PYTHONPATH": str(REPOSITORY / "kernels"), **(environment or {})}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, cwd="/", env=kept, capture_output=True, text=True, timeout=120)

    return start


@dataclasses.dataclass
class Ran:
    code: int
    out: str
    err: str
    folder: Path
    document: dict[str, Any]
    measured: tuple[str, ...] = MEASURED
    absent: tuple[str, ...] = ABSENT


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A quick run of some arms on the CPU, two of them absent, at all sizes."""
    folder = tmp_path_factory.mktemp("bench") / "new" / "folder"
    names = ",".join(MEASURED + ABSENT)
    code, out, err = run_here("--quick", "--device", "cpu", "--arms", names, "--output", str(folder), "--json")
    return Ran(code, out, err, folder, json.loads(out))


@pytest.fixture(scope="session")
def middle() -> Callable[[list[float]], list[float]]:
    """Median, least and greatest, in another way than the program's."""

    def of(values: list[float]) -> list[float]:
        ordered = sorted(values)
        half = len(ordered) // 2
        median = ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
        return [median, ordered[0], ordered[-1]]

    return of
