"""On two ranks: packed rows train as unpacked ones do, with almost no padding and no wait for data."""

import json
from pathlib import Path

import pytest
from test_launch_parity import score, start

pytestmark = pytest.mark.launch

STEPS, RANKS = 4, 2
STAGES = {
    "verifiable": ['training.td_normalize="zscore"', "training.td_lambda=0.9", "training.value_coef=0.5"],
    "rho1": ['training.selection_scope="sequence"'],
}
# What is run of each: packed or not; the last one with the reference's losses computed beforehand.
RUNS = [(stage, packed) for stage in STAGES for packed in (False, True)] + [("rho1-scores", True)]
SCORES = ['models.reference.scores="packing-scores"', 'models.reference.path="nowhere"']
# What packing changes, and what no two runs have alike.
OTHERWISE = ("perf/", "data/padding")


@pytest.fixture(scope="module")
def runs(workspace: Path) -> dict[tuple[str, bool], Path]:
    """Each stage, packed and unpacked, in one launch; the first run makes the tokens that the others read."""
    critic = workspace / "packing-critic"
    critic.mkdir()
    make_critic(workspace, critic)
    score(workspace, "packing-scores", max_length=1024, dtype="float16")
    folders = {(name, packed): workspace / f"packing/{name}-{packed}" for name, packed in RUNS}
    jobs = [
        {
            "stage": (stage := name.removesuffix("-scores")),
            "config": f"stage_configs/local/{stage}.toml",
            "override": [
                f"checkpoint.save_dir={json.dumps(str(folder))}",
                f"data_sampling.pack_sequences={json.dumps(packed)}",
                "dataset.max_length=1024",
                "data_sampling.n_samples=48",
                f"training.max_steps={STEPS}",
                f"training.eval_interval={STEPS}",
                "training.optimizer=sgd",
                "training.learning_rate=0.05",
                "training.max_grad_norm=0.0",
                "training.log_interval=1",
                "checkpoint.save_best=false",
                "checkpoint.save_final=false",
                "checkpoint.save_checkpoint_every=0",
                'mlflow.tracking_uri=""',
                *STAGES[stage],
                *([f"experiment.critic_checkpoint={json.dumps(str(critic))}"] if stage == "verifiable" else []),
                *(SCORES if name != stage else []),
            ],
        }
        for (name, packed), folder in folders.items()
    ]
    start(workspace, jobs, RANKS)
    return folders


def make_critic(workspace: Path, folder: Path) -> None:
    """Random weights, so that TD errors differ from token to token."""
    import torch

    from wmtp_ds.handoff import save_value_head
    from wmtp_ds.models.fingerprint import read_trunk_fingerprint
    from wmtp_ds.models.value_head import ValueHead

    torch.manual_seed(7)
    head = ValueHead(64, "mlp")
    torch.nn.init.normal_(head.output.weight, std=0.5)
    fingerprint = str(read_trunk_fingerprint(workspace / "storage/models/micro-policy"))
    facts = {"hidden_size": 64, "type": "mlp", "activation": "sigmoid", "trunk_fingerprint": fingerprint}
    save_value_head(folder / "value_head.safetensors", head.state_dict(), **facts)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_everything_that_is_logged_is_the_same(runs, stage):
    plain, packed = metrics(runs[stage, False]), metrics(runs[stage, True])
    assert len(plain) == len(packed) == STEPS + 1
    for expected, found in zip(plain, packed, strict=True):
        assert found.keys() == expected.keys()
        kept = {name: value for name, value in expected.items() if not name.startswith(OTHERWISE)}
        assert {name: found[name] for name in kept} == pytest.approx(kept, rel=1e-5, abs=2e-6)
    losses = [step["train/loss"] for step in plain if "train/loss" in step]
    assert len(set(losses)) == STEPS  # weights change between steps


@pytest.mark.parametrize("stage", STAGES)
def test_almost_nothing_is_padding(runs, stage):
    padding = {
        packed: json.loads((runs[stage, packed] / "run.json").read_text())["padding"] for packed in (True, False)
    }
    assert padding[True] < 0.05 < padding[False]
    steps = [step["data/padding"] for step in metrics(runs[stage, True]) if "data/padding" in step]
    assert len(steps) == STEPS
    assert max(steps) < 0.05


def test_scores_in_float16_train_packed_rows_as_the_live_reference_does(runs):
    """Which tokens are selected may differ where two are as good to a thousandth; the reference's losses may not."""
    for live, cached in zip(metrics(runs["rho1", True]), metrics(runs["rho1-scores", True]), strict=True):
        assert cached.keys() == live.keys()
        if "train/loss" in live:
            assert cached["train/loss"] == pytest.approx(live["train/loss"], rel=2e-3)
            assert cached["rho1/reference_loss"] == pytest.approx(live["rho1/reference_loss"], rel=2**-11)
            assert cached["rho1/selected_ratio"] == live["rho1/selected_ratio"]


def test_no_step_waits_for_its_data(runs):
    for folder in runs.values():
        share = json.loads((folder / "run.json").read_text())["data_wait"]
        assert 0 < share < 0.05  # a few steps on a busy machine; docs/data.md has the figure of a run
        assert metrics(folder)[STEPS - 1]["perf/data_wait"] == pytest.approx(share)


def test_all_runs_read_one_cache(runs, workspace):
    folders = [path for path in (workspace / "storage/cache/tokens").iterdir() if path.is_dir()]
    assert not any(path.name.startswith(".partial-") for path in folders)
    assert len({json.loads((path / "header.json").read_text())["data"] for path in folders}) == len(folders) >= 2
