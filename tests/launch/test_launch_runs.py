"""Runs from beginning to end through the real launcher: checkpoints, resume, handoff, tracking, signals, ranks."""

import hashlib
import json
import os
import re
from pathlib import Path

import psutil
import pytest
import torch
from conftest import run
from safetensors.torch import load_file
from test_launch_parity import start
from transformers import AutoModelForCausalLM, AutoTokenizer

from wmtp_ds.meeting import free_port

pytestmark = pytest.mark.launch

STEPS, STOP = 8, 5
STAGES = ("baseline", "critic", "verifiable", "rho1")
# Resumed in their tracked runs; test_launch_exact_resume has every stage.
RESUMED = ("critic", "verifiable")


def overrides(folder: str, *more: str) -> list[str]:
    return [
        f'checkpoint.save_dir="checkpoints/{folder}"',
        f"training.max_steps={STEPS}",
        "data_sampling.n_samples=40",
        "training.n_epochs=4.0",
        "training.batch_size=2",
        "training.gradient_accumulation_steps=1",
        "training.log_interval=1",
        "training.eval_interval=4",
        'mlflow.tracking_uri="sqlite:///mlflow.db"',
        *more,
    ]


def job(stage: str, folder: str, *more: str, **keywords: object) -> dict:
    config = f"stage_configs/local/{stage}.toml"
    return {"stage": stage, "config": config, "override": overrides(folder, *more), **keywords}


@pytest.fixture(scope="module")
def runs(workspace: Path) -> Path:
    """Each stage trained straight through, some again, interrupted and resumed; verifiable takes the critic's URIs."""
    first = [job("critic", "critic", "checkpoint.save_checkpoint_every=0.2", "checkpoint.save_total_limit=2")]
    start(workspace, first, 2)
    artifact = f"runs:/{run_id(workspace, 'critic')}/checkpoints/checkpoint_best"
    jobs = []
    for stage in STAGES:
        more = [f'experiment.critic_checkpoint="{artifact}"'] if stage == "verifiable" else []
        if stage != "critic":
            jobs.append(job(stage, stage, *more))
        else:
            more = ["checkpoint.save_checkpoint_every=0.2", "checkpoint.save_total_limit=2"]
        if stage in RESUMED:
            jobs.append(job(stage, f"{stage}-resumed", *more, stop_after=STOP))
            jobs.append(job(stage, f"{stage}-resumed", *more, resume="auto"))
    other_form = (
        f"mlflow://{experiment_id(workspace)}/{run_id(workspace, 'critic')}/artifacts/checkpoints/checkpoint_best"
    )
    jobs.append(job("verifiable", "verifiable-uri", f'experiment.critic_checkpoint="{other_form}"'))
    (workspace / "focal.toml").write_text(
        'extends = "stage_configs/local/baseline.toml"\n[experiment]\nname = "focal"\nstage = "focal"\n'
        "[training]\nlate_weight = 3.0\n"
    )
    jobs.append(job("focal", "focal") | {"config": "focal.toml"})
    half = ['models.policy.dtype="bfloat16"', 'mlflow.tracking_uri=""']
    folder = 'experiment.critic_checkpoint="checkpoints/critic/checkpoint_best"'
    jobs.append(job("verifiable", "verifiable-bf16", folder, *half))
    jobs.append(job("critic", "critic-bf16", *half))
    jobs.append(job("rho1", "rho1-bf16", *half, 'models.reference.dtype="bfloat16"'))
    # Started anew where a run has been: the earlier one moves aside.
    jobs.append(job("baseline", "baseline-again", 'mlflow.tracking_uri=""', "training.max_steps=2"))
    jobs.append(job("baseline", "baseline-again", 'mlflow.tracking_uri=""', "training.max_steps=3"))
    start(workspace, jobs, 2)
    return workspace


def summary(root: Path, folder: str) -> dict:
    return json.loads((root / "checkpoints" / folder / "run.json").read_text())


def run_id(root: Path, folder: str) -> str:
    return summary(root, folder)["mlflow_run_id"]


def client(root: Path):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")


def experiment_id(root: Path) -> str:
    return client(root).get_run(run_id(root, "critic")).info.experiment_id


def metrics(root: Path, folder: str) -> dict[int, dict[str, float]]:
    """Everything logged at each step but what depends on the clock."""
    found: dict[int, dict[str, float]] = {}
    for line in (root / "checkpoints" / folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        values = {name: value for name, value in record["metrics"].items() if not name.startswith("perf/")}
        found.setdefault(record["step"], {}).update(values)
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("stage", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(runs: Path, stage: str) -> None:
    straight, resumed = metrics(runs, stage), metrics(runs, f"{stage}-resumed")
    assert sorted(straight) == list(range(1, STEPS + 1))
    assert resumed == straight
    expected = tensors(runs / "checkpoints" / stage / "checkpoint_final")
    found = tensors(runs / "checkpoints" / f"{stage}-resumed" / "checkpoint_final")
    assert expected
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("stage", RESUMED)
def test_a_resumed_run_is_one_tracked_run(runs: Path, stage: str) -> None:
    folder = f"{stage}-resumed"
    tracked = client(runs).get_run(run_id(runs, folder))
    assert tracked.info.status == "FINISHED"
    history = client(runs).get_metric_history(tracked.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, STEPS + 1))
    values = [metrics(runs, folder)[step]["train/loss"] for step in range(1, STEPS + 1)]
    assert [point.value for point in history] == pytest.approx(values)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_tracked(runs: Path, stage: str) -> None:
    tracked = client(runs).get_run(run_id(runs, stage))
    tags, params, found = tracked.data.tags, tracked.data.params, tracked.data.metrics
    assert tags["stage"] == stage
    assert tags["world_size"] == "2"
    assert tags["zero_stage"] == "3"
    assert re.fullmatch("[0-9a-f]{16}", tags["config_hash"])
    assert re.fullmatch("[0-9a-f]{64}", tags["trunk_fingerprint"])
    assert re.fullmatch("[0-9a-f]{64}", tags["dataset_fingerprint"])
    validation = (runs / params["dataset.validation"]).read_bytes()
    assert tags["validation_fingerprint"] == hashlib.sha256(validation).hexdigest()
    assert params["experiment.stage"] == stage
    assert params["training.max_steps"] == str(STEPS)
    expected = {"train/loss", "val/loss", "optim/lr", "optim/grad_norm", "perf/tokens_per_s", "perf/step_time"}
    expected |= {"perf/mem_gib", "perf/seconds", "perf/evaluation_time", "perf/weights_time"}
    summary = json.loads((runs / f"checkpoints/{stage}/run.json").read_text())
    assert found["perf/tokens_seen"] == pytest.approx(summary["tokens_per_s"] * summary["seconds"])
    assert found["perf/seconds"] == pytest.approx(summary["seconds"])
    if stage != "critic":
        expected |= {f"train/loss_head_{k}" for k in range(1, 5)} | {f"val/loss_head_{k}" for k in range(1, 5)}
    if stage in ("critic", "verifiable"):
        expected |= {"train/value_loss", "val/value_loss", "val/auc"}
    if stage == "verifiable":
        expected |= {f"td/{x}" for x in ("mean", "std", "min", "max")}
        expected |= {f"weight/{x}" for x in ("mean", "std", "min", "max", "entropy")}
    if stage == "rho1":
        expected |= {"rho1/selected_ratio"}
        assert found["rho1/selected_ratio"] == pytest.approx(0.6, abs=0.02)
    assert expected <= found.keys()
    names = {artifact.path for artifact in client(runs).list_artifacts(tracked.info.run_id)}
    assert names == {"config.toml", "checkpoints", "plots"} | ({"weights"} if stage != "baseline" else set())
    assert tags.get("weights", "") == ("uniform: every token weighs 1" if stage == "baseline" else "")


def test_the_critic_keeps_two_checkpoints_and_exports_no_trunk(runs: Path) -> None:
    root = runs / "checkpoints/critic"
    assert [p.name for p in sorted(root.glob("step_*"))] == ["step_00000006", "step_00000008"]
    assert (root / "latest").read_text().strip() == "step_00000008"
    for name in ("checkpoint_best", "checkpoint_final"):
        assert {p.name for p in (root / name).iterdir()} == {"value_head.safetensors", "metrics.json", "config.toml"}
    # No copy of the frozen policy in what is saved for a resume either: a value head of 64·64 and some, with Adam's
    # states, in float32.
    saved = sum(p.stat().st_size for p in (root / "step_00000008").iterdir())
    assert saved < 400_000 < (runs / "storage/models/micro-policy/model.safetensors").stat().st_size


@pytest.mark.parametrize("stage", ["baseline", "verifiable", "rho1"])
def test_an_export_loads_in_plain_transformers(runs: Path, stage: str) -> None:
    folder = runs / "checkpoints" / stage / "checkpoint_final"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    start_ids = tokenizer("def f(x):", return_tensors="pt").input_ids
    assert model.generate(start_ids, max_new_tokens=3, do_sample=False).shape == (1, start_ids.shape[1] + 3)
    trained = tensors(folder)
    before = load_file(runs / "storage/models/micro-policy/model.safetensors")
    assert (folder / "value_head.safetensors").exists() == (stage == "verifiable")
    # Every tensor of the policy was trained, extra heads included, and written whole.
    assert all(not torch.equal(trained[name], tensor) for name, tensor in before.items())
    assert all(trained[name].shape == tensor.shape for name, tensor in before.items())
    facts = json.loads((folder / "metrics.json").read_text())
    assert facts["step"] == STEPS
    assert facts["mlflow_run_id"] == run_id(runs, stage)


def test_both_uri_forms_hand_over_the_same_critic(runs: Path) -> None:
    assert metrics(runs, "verifiable-uri") == metrics(runs, "verifiable")
    first = metrics(runs, "verifiable")[1]
    assert first["td/std"] > 0
    assert first["weight/std"] > 0


@pytest.mark.parametrize("stage", ["verifiable", "critic", "rho1"])
def test_bfloat16_trains_alike(runs: Path, stage: str) -> None:
    half, full = metrics(runs, f"{stage}-bf16"), metrics(runs, stage)
    for step in range(1, STEPS + 1):
        assert half[step]["train/loss"] == pytest.approx(full[step]["train/loss"], rel=0.02)
    exported = runs / "checkpoints" / f"{stage}-bf16" / "checkpoint_final"
    if stage != "critic":
        assert {t.dtype for t in load_file(exported / "model.safetensors").values()} == {torch.bfloat16}
    if stage != "rho1":
        # The float32 masters, not the 16-bit copies that the engine computes with.
        head = load_file(exported / "value_head.safetensors")
        assert {t.dtype for t in head.values()} == {torch.float32}
        assert any(not torch.equal(t, t.bfloat16().float()) for t in head.values())


def test_a_fifth_weighting_is_one_class_and_one_config_class(runs: Path) -> None:
    focal, uniform = metrics(runs, "focal"), metrics(runs, "baseline")
    assert sorted(focal) == sorted(uniform)
    assert focal[STEPS]["train/loss"] < focal[1]["train/loss"]
    # The ramp from 1 to 3 has mean 2 and a little, and at first all tokens cost about the same.
    assert focal[1]["train/loss"] == pytest.approx(2.05 * uniform[1]["train/loss"], rel=0.05)
    assert client(runs).get_run(run_id(runs, "focal")).data.params["training.late_weight"] == "3.0"


def test_an_earlier_run_moves_aside(runs: Path) -> None:
    assert summary(runs, "baseline-again")["steps"] == 3
    assert summary(runs, "baseline-again.1")["steps"] == 2


def test_errors_before_the_group_forms(workspace: Path, tmp_path: Path) -> None:
    """Said once, with exit code 2, whatever starts the ranks."""
    taken = free_port()
    import socket

    with socket.socket() as listener:
        listener.bind(("", taken))
        listener.listen()
        command = ["deepspeed", "--num_accelerators", "2", "--master_port", str(taken), "bin/train_stage.py"]
        done = run([*command, "--stage", "baseline", "--config", "stage_configs/local/baseline.toml"], workspace)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count(f"port {taken}, where the ranks are to meet, is taken") == 1
    assert "Traceback" not in done.stderr


def test_no_process_is_left_behind(runs: Path) -> None:
    left = [p for p in psutil.process_iter(["cmdline", "pid"]) if str(runs) in " ".join(p.info["cmdline"] or [])]
    assert [p for p in left if p.info["pid"] != os.getpid()] == []
