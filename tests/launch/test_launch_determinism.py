"""On two ranks: `runtime.seed` fixes everything. The same run in other processes has the same bits."""

import json
from pathlib import Path

import pytest
from kill_soak import make_critic, metrics, plain, same
from safetensors.torch import load_file
from test_launch_exact_resume import PHASES
from test_launch_parity import start

pytestmark = pytest.mark.launch

STEPS = 3
STAGES = ("baseline", "critic", "verifiable", "rho1")
RESEEDED = ("baseline", "critic")  # by permutations, and by drawing


def job(root: Path, stage: str, folder: str, seed: int) -> dict:
    override = [
        f'checkpoint.save_dir="determinism/{stage}-{folder}"',
        f"runtime.seed={seed}",
        f"training.max_steps={STEPS}",
        "training.n_epochs=4.0",
        "data_sampling.n_samples=16",
        "training.batch_size=2",
        "training.gradient_accumulation_steps=2",
        "training.log_interval=1",
        f"training.eval_interval={STEPS}",
        "checkpoint.save_checkpoint_every=1000.0",  # at the end alone
        "checkpoint.save_best=false",
        'mlflow.tracking_uri=""',
    ]
    if stage != "baseline":  # whose epochs are permutations
        override += ["data_sampling.curriculum_learning=true", f"data_sampling.curriculum_schedule={PHASES}"]
    if stage == "verifiable":
        override.append(f"experiment.critic_checkpoint={json.dumps(str(make_critic(root)))}")
    return {"stage": stage, "config": f"stage_configs/local/{stage}.toml", "override": override, "record": True}


@pytest.fixture(scope="module")
def trained(workspace: Path) -> Path:
    """Each stage twice, in other processes, and in another order; some with another seed."""
    first = [job(workspace, stage, "first", 11) for stage in STAGES]
    again = [job(workspace, stage, "again", 11) for stage in reversed(STAGES)]
    start(workspace, first, 2)
    start(workspace, [job(workspace, stage, "other", 12) for stage in RESEEDED] + again, 2, TZ="Asia/Tokyo")
    return workspace / "determinism"


@pytest.mark.parametrize("stage", STAGES)
def test_everything_that_is_logged(trained: Path, stage: str) -> None:
    first = metrics(trained / f"{stage}-first")
    assert sorted(first) == list(range(1, STEPS + 1))
    assert metrics(trained / f"{stage}-again") == first


@pytest.mark.parametrize("stage", STAGES)
def test_everything_that_is_saved(trained: Path, stage: str) -> None:
    """Weights, optimizer states, random numbers of both ranks, and the export."""
    shards = sorted((trained / f"{stage}-first" / f"step_{STEPS:08d}").glob("*_states.pt"))
    assert len(shards) == 4
    for file in shards:
        same(plain(trained / f"{stage}-again" / file.parent.name / file.name), plain(file), file.name)
    exports = sorted((trained / f"{stage}-first" / "checkpoint_final").glob("*.safetensors"))
    assert exports
    for file in exports:
        found = load_file(trained / f"{stage}-again" / "checkpoint_final" / file.name)
        same(found, load_file(file), file.name)


@pytest.mark.parametrize("stage", RESEEDED)
@pytest.mark.parametrize("rank", [0, 1])
def test_the_seed_decides_which_rows_are_read(trained: Path, stage: str, rank: int) -> None:
    first, again, other = (
        (trained / f"{stage}-{folder}" / f"rows-{rank}.jsonl").read_text() for folder in ("first", "again", "other")
    )
    assert again == first
    assert other != first


@pytest.mark.parametrize("stage", RESEEDED)
def test_another_seed_is_another_run(trained: Path, stage: str) -> None:
    """From the second step at the latest: a critic's head starts with one value for all."""
    first, other = metrics(trained / f"{stage}-first"), metrics(trained / f"{stage}-other")
    assert all(first[step]["train/loss"] != other[step]["train/loss"] for step in range(2, STEPS + 1))
