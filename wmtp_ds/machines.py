"""Whether the machines of a run see the same: ranks read files each on its own."""

import socket
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp_ds import distributed
from wmtp_ds.config import Resolved
from wmtp_ds.errors import UserError
from wmtp_ds.files import sha256_of

if TYPE_CHECKING:
    from wmtp_ds.run_data import RunData
    from wmtp_ds.run_folder import RunFolder


def check_machines(resolved: Resolved, folder: "RunFolder", data: "RunData", critic: Path | None) -> None:
    """Every machine must see one folder of checkpoints, and the same config, data and critic. Collective.

    Args:
        resolved: the run's config.
        folder: locked by rank 0.
        data: the run's data.
        critic: the value head's file, on one rank of each machine at least; None elsewhere.

    Raises:
        UserError: on every rank, naming the machines and what differs.
    """
    folder.check_shared(resolved.config.runtime.peer_timeout)
    facts = {
        "the config": resolved.hash(),
        f"dataset.train ({data.train.path})": data.train.fingerprint,
        f"dataset.validation ({data.validation.path})": data.validation.fingerprint,
    }
    if data.scores is not None:
        facts[f"models.reference.scores ({data.scores.folder})"] = data.scores.manifest.checksum()
    if critic is not None:
        facts[f"the critic ({resolved.config.experiment.critic_checkpoint})"] = sha256_of(critic)
    views = distributed.gather_objects((socket.gethostname(), facts))
    first_host, first = views[0]
    for what, value in first.items():
        others = sorted({host for host, seen in views if seen.get(what, value) != value})
        if others:
            raise UserError(f"{what} is another on {', '.join(others)} than on {first_host}. Copy it to all machines.")
