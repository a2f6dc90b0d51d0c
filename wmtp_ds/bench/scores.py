"""The arm that has the reference's losses at hand, as batches bring them with ``models.reference.scores``."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wmtp_ds import distributed
from wmtp_ds.data.batches import Batch
from wmtp_ds.train import Training

LIVE, SCORES = "live", "scores"


class Scores:
    """Steps with the live reference and with its losses at hand, in one process, on the same micro-batches.

    Weights are random and of no file, so losses are not read from one: they are computed before the clock starts. What
    reading them costs is the loader's thread's, which has them ready before the step.
    """

    def __init__(self, training: Training):
        assert training.reference is not None, "the stage has a reference"
        self._training, self._reference = training, training.reference
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
        training.reference = self._reference

    def _with_scores(self, batch: Batch) -> Batch:
        return replace(batch, reference=self._reference(batch.to(self._training.device)).cpu())

    def _time(self, window: Sequence[Batch]) -> float:
        self._synchronize()
        began = time.perf_counter()
        self._training.take_step(list(window))
        self._synchronize()
        return time.perf_counter() - began

    def figures(self) -> dict[str, Any]:
        """``live_seconds`` and ``scores_seconds`` of the slowest rank's median step; this rank's as ``…_each``."""
        numbers = torch.tensor([median(seconds) for seconds in self._seconds.values()], dtype=torch.float64)
        medians = distributed.max_over_ranks(numbers.to(self._training.device)).tolist()
        each = {f"{arm}_seconds_each": seconds for arm, seconds in self._seconds.items()}
        return {f"{arm}_seconds": seconds for arm, seconds in zip(self._seconds, medians, strict=True)} | each

    def _synchronize(self) -> None:
        if self._training.device.type == "cuda":
            torch.cuda.synchronize(self._training.device)


def made_up_losses(row: int, tokens: npt.NDArray[np.integer], supervised: int) -> npt.NDArray[np.float32]:
    """In the place of `ReferenceScores`, where there is no model to compute them with: float32 [supervised]."""
    losses: npt.NDArray[np.float32] = np.random.default_rng(row).uniform(5, 10, supervised).astype(np.float32)
    return losses
