"""Twenty steps at once, and ten and ten: every stage ends with the same bits, rank by rank.

The checkpoint lies in the middle of an epoch, of a phase of the curriculum, of the schedule of learning rates and of an
early-stopping count, and every step has two micro-batches.
"""

import json
from pathlib import Path

import pytest
from kill_soak import make_critic, metrics, plain, same
from safetensors.torch import load_file
from test_launch_parity import start

from wmtp_ds.checkpoint_export import export_checkpoint
from wmtp_ds.config import load_config
from wmtp_ds.errors import UserError
from wmtp_ds.evaluate.model import find_model
from wmtp_ds.look.columns import find_export
from wmtp_ds.optimization import lr_schedule
from wmtp_ds.run_data import open_data

pytestmark = pytest.mark.launch

STEPS, MIDDLE, SHORT = 20, 10, 12
PHASES = (
    "["
    + ", ".join(
        f"{{epoch_range=[{begin}, {end}], difficulty_weights={{low={low}, medium=0.2, high={0.8 - low}}}}}"
        for begin, end, low in ((0.0, 0.3, 0.7), (0.3, 0.7, 0.4), (0.7, 1.0, 0.1))
    )
    + "]"
)
STAGES = ("baseline", "critic", "verifiable", "rho1")


def job(root: Path, stage: str, folder: str, **keywords: object) -> dict:
    override = [
        f'checkpoint.save_dir="checkpoints/{stage}-{folder}"',
        f"training.max_steps={STEPS}",
        "training.n_epochs=4.0",
        "data_sampling.n_samples=24",  # six steps an epoch
        "training.batch_size=1",
        "training.gradient_accumulation_steps=2",
        "training.log_interval=1",
        "training.eval_interval=7",
        f"checkpoint.save_checkpoint_every={MIDDLE / 6}",
        "checkpoint.save_best=false",
        "early_stopping.enabled=true",
        "early_stopping.patience=1000",
        'mlflow.tracking_uri=""',
    ]
    if stage != "baseline":  # whose epochs are permutations
        override += ["data_sampling.curriculum_learning=true", f"data_sampling.curriculum_schedule={PHASES}"]
    if stage == "verifiable":
        override.append(f'experiment.critic_checkpoint="{make_critic(root)}"')
    config = f"stage_configs/local/{stage}.toml"
    return {"stage": stage, "config": config, "override": override, "record": True} | keywords


@pytest.fixture(scope="module")
def trained(workspace: Path) -> Path:
    """Each stage from beginning to end, and again from its checkpoint in the middle."""
    jobs = [job(workspace, stage, "straight") for stage in STAGES]
    for stage in STAGES:
        jobs.append(job(workspace, stage, "resumed", resume=f"checkpoints/{stage}-straight/step_{MIDDLE:08d}"))
    for stage in ("verifiable", "rho1"):
        unwatched = job(workspace, stage, "unwatched")
        unwatched["override"] += ["mlflow.log_weights=false", f"training.max_steps={SHORT}"]
        watched = job(workspace, stage, "watched")
        watched["override"] += [f"training.max_steps={SHORT}"]
        jobs += [unwatched, watched]
    changed = job(workspace, "baseline", "changed", resume=f"checkpoints/baseline-straight/step_{MIDDLE:08d}")
    changed["override"] += ["training.learning_rate=5e-4", "training.weight_decay=0.3", f"training.max_steps={SHORT}"]
    jobs.append(changed)
    start(workspace, jobs, 2)
    return workspace / "checkpoints"


def test_what_may_change_is_not_the_checkpoints_to_decide(trained: Path) -> None:
    """The learning rate and the decay that the config says now, on the schedule of the steps that it says now."""
    found = metrics(trained / "baseline-changed")
    config = load_config(trained.parent / "stage_configs/local/baseline.toml", checks=False).config.training
    factor = lr_schedule(config.scheduler, SHORT, config.warmup_ratio)
    assert {step: values["optim/lr"] for step, values in found.items()} == {
        step: 5e-4 * factor(step - 1) for step in (MIDDLE + 1, MIDDLE + 2)
    }
    file = next((trained / "baseline-changed" / f"step_{SHORT:08d}").glob("*_optim_states.pt"))
    groups = plain(file)["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert {group["initial_lr"] for group in groups} == {5e-4}


@pytest.mark.parametrize("stage", ["verifiable", "rho1"])
def test_looking_at_weights_changes_nothing(trained: Path, stage: str) -> None:
    """Of the training: losses, weights, optimizer and random numbers of both ranks are the same to the bit."""
    watched, unwatched = (trained / f"{stage}-{name}" for name in ("watched", "unwatched"))
    assert metrics(watched) == metrics(unwatched)
    files = sorted((unwatched / f"step_{SHORT:08d}").glob("*_states.pt"))
    assert len(files) == 4
    for file in files:
        same(plain(watched / file.parent.name / file.name), plain(file), file.name)
    assert len(list((watched / "weights").glob("*.html"))) == 2
    assert not (unwatched / "weights").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_pages_of_weights(trained: Path, stage: str) -> None:
    """One an evaluation, the same whether the run was interrupted or not; a baseline weighs all alike."""
    names = {
        folder: sorted(path.name for path in (trained / f"{stage}-{folder}/weights").glob("*"))
        for folder in ("straight", "resumed")
    }
    steps = [] if stage == "baseline" else [7, 14, STEPS]
    assert names["straight"] == [f"step_{step:08d}.{kind}" for step in steps for kind in ("html", "json")]
    assert names["resumed"] == names["straight"][2:]
    for name in names["resumed"]:
        pages = [(trained / f"{stage}-{folder}/weights/{name}").read_text() for folder in ("straight", "resumed")]
        assert pages[0] == pages[1]
    records = [json.loads((trained / f"{stage}-straight/weights/step_{step:08d}.json").read_text()) for step in steps]
    assert [record["step"] for record in records] == steps
    assert len({record["tokens"] for record in records}) <= 1
    assert all(record["solutions"] == 2 for record in records), "a micro-batch of each of two ranks"
    assert stage == "baseline" or records[0]["edges"] != records[2]["edges"] or stage == "rho1"
    told = json.loads((trained / f"{stage}-straight/tracking.json").read_text())
    assert ("weights" in [artifact["path"] for artifact in told["artifacts"]]) == bool(steps)
    assert told["tags"].get("weights") == (None if steps else "uniform: every token weighs 1")


@pytest.mark.parametrize("stage", STAGES)
def test_losses_rates_and_metrics(trained: Path, stage: str) -> None:
    straight, resumed = metrics(trained / f"{stage}-straight"), metrics(trained / f"{stage}-resumed")
    assert sorted(straight) == list(range(1, STEPS + 1))
    assert sorted(resumed) == list(range(MIDDLE + 1, STEPS + 1))
    for step, values in resumed.items():
        assert values == straight[step], step
        assert {"train/loss", "optim/lr", "optim/grad_norm"} <= values.keys()
    assert "val/loss" in resumed[14]
    assert len({values["optim/lr"] for values in resumed.values()}) == STEPS - MIDDLE


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_sampled_rows(trained: Path, stage: str, rank: int) -> None:
    def rows(folder: str) -> list[tuple[int, list[int]]]:
        lines = (trained / f"{stage}-{folder}" / f"rows-{rank}.jsonl").read_text().splitlines()
        return [(record["step"], record["rows"]) for record in map(json.loads, lines)]

    straight = rows("straight")
    assert [step for step, _ in straight] == list(range(1, STEPS + 1))
    assert rows("resumed") == straight[MIDDLE:]


@pytest.mark.parametrize("stage", STAGES)
def test_weights_optimizer_schedule_and_random_numbers(trained: Path, stage: str) -> None:
    """All that DeepSpeed and we have saved, of both ranks: when it was loaded, and at the end."""
    for step in (MIDDLE, STEPS):
        files = sorted((trained / f"{stage}-straight" / f"step_{step:08d}").glob("*_states.pt"))
        assert len(files) == 4
        for file in files:
            expected = plain(file)
            same(plain(trained / f"{stage}-resumed" / file.parent.name / file.name), expected, f"{step} {file.name}")
            if file.name.endswith("model_states.pt"):
                assert expected["lr_scheduler"]["last_epoch"] == step
                assert expected["wmtp"]["stopper"]
                assert {"python", "torch"} <= expected["wmtp"]["random"].keys()


@pytest.mark.parametrize("stage", STAGES)
def test_exports(trained: Path, stage: str) -> None:
    files = sorted((trained / f"{stage}-straight" / "checkpoint_final").glob("*.safetensors"))
    assert files
    for file in files:
        same(load_file(trained / f"{stage}-resumed" / "checkpoint_final" / file.name), load_file(file), file.name)


@pytest.mark.parametrize("stage", ["critic", "verifiable"])
def test_a_checkpoint_becomes_the_export_that_the_run_has_written(
    trained: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.parent)
    run = trained / f"{stage}-straight"
    exported = export_checkpoint(run / f"step_{STEPS:08d}", trained / f"{stage}-exported")
    expected = run / "checkpoint_final"
    assert {path.name for path in exported.iterdir()} == {path.name for path in expected.iterdir()}
    for file in sorted(expected.glob("*.safetensors")):
        same(load_file(exported / file.name), load_file(file), file.name)
    for name in ("config.json", "tokenizer.json", "trunk_fingerprint.json", "config.toml"):
        if (expected / name).exists():
            assert (exported / name).read_bytes() == (expected / name).read_bytes(), name
    with pytest.raises(UserError, match="is there already"):
        export_checkpoint(run / f"step_{STEPS:08d}", exported)
    with pytest.raises(UserError, match="it is no export"):
        export_checkpoint(run / f"step_{STEPS:08d}", run)


def test_a_checkpoint_can_be_evaluated_and_looked_at(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is put together beside itself, once, and again if it is another one."""
    monkeypatch.chdir(trained.parent)
    run, name = trained / "verifiable-resumed", f"step_{STEPS:08d}"
    place = find_model(run / name)
    assert (place.folder, place.run) == (run / f"exported_{name}", run)
    assert place.name == f"verifiable-resumed-{name}"
    assert find_export(run / name) == place.folder
    weights = place.folder / "model.safetensors"
    same(load_file(weights), load_file(run / "checkpoint_final" / "model.safetensors"), name)
    before = weights.stat().st_mtime_ns
    assert find_model(run / name) == place
    assert weights.stat().st_mtime_ns == before
    facts = json.loads((place.folder / "metrics.json").read_text())
    (place.folder / "metrics.json").write_text(json.dumps(facts | {"manifest": "of another checkpoint"}))
    assert find_model(run / name) == place
    assert weights.stat().st_mtime_ns > before
    with pytest.raises(UserError, match="a value head alone"):
        find_model(trained / "critic-straight" / name)


@pytest.mark.parametrize("stage", STAGES)
def test_the_checkpoint_lies_in_the_middle_of_everything(
    workspace: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    spec = job(workspace, stage, "straight")
    data = open_data(load_config(Path(spec["config"]), spec["override"]), world_size=2)
    assert data.total_steps == STEPS
    assert MIDDLE % data.steps_per_epoch not in (0.0, 5.0)
    assert data.plan.phase(MIDDLE - 1) == data.plan.phase(MIDDLE) == data.plan.phase(MIDDLE + 1)
    assert len(data.plan.phases) == (1 if stage == "baseline" else 3)
