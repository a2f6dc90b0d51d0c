"""What a rank runs to show that it does not grow: after some of its steps it writes down what it holds."""

import json
import sys
from pathlib import Path

import psutil
import torch

import wmtp_ds.train
from wmtp_ds import distributed
from wmtp_ds.launch import Place, Request
from wmtp_ds.rank import quiet


class Weighed(wmtp_ds.train.Training):
    """Writes bytes of memory, open files, threads and child processes into ``held-RANK.jsonl`` in the run's folder."""

    every = 1

    def take_step(self, window: list, *arguments: object, **keywords: object) -> int:
        signal = super().take_step(window, *arguments, **keywords)
        if self.progress.step % self.every == 0:
            process = psutil.Process()
            held = {
                "step": self.progress.step,
                "rss": process.memory_info().rss,
                "files": process.num_fds(),
                "threads": process.num_threads(),
                "children": len(process.children(recursive=True)),
            }
            with (self.folder.root / f"held-{distributed.rank()}.jsonl").open("a") as stream:
                stream.write(json.dumps(held) + "\n")
        return signal


def main() -> None:
    """Run the jobs of a JSON file, of which each says how often it is weighed."""
    torch.set_num_threads(1)
    quiet("warning", Place(0, 0, 1, 1))
    wmtp_ds.train.Training = Weighed
    for job in json.loads(Path(sys.argv[-1]).read_text()):
        Weighed.every = job["weigh_every"]
        resolved = Request(stage=job["stage"], config=Path(job["config"]), override=tuple(job["override"])).load()
        code = wmtp_ds.train.train(resolved)
        assert code == 0, f"{job} ended with {code}"


main()
