"""Ranks without the launcher: forked from a process that has imported everything, which takes a rank ten seconds.

What the launcher itself does is tested where a command starts it. Here only what it tells the ranks matters.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from conftest import environment

from wmtp_ds.meeting import free_port

PRELOADED = "imported_by_ranks"
_SERVER = multiprocessing.get_context("forkserver")


def fork(work: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start a process that has imported everything."""
    before = os.environ.get("PYTHONPATH")
    # Where the server finds what it is to import: it is given a path, which Python 3.11 forgets, and then says nothing.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    _SERVER.set_forkserver_preload([PRELOADED])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    process = _SERVER.Process(target=_with_all_imported, args=(work, *arguments))
    process.start()
    return process


def spawn(work: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start a process that has imported nothing, for what must be known when a library is imported."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    return process


def _with_all_imported(work: Callable[..., None], *arguments: object) -> None:
    assert PRELOADED in sys.modules, "it could not be imported: try python -c 'import imported_by_ranks'"
    work(*arguments)


def run_ranks(
    script: Path, arguments: Sequence[str], ranks: int, cwd: Path, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script in each of a world's ranks; the first that fails ends the others, as under the launcher.

    Returns:
        The first failing rank's exit code or 0; what all ranks wrote is in ``stdout``.
    """
    log = cwd / f".ranks-{time.monotonic_ns()}.log"
    world = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    world |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(ranks):
        place = environment() | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | variables
        start = spawn if "TRITON_INTERPRET" in variables else fork
        started.append(start(be_a_rank, str(script), list(arguments), str(cwd), place, str(log)))
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in started) and time.monotonic() < deadline:
        if any(process.exitcode for process in started):
            break
        time.sleep(0.05)
    codes = [process.exitcode for process in started]
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()
    said = log.read_text()
    log.unlink()
    failed = [code for code in codes if code != 0]
    return subprocess.CompletedProcess([str(script)], (failed[0] or -9) if failed else 0, said, "")


def be_a_rank(script: str, arguments: list[str], cwd: str, variables: dict[str, str], log: str) -> None:
    """What each of them does."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
