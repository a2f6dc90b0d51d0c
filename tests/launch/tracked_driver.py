"""One run of which is written down how long its loop waited for the tracker, and where each rank has connected to."""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import wmtp_ds.train
from wmtp_ds import distributed, tracking
from wmtp_ds.launch import Place, Request
from wmtp_ds.rank import quiet

CONNECTED: list[int] = []  # the ports
SPENT = {"in_loop": False, "calls": 0, "seconds": 0.0}


def listen(event: str, arguments: tuple[Any, ...]) -> None:
    """Note every connection that Python makes in this process."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        CONNECTED.append(arguments[1][1])


def timed(name: str) -> None:
    """Count the time of a tracker's method, where the loop calls it."""
    method = getattr(tracking.MlflowTracker, name)

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if not SPENT["in_loop"] or threading.current_thread() is not threading.main_thread():
            return method(self, *arguments, **keywords)
        began = time.perf_counter()
        try:
            return method(self, *arguments, **keywords)
        finally:
            SPENT["calls"] += 1
            SPENT["seconds"] += time.perf_counter() - began

    setattr(tracking.MlflowTracker, name, call)


class Watched(wmtp_ds.train.Training):
    """Says when its loop begins and ends, and how long it took."""

    def _loop(self, *arguments: Any) -> int:
        (out / f"begun-{distributed.rank()}").touch()
        began = time.perf_counter()
        SPENT["in_loop"] = True
        signal = super()._loop(*arguments)
        SPENT["in_loop"] = False
        figures = SPENT | {"loop": time.perf_counter() - began}
        (out / f"ended-{distributed.rank()}.json").write_text(json.dumps(figures))
        return signal


sys.addaudithook(listen)
tracking.FLUSH_INTERVAL = tracking.LONGEST_INTERVAL = 0.1  # so that the server is asked all the time
out = Path(sys.argv[1])
job = json.loads(sys.argv[2])
torch.set_num_threads(1)
quiet("warning", Place(0, 0, 1, 1))
for public in [name for name in vars(tracking.Tracker) if not name.startswith("_")]:
    if callable(getattr(tracking.MlflowTracker, public)):
        timed(public)
wmtp_ds.train.Training = Watched
resolved = Request(stage=job["stage"], config=Path(job["config"]), override=tuple(job["override"])).load()
code = wmtp_ds.train.train(resolved)
(out / f"connected-{distributed.rank()}.json").write_text(json.dumps(CONNECTED))
assert code == 0, code
print("done", flush=True)
