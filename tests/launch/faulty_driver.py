"""What the launcher starts for tests of bad numbers: as driver.py, with faults in chosen rows.

A job's ``faults`` are lists ``[step, draw, kind]``: the row that is draw ``draw`` of step ``step`` makes

- ``loss-nan``, ``loss-inf``: a loss that is not finite, with finite gradients;
- ``gradient``: a finite loss with gradients that are NaN;
- ``steep``: gradients a million times as large, which float16 holds only under a smaller loss scale;
- ``high``: a loss that is higher by 100, with the same gradients;

and ``[step, null, "gone"]`` takes a step's rows out of the plan. Rank 0 writes each job's end to ``ends.json``: exit
code, or the error. Early stopping of the other ranks is not to be asked.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import wmtp_ds.train
from wmtp_ds import distributed
from wmtp_ds.early_stopping import EarlyStopping
from wmtp_ds.errors import RunError
from wmtp_ds.launch import Place, Request
from wmtp_ds.rank import quiet
from wmtp_ds.run_data import RunData, open_data
from wmtp_ds.signals import Interruption
from wmtp_ds.stages.base import StageModel

SHOULD_STOP = EarlyStopping.should_stop
PLAIN_FORWARD = StageModel.forward


class SpoiltGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def spoil(loss: Tensor, kind: str) -> Tensor:
    if kind in ("gradient", "steep"):
        spoilt: Tensor = SpoiltGradient.apply(loss, float("nan") if kind == "gradient" else 1e6)
        return spoilt
    return loss + {"loss-nan": float("nan"), "loss-inf": float("inf"), "high": 100.0}[kind]


def faulty_open_data(faults: list[tuple[int, int, str]], kinds: dict[int, str]):
    """`open_data` that notes which rows are faulty, and takes steps out of the plan."""

    def opened(resolved: Any, world_size: int) -> RunData:
        data = open_data(resolved, world_size)
        for step, draw, kind in faults:
            plan = data.plan
            if kind == "gone":
                first = (step - 1) * plan.global_batch
                draws = np.delete(plan.draws, range(first, first + plan.global_batch))
                data.plan = replace(plan, draws=draws)
            else:
                kinds[int(plan.rows(step - 1)[draw])] = kind
        return data

    return opened


def faulty_forward(kinds: dict[int, str]):
    def forward(self: StageModel, batch: Any, totals: Any = None, reference: Any = None, mode: str = "loss") -> Any:
        found = PLAIN_FORWARD(self, batch, totals, reference, mode)
        if mode != "loss":
            return found
        loss, *rest = found
        for row in batch.host.row_ids.tolist():
            if row in kinds:
                loss = spoil(loss, kinds[row])
        return (loss, *rest)

    return forward


def interrupted_in(step: int) -> type[Interruption]:
    """An interruption by a signal that comes while the given call of take_step is made, on the last rank alone."""

    class Scheduled(Interruption):
        seen = 0

        @property
        def signal(self) -> int:
            self.seen += 1
            last = distributed.rank() == distributed.world_size() - 1
            return signal.SIGTERM if self.seen >= step and last else 0

        @signal.setter
        def signal(self, value: int) -> None:
            pass

    return Scheduled


def pretend_float16() -> None:
    """CPUs compute in float16, too slowly for anyone to train with it; here it shows what the loss scale does."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def refuse(*_: Any) -> bool:
    raise AssertionError("rank 0 decides")


def main() -> None:
    """Run the jobs of a JSON file."""
    jobs_file = Path(sys.argv[-1])
    torch.set_num_threads(1)
    quiet("warning", Place(0, 0, 1, 1))
    wmtp_ds.train.plot_losses = lambda _, picture: picture.touch()  # pictures are tested elsewhere
    pretend_float16()
    ends = []
    for job in json.loads(jobs_file.read_text()):
        resolved = Request(stage=job["stage"], config=Path(job["config"]), override=tuple(job["override"])).load()
        kinds: dict[int, str] = {}
        wmtp_ds.train.open_data = faulty_open_data(job.get("faults", []), kinds)
        StageModel.forward = faulty_forward(kinds)
        stop_in = job.get("stop_in")
        wmtp_ds.train.Interruption = interrupted_in(stop_in) if stop_in else Interruption
        EarlyStopping.should_stop = SHOULD_STOP if os.environ["RANK"] == "0" else refuse
        try:
            ends.append(wmtp_ds.train.train(resolved, resume=job.get("resume", "never")))
        except RunError as error:
            ends.append(f"{type(error).__name__}: {error}")
            assert len(set(distributed.gather_objects(ends[-1]))) == 1, "ranks end alike"
    if distributed.is_main():
        jobs_file.with_name("ends.json").write_text(json.dumps(ends))
    print("all jobs done", flush=True)


main()
