"""The arm that has the reference's losses at hand, as batches bring them with ``models.reference.scores``."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import Any

import torch

from wmtp_ds import distributed
from wmtp_ds.bench.memory import PeakMemory
from wmtp_ds.data.batches import Batch
from wmtp_ds.train import Training

LIVE, SCORES = "live", "scores"


class Scores:
    """Steps with the live reference and without it, in one process, on the same micro-batches.

    Weights are random and of no file, so losses are not read from one: they are computed before the clock starts. What
    reading them costs is the loader's thread's, which has them ready before the step.
    """

    def __init__(self, training: Training, memory: PeakMemory):
        assert training.reference is not None, "the stage has a reference"
        self._training, self._memory, self._reference = training, memory, training.reference
        self._windows: list[list[Batch]] = []  # with their scores
        self._seconds: dict[str, list[float]] = {LIVE: [], SCORES: []}

    def interleave(self, warmup: int, steps: int) -> None:
        """Take each step both ways, in turn; the one that comes first changes from step to step."""
        training = self._training
        with closing(training.data.windows(0, distributed.rank(), distributed.world_size())) as windows:
            for number, window in enumerate(islice(windows, warmup + steps)):
                scored = [self._with_scores(batch) for batch in window]
                for arm in (LIVE, SCORES) if number % 2 else (SCORES, LIVE):
                    training.reference = self._reference if arm == LIVE else None
                    seconds = self._time(window if arm == LIVE else scored)
                    if number >= warmup:
                        self._seconds[arm].append(seconds)
                if number >= warmup:
                    self._windows.append(scored)
        training.reference = self._reference

    def _with_scores(self, batch: Batch) -> Batch:
        return replace(batch, reference=self._reference(batch.to(self._training.device)).cpu())

    def _time(self, window: Sequence[Batch]) -> float:
        self._synchronize()
        began = time.perf_counter()
        self._training.take_step(list(window))
        self._synchronize()
        return time.perf_counter() - began

    def without_reference(self) -> dict[str, Any]:
        """Let go of the reference; the figures, of the rank that needs the most.

        Returns:
            ``live_seconds`` and ``scores_seconds`` of the median step, all steps of this rank as ``…_each``, and
            ``memory`` as `PeakMemory` has it.
        """
        training = self._training
        self._reference.close()
        training.reference = None
        del self._reference
        self._memory.start()
        for window in self._windows:
            training.take_step(window)
        held = self._memory.stop()
        medians = [median(self._seconds[arm]) for arm in (LIVE, SCORES)]
        numbers = torch.tensor([*medians, *held.values()], dtype=torch.float64).to(training.device)
        live, cached, *memory = distributed.max_over_ranks(numbers).tolist()
        return {
            "live_seconds": live,
            "scores_seconds": cached,
            **{f"{arm}_seconds_each": seconds for arm, seconds in self._seconds.items()},
            "memory": dict(zip(held, memory, strict=True)),
        }

    def _synchronize(self) -> None:
        if self._training.device.type == "cuda":
            torch.cuda.synchronize(self._training.device)
