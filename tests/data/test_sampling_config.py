"""Sampling as the stages' own configs ask for it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from wmtp_ds.config import load_config
from wmtp_ds.data.sampling import count_steps, epoch_size, sample_plan

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "stage_configs").rglob("*.toml"))


def columns(rows: int) -> Any:
    random = np.random.default_rng(0)
    return SimpleNamespace(
        path=Path("train.jsonl"),
        is_correct=random.random(rows) < 0.4,
        difficulty=random.integers(0, 12, rows).astype(np.int32),
    )


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_each_stage_config_gives_a_plan(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(path, environ={}, checks=False).config
    index = columns(400_000)
    sampling, training = config.data_sampling, config.training
    rows = epoch_size(index, sampling)
    assert rows == sampling.n_samples or sampling.n_samples is None
    global_batch = 4 * training.batch_size * training.gradient_accumulation_steps
    steps = count_steps(training.n_epochs, rows, global_batch, training.max_steps)
    plan = sample_plan(index, sampling, total_steps=steps, global_batch=global_batch)
    assert len(plan.draws) == steps * global_batch
    ratio = index.is_correct[plan.draws].mean()
    if sampling.balance_correct or sampling.correct_ratio == 1:
        assert ratio == pytest.approx(sampling.correct_ratio, abs=0.5 / len(plan.draws) * len(plan.phases) + 1e-12)
    assert len(plan.phases) == (len(sampling.curriculum_schedule) if sampling.curriculum_learning else 1)


def test_the_production_curriculum(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(Path("stage_configs/verifiable.toml"), environ={}, checks=False).config
    plan = sample_plan(columns(400_000), config.data_sampling, total_steps=1000, global_batch=64)
    assert plan.phases == ((0, 19_200), (19_200, 44_800), (44_800, 64_000))
    high = [sum(n for d, n in phase["difficulty"].items() if d >= 8) for phase in plan.summary()["phases"]]
    assert high == [0, 2560, 7680]
    assert plan.summary()["correct"] == 32_000
