"""A run of two ranks goes on with one and with four: the same rows, the same losses, the same optimizer."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from preloaded import run_preloaded
from safetensors.torch import load_file
from test_launch_parity import start

pytestmark = pytest.mark.launch

STEPS, SAVED = 6, 4
# Name -> stage, batch size, accumulation of the two ranks; and of one rank and four, for the same eight rows.
CASES = {
    "baseline": ("baseline", (4, 1), {1: (4, 2), 4: (2, 1)}),  # four ranks cannot read four rows each
    "critic": ("critic", (2, 2), {1: (2, 4), 4: (2, 1)}),
    "verifiable": ("verifiable", (2, 2), {1: (2, 4), 4: (2, 1)}),
    "rho1": ("rho1", (2, 2), {1: (2, 4), 4: (2, 1)}),
}
# Each launch takes its time: every stage, every number of ranks, and the two stages with a value head on both.
RUNS = [(1, "critic"), (1, "verifiable"), (1, "rho1"), (4, "baseline"), (4, "critic"), (4, "verifiable")]
over_runs = pytest.mark.parametrize(("ranks", "name"), RUNS)


def job(name: str, ranks: int, *more: str, **keywords: object) -> dict:
    stage, (batch, accumulation), _ = CASES[name]
    override = [
        f'checkpoint.save_dir="checkpoints/{name}-{ranks}"',
        f"training.batch_size={batch}",
        f"training.gradient_accumulation_steps={accumulation}",
        f"training.max_steps={STEPS}",
        "training.n_epochs=4.0",
        "data_sampling.n_samples=24",  # three steps an epoch: the checkpoint lies in the second one
        # Of several parameter groups, each with a rate and a decay of its own, in the middle of a schedule.
        "training.scheduler=cosine",
        "training.learning_rate=2e-3",
        "training.value_lr=7e-3",
        "training.weight_decay=0.3",
        "training.log_interval=1",
        "training.eval_interval=3",
        f"checkpoint.save_checkpoint_every={SAVED / 3}",
        "checkpoint.save_best=false",
        'mlflow.tracking_uri=""',
        *more,
    ]
    if stage not in ("critic", "verifiable"):
        override = [text for text in override if "value_lr" not in text]
    return {"stage": stage, "config": f"stage_configs/local/{stage}.toml", "override": override} | keywords


@pytest.fixture(scope="module")
def trained(workspace: Path) -> Path:
    """Two ranks to the end; then one and four from the checkpoint in the middle, with the config as it was."""
    critic = 'experiment.critic_checkpoint="checkpoints/critic-2/checkpoint_final"'
    for ranks in (2, 1, 4):
        jobs = []
        # The critic first, whose head the verifiable stage takes.
        for name in sorted(CASES, key=lambda name: (name != "critic", name)):
            if ranks != 2 and (ranks, name) not in RUNS:
                continue
            more = [critic] if name == "verifiable" else []
            source = {"resume": f"checkpoints/{name}-2/step_{SAVED:08d}"} if ranks != 2 else {}
            jobs.append(job(name, ranks, *more, record=True, **source))
        start(workspace, jobs, ranks)
    return workspace


def metrics(root: Path, name: str, ranks: int) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for line in (root / f"checkpoints/{name}-{ranks}/metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        values = {name: value for name, value in record["metrics"].items() if not name.startswith("perf/")}
        found.setdefault(record["step"], {}).update(values)
    return found


def rows(root: Path, name: str, ranks: int) -> dict[int, list[int]]:
    """The rows of each step, of all ranks together."""
    found: dict[int, list[int]] = {}
    for rank in range(ranks):
        for line in (root / f"checkpoints/{name}-{ranks}/rows-{rank}.jsonl").read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["step"], []).extend(record["rows"])
    return found


@over_runs
def test_the_next_losses_are_the_same(trained: Path, ranks: int, name: str) -> None:
    expected, found = metrics(trained, name, 2), metrics(trained, name, ranks)
    assert sorted(found) == list(range(SAVED + 1, STEPS + 1))
    for step, values in found.items():
        assert values.keys() == expected[step].keys()
        assert values["optim/lr"] == expected[step]["optim/lr"]
        for key, value in values.items():
            if "loss" in key:
                assert value == pytest.approx(expected[step][key], abs=1e-5), (step, key)
    assert len({values["train/loss"] for values in found.values()}) == STEPS - SAVED


@over_runs
def test_no_row_is_seen_twice_or_skipped(trained: Path, ranks: int, name: str) -> None:
    expected, found = rows(trained, name, 2), rows(trained, name, ranks)
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert sorted(found) == list(range(SAVED + 1, STEPS + 1))
    for step, drawn in found.items():
        assert sorted(drawn) == sorted(expected[step]), step


@over_runs
def test_accumulation_changes_first_and_the_batch_second(trained: Path, ranks: int, name: str) -> None:
    folder = trained / f"checkpoints/{name}-{ranks}/step_{STEPS:08d}"
    shard = torch.load(next(folder.glob("*_optim_states.pt")), weights_only=False)
    batch, accumulation = CASES[name][2][ranks]
    assert shard["ds_config"]["train_micro_batch_size_per_gpu"] == batch
    assert shard["ds_config"]["gradient_accumulation_steps"] == accumulation
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["world_size"], manifest["global_batch"]) == (ranks, 8)
    # The config in the checkpoint is what the user gave, so that the same command goes on from there, too.
    written = (folder / "config.toml").read_text()
    assert re.search(r"^batch_size = (\d+)$", written, re.M).group(1) == str(CASES[name][1][0])


def full(folder: Path, key: str) -> dict[str, torch.Tensor]:
    """Parameter -> its float32 master ("fp32") or a state of its optimizer, whole, read from DeepSpeed's shards."""
    shards = [
        torch.load(file, weights_only=False)["optimizer_state_dict"]
        for file in sorted(folder.glob("*_optim_states.pt"))
    ]
    shapes = torch.load(next(folder.glob("*_model_states.pt")), weights_only=False)["param_shapes"]
    found = {}
    for group, names in enumerate(shapes):
        offset = 0
        for name, shape in names.items():
            share = math.ceil(shape.numel() / len(shards))
            parts = []
            for shard in shards:
                states = shard["optimizer_state_dict"]["state"][group]
                flat = shard["fp32_flat_groups"][group] if key == "fp32" else states[key]
                parts.append(flat[offset : offset + share])
            found[name] = torch.cat(parts)[: shape.numel()].view(shape)
            offset += share
    return found


@over_runs
def test_weights_and_moments_are_the_same_to_the_bit(trained: Path, ranks: int, name: str) -> None:
    """Saved again as soon as they were loaded."""
    resumed = f"step_{SAVED:08d}"
    for key in ("fp32", "exp_avg", "exp_avg_sq"):
        expected = full(trained / f"checkpoints/{name}-2" / resumed, key)
        found = full(trained / f"checkpoints/{name}-{ranks}" / resumed, key)
        assert found.keys() == expected.keys()
        assert all(("value_head" in tensor) == (name == "critic") for tensor in found) or name == "verifiable"
        for tensor, value in expected.items():
            assert torch.equal(found[tensor], value), (key, tensor)
            assert key == "exp_avg_sq" or value.any() or "bias" in tensor, "not all zeros"


@over_runs
def test_each_group_keeps_its_rate_and_decay(trained: Path, ranks: int, name: str) -> None:
    """A universal load gives all groups the settings of the first."""

    def settings(folder: str) -> list[tuple[float, ...]]:
        file = next((trained / "checkpoints" / folder / f"step_{STEPS:08d}").glob("*_optim_states.pt"))
        groups = torch.load(file, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]
        return [(group["lr"], group["initial_lr"], group["weight_decay"], *group["betas"]) for group in groups]

    found = settings(f"{name}-{ranks}")
    assert found == settings(f"{name}-2")
    assert len({setting[2] for setting in found}) == 2


def test_the_conversion_is_made_once_beside_the_checkpoint(trained: Path) -> None:
    for name in CASES:
        root = trained / f"checkpoints/{name}-2"
        assert [path.name for path in (root / ".universal").iterdir()] == [f"step_{SAVED:08d}"]
        listed = json.loads(run_preloaded(["wmtp-ds", "checkpoint", "list", str(root), "--json"], trained).stdout)
        assert [item["name"] for item in listed[0]["checkpoints"]] == [f"step_{SAVED:08d}", f"step_{STEPS:08d}"]
        assert listed[0]["leftovers"] == []
    done = run_preloaded(["wmtp-ds", "checkpoint", "prune", str(root), "--keep", "1"], trained)
    assert done.returncode == 0, done.stderr
    assert not (root / f"step_{SAVED:08d}").exists()
    assert not (root / ".universal" / f"step_{SAVED:08d}").exists()


def test_a_final_export_is_the_same(trained: Path) -> None:
    for ranks in (1, 4):
        for file in ("model.safetensors", "value_head.safetensors"):
            expected = load_file(trained / "checkpoints/verifiable-2/checkpoint_final" / file)
            found = load_file(trained / f"checkpoints/verifiable-{ranks}/checkpoint_final" / file)
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-4, msg=name)
