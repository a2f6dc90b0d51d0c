"""What the loop keeps of bad steps and rollbacks, without an engine; the whole of it runs in tests/launch."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wmtp_ds.train import Progress, Training


@pytest.fixture
def training() -> Any:
    made: Any = Training.__new__(Training)
    made.progress, made.main = Progress(), True
    made.engine, made.tracker = SimpleNamespace(rescaled=False), None
    made.guard = SimpleNamespace(judge=lambda metrics, rescaled: None)
    made.asked = []
    made.stopper = SimpleNamespace(should_stop=lambda seen: bool(made.asked.append(seen)))
    made.config = SimpleNamespace(
        early_stopping=SimpleNamespace(enabled=True), training=SimpleNamespace(bounds_value_variance=True)
    )
    return made


def advance(training: Any, loss: float, **more: float) -> None:
    counts = {"perf/tokens": 8.0, "data/places": 10.0, "perf/data_wait": 0.0}
    training._advance({"train/loss": loss, "optim/grad_norm": 2.0, **counts, **more}, seconds=1.0)


def test_the_first_and_last_loss_are_of_steps_that_were_taken(training):
    for loss in (math.nan, 3.0, 2.0, math.inf):
        advance(training, loss)
    assert (training.progress.step, training.progress.first_loss, training.progress.last_loss) == (4, 3.0, 2.0)


def test_what_early_stopping_is_told(training):
    advance(training, 3.0, **{"train/value_loss": 0.5, "value/std": 0.25})
    assert training.asked == [{"loss": 3.0, "grad_norm": 2.0, "value_loss": 0.5, "value_variance": 0.0625}]


def test_the_variance_is_of_a_stage_that_bounds_it(training):
    training.config.training.bounds_value_variance = False
    advance(training, 3.0, **{"value/std": 0.25})
    assert training.asked == [{"loss": 3.0, "grad_norm": 2.0}]


def test_an_overflow_of_the_loss_scale_is_no_gradient_norm(training):
    training.engine.rescaled = True
    advance(training, 3.0)
    assert training.asked == [{"loss": 3.0}]


def test_a_rollback_keeps_the_best_because_its_export_is_there(training):
    training.progress = Progress(step=9, best=1.0)
    training._restore = lambda source: setattr(training, "progress", Progress(step=4, best=2.0))
    told = []
    training.tracker = SimpleNamespace(go_back=told.append)
    training._roll_back(Path("step_00000004"))
    assert (training.progress.step, training.progress.best) == (4, 1.0)
    assert told == [4], "what is logged again counts"


@pytest.mark.parametrize("source", [None, Path("step_00000007")])
def test_a_resume_tells_the_tracker_from_which_step(training, source, tmp_path, monkeypatch):
    told = []
    tracker = SimpleNamespace(go_back=told.append, log_artifact=lambda *_: None)
    monkeypatch.setattr("wmtp_ds.train.start_tracking", lambda *_, **__: tracker)
    training.folder = SimpleNamespace(root=tmp_path, prepare=lambda _: None, source=lambda *_: source)
    training.checkpoints, training.device, training.tags = None, torch.device("cpu"), {}
    training.resolved = SimpleNamespace(toml=str, hash=str, flat=dict, warnings=[])
    mlflow = SimpleNamespace(log_weights=False)
    training.config = SimpleNamespace(experiment=SimpleNamespace(tags={}, stage="critic"), mlflow=mlflow)
    plan = SimpleNamespace(warnings=[], global_batch=4)
    training.data = SimpleNamespace(plan=plan, too_long=0, total_steps=9, train=[])
    training.display = SimpleNamespace(say=lambda _: None)
    training._restore = lambda _: setattr(training.progress, "step", 7)
    training.start("a run")
    assert told == ([] if source is None else [7])


class Windows:
    """The windows of a run, from where they are asked for."""

    def __init__(self, total_steps: int):
        self.total_steps, self.asked, self.closed = total_steps, list[int](), 0

    def windows(self, start: int, rank: int, world_size: int):
        self.asked.append(start)
        try:
            yield from ([step] for step in range(start + 1, self.total_steps + 1))
        finally:
            self.closed += 1


def test_windows_follow_the_run_back(training):
    training.data = Windows(6)
    seen = []
    for window, _ in training._windows():
        seen += window
        training.progress.step += 1
        if window == [5] and seen.count(5) == 1:
            training.progress.step = 3
    assert seen == [1, 2, 3, 4, 5, 4, 5, 6]
    assert (training.data.asked, training.data.closed) == ([0, 3], 2)


def test_windows_follow_the_run_back_from_its_last_step(training):
    training.data = Windows(3)
    seen = []
    for window, _ in training._windows():
        seen += window
        training.progress.step = 2 if seen == [1, 2, 3] else window[0]
    assert seen == [1, 2, 3, 3]
