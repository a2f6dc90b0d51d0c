"""What the launcher starts in these tests: a rank as ever, that may be doomed.

``DOOM`` is JSON: {"rank": 1, "save": 2, "moment": 5} kills rank 1 before an operation on files in the second save
of this process (half of the bytes are there where that is a write); {"rank": 1, "save": 2, "limit": 1000} lets no file
of rank 1 grow beyond so many bytes in that save, as on a full disk.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from crash import Moments, kill

from wmtp_ds.engine import Engine
from wmtp_ds.rank import main

SAVE = Engine.save_state


def doom(order: dict[str, int]) -> None:
    """Make this process fail as ordered."""
    saves = 0

    def save_state(self: Engine, folder: Path, *arguments: Any, **keywords: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == order["save"]:
            if "limit" in order:
                resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
            else:
                Moments(folder.absolute(), order["moment"], kill).install()
        SAVE(self, folder, *arguments, **keywords)

    Engine.save_state = save_state


if __name__ == "__main__":
    order = json.loads(os.environ.get("DOOM", "{}"))
    if order and int(os.environ["RANK"]) == order["rank"]:
        doom(order)
    # The launcher puts its own option first; what it ran as is of no matter.
    sys.exit(main())
