"""What each rank runs to watch a sharded load: each rank writes what it held in memory, at most and at the end."""

import ctypes
import json
import sys
import threading
import time
from pathlib import Path

import torch

from wmtp_ds import distributed, engine
from wmtp_ds.models.loading import load_policy

_M_MMAP_THRESHOLD = -3  # of malloc.h
CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "gradient_clipping": 0.0}


def anonymous_bytes() -> int:
    """Memory that belongs to this process alone; file pages that the kernel may drop do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


class Peak(threading.Thread):
    """Samples this process's memory until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            self.highest = max(self.highest, anonymous_bytes())
            time.sleep(0.001)


def main() -> None:
    small, *folders, output = map(Path, sys.argv[-4:])
    # Freed blocks go back to the system at once, so that memory held and memory in use are the same.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 65536)
    engine.start("cpu")
    torch.set_num_threads(1)
    sharding = engine.Zero3Sharding(CONFIG)
    load_policy(small, sharding=sharding)  # buffers of the communication, lazily imported modules
    for folder in folders:
        held = watch_load(folder, sharding)
        (output / f"{folder.name}-{distributed.rank()}.json").write_text(json.dumps(held))


def watch_load(folder: Path, sharding: engine.Zero3Sharding) -> dict:
    before = anonymous_bytes()
    peak = Peak()
    peak.start()
    policy = load_policy(folder, sharding=sharding)
    peak.stop.set()
    peak.join()
    held = {"peak": peak.highest - before, "end": anonymous_bytes() - before}
    held["whole"] = sum(p.numel() for p in policy.parameters())  # parameters that are not partitioned
    held["sums"] = []
    for parameter in policy.parameters():
        with sharding.gathered(parameter):
            held["sums"].append(parameter.double().sum().item())
    return held


main()
