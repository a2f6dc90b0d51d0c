"""What the launcher starts in these tests: a rank as ever, that may be doomed.

``DOOM`` is JSON: {"rank": 1, "save": 2, "moment": 5} kills rank 1 before an operation on files in the second save
of this process; {"rank": 1, "save": 2, "limit": 1000} lets no file
of rank 1 grow beyond so many bytes in that save, as on a full disk.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
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
                moments = Moments(folder.absolute(), order["moment"], kill)
                moments.install()
                watch_torch(moments)
        SAVE(self, folder, *arguments, **keywords)

    Engine.save_state = save_state


def watch_torch(moments: Moments) -> None:
    """Shards are written from C++, tensor by tensor: each is a moment, too."""
    save = torch.serialization._save

    class Writer:
        def __init__(self, file: Any):
            self.file = file

        def write_record(self, *arguments: Any) -> None:
            moments.passes("write", moments.root)
            self.file.write_record(*arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def watched(values: Any, file: Any, *arguments: Any, **keywords: Any) -> None:
        save(values, Writer(file), *arguments, **keywords)

    torch.serialization._save = watched


if __name__ == "__main__":
    order = json.loads(os.environ.get("DOOM", "{}"))
    if order and int(os.environ["RANK"]) == order["rank"]:
        doom(order)
    # The launcher puts its own option first; what it ran as is of no matter.
    sys.exit(main())
