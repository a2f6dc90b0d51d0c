"""Where the ranks of a run meet: on this machine, or on the first of several.

On several machines whatever starts commands there (srun, ssh) tells each of them the same address, and its number.
"""

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wmtp_ds.errors import UserError

if TYPE_CHECKING:
    from wmtp_ds.launch import Request

# DeepSpeed's own.
MASTER_PORT = 29500


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of all machines meet, and which of them this is."""

    nnodes: int
    node_rank: int
    address: str
    port: int

    @classmethod
    def of(cls, request: "Request", environ: Mapping[str, str]) -> "Meeting":
        """As the request says; a free port on this machine if it says nothing.

        Raises:
            UserError: if it says half of it, or srun has started more of these commands than it knows of.
        """
        nnodes = request.nnodes or 1
        _check_tasks(nnodes, environ)
        named = {"--node_rank": request.node_rank, "--master_addr": request.master_addr}
        if request.nnodes is None and (given := [name for name, value in named.items() if value is not None]):
            raise UserError(f"{given[0]} needs --nnodes: the number of machines, each of which runs this command.")
        if (request.node_rank or 0) >= nnodes:
            raise UserError(f"--node_rank {request.node_rank}: with --nnodes {nnodes} it is at most {nnodes - 1}.")
        if nnodes == 1:
            return cls(1, 0, "127.0.0.1", request.master_port or free_port())
        if missing := [name for name, value in named.items() if value is None]:
            raise UserError(
                f"--nnodes {nnodes} needs {missing[0]}: --node_rank numbers the machines from 0, --master_addr is the "
                "address of number 0, the same on all."
            )
        assert request.node_rank is not None
        assert request.master_addr is not None
        return cls(nnodes, request.node_rank, request.master_addr, request.master_port or MASTER_PORT)


def _check_tasks(nnodes: int, environ: Mapping[str, str]) -> None:
    """Every task of a SLURM step starts this command: there must be one a machine, and each must know of the others.

    Raises:
        UserError: if not; otherwise each would start a run of its own, in one folder.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    if not tasks.isdecimal() or int(tasks) == nnodes:
        return
    raise UserError(
        f"srun has started {tasks} of these commands, and --nnodes is {nnodes}: one on each machine starts the ranks "
        "there. srun --ntasks-per-node=1 bash -c 'wmtp-ds train … --nnodes $SLURM_NNODES --node_rank $SLURM_NODEID "
        "--master_addr FIRST_HOST' (docs/multinode.md)."
    )


def free_port() -> int:
    """A TCP port on the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
