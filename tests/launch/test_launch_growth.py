"""A long run holds no more at its end than at its beginning, with everything in it that recurs."""

import json
from pathlib import Path

import pytest
from kill_soak import make_critic
from ranks import run_ranks
from test_launch_exact_resume import PHASES

from wmtp_ds.checkpoint_files import complete_checkpoints

pytestmark = pytest.mark.launch

# Of the long version in tests/soak: weighed after the first number and the second.
LONG = (100, 500)
SHORT = (60, 180)


def job(root: Path, stage: str, steps: tuple[int, int]) -> dict:
    """Epochs of 24 steps, with tracking, evaluations, exports of the best and checkpoints all along."""
    early, late = steps
    override = [
        f'checkpoint.save_dir="checkpoints/growth-{stage}"',
        f"training.max_steps={late}",
        "training.n_epochs=1000.0",
        "data_sampling.n_samples=24",
        "training.batch_size=1",
        "training.gradient_accumulation_steps=1",
        "training.log_interval=5",
        f"training.eval_interval={early // 3}",
        f"checkpoint.save_checkpoint_every={early / 2 / 24}",
        "checkpoint.save_total_limit=2",
        "early_stopping.enabled=true",
        "early_stopping.patience=100000",
        "stability.spike_factor=100.0",
        f'mlflow.tracking_uri="sqlite:///{root}/growth-{stage}.db"',
    ]
    if stage != "baseline":  # whose epochs are permutations
        override += ["data_sampling.curriculum_learning=true", f"data_sampling.curriculum_schedule={PHASES}"]
    if stage == "verifiable":
        override.append(f"experiment.critic_checkpoint={json.dumps(str(make_critic(root)))}")
    config = f"stage_configs/local/{stage}.toml"
    return {"stage": stage, "config": config, "override": override, "weigh_every": early // 2}


def weigh(
    root: Path, stages: tuple[str, ...], ranks: int, steps: tuple[int, int]
) -> dict[tuple[str, int], dict[int, dict[str, int]]]:
    """(stage, rank) -> step -> what the rank held after it; each stage has its own processes."""
    found = {}
    for stage in stages:
        file = root / f"growth-{stage}-{ranks}.json"
        file.write_text(json.dumps([job(root, stage, steps)]))
        done = run_ranks(Path(__file__).with_name("growth_driver.py"), [str(file)], ranks, root, timeout=3000)
        assert done.returncode == 0, done.stdout
        folder = root / f"checkpoints/growth-{stage}"
        assert len(complete_checkpoints(folder)) == 2
        for rank in range(ranks):
            lines = map(json.loads, (folder / f"held-{rank}.jsonl").read_text().splitlines())
            found[stage, rank] = {held["step"]: held for held in lines}
    return found


def check(held: dict[int, dict[str, int]], steps: tuple[int, int]) -> None:
    """Within 2 % of memory, and no more of anything else."""
    early, late = (held[step] for step in steps)
    assert late["rss"] < 1.02 * early["rss"], held
    for name in ("files", "threads", "children"):
        # What happens to be open at a moment differs; what is never closed grows with every checkpoint.
        assert late[name] <= early[name] + 1, held


def test_a_long_run_does_not_grow(workspace: Path) -> None:
    for held in weigh(workspace, ("rho1",), 1, SHORT).values():
        check(held, SHORT)
