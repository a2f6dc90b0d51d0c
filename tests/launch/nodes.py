"""Several "machines" on this one, of ranks forked as in ranks.py: each has a folder and a log of its own.

What starts commands on machines is tested in test_launch_slurm.py. Here only what ranks do matters.
"""

import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Self

from conftest import environment
from ranks import be_a_rank, fork

from wmtp_ds.meeting import free_port


class Nodes:
    """A world of ``nodes`` machines with ``ranks`` ranks each; whatever is left of it is killed at the end.

    A rank's one thread makes two machines add up as one does, whatever each finds of this one's cores.
    """

    def __init__(
        self, script: Path, arguments: Sequence[str], folders: Sequence[Path], ranks: int = 1, **variables: str
    ):
        self.logs = [folder / f".node-{number}-{time.monotonic_ns()}.log" for number, folder in enumerate(folders)]
        self.ranks: list[list[BaseProcess]] = []
        world = {"WORLD_SIZE": str(len(folders) * ranks), "LOCAL_SIZE": str(ranks), "CROSS_SIZE": str(len(folders))}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"} | variables
        for node, (folder, log) in enumerate(zip(folders, self.logs, strict=True)):
            log.touch()
            started = []
            for local in range(ranks):
                place = {"CROSS_RANK": str(node), "LOCAL_RANK": str(local), "RANK": str(node * ranks + local)}
                variables = environment() | world | place
                started.append(fork(be_a_rank, str(script), list(arguments), str(folder), variables, str(log)))
            self.ranks.append(started)

    def said(self, node: int) -> str:
        return self.logs[node].read_text()

    def wait_for(self, node: int, text: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.said(node):
            assert time.monotonic() < deadline, self.said(node)
            assert any(process.is_alive() for process in self.ranks[node]), self.said(node)
            time.sleep(0.05)

    def signal(self, node: int, number: int) -> None:
        for process in self.ranks[node]:
            assert process.pid is not None
            os.kill(process.pid, number)

    def wait(self, node: int, seconds: float = 120) -> list[int | None]:
        """The exit codes of a machine's ranks; the first of them to fail ends the others, as under a launcher."""
        ranks, deadline = self.ranks[node], time.monotonic() + seconds
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            if any(process.exitcode for process in ranks):
                for process in ranks:
                    process.terminate()
                break
            time.sleep(0.05)
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in ranks]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (process for node in self.ranks for process in node):
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGKILL)
            process.join()
