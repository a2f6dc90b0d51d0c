"""Bad numbers and early stopping in the loop of every stage, on two ranks, in one launch of DeepSpeed.

The faults (`faulty_driver`) are in single rows of single ranks. What a run is compared with never had these rows: the
same steps in the same order, to the bit.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY
from mlflow import MlflowClient
from preloaded import run_preloaded
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_launch_packing import make_critic
from transformers import AutoTokenizer

from wmtp_ds.config import load_config
from wmtp_ds.run_data import open_data
from wmtp_ds.tracking_state import read_metrics

pytestmark = pytest.mark.launch

STEPS, RANKS, BATCH = 6, 2, 4
STAGES = ("baseline", "critic", "verifiable", "rho1")
# The draws of a step: first micro-batch of rank 0, of rank 1, second one of rank 0, of rank 1.
SKIPPED, SAVED, SPIKED, FAULTY = 2, 3, 5, 3
FAULTS = [[SKIPPED, FAULTY, "loss-nan"], [SPIKED, 0, "high"]]
GONE = [[SPIKED, None, "gone"], [SKIPPED, None, "gone"]]
ROLLBACK = [
    "stability.spike_factor=3.0",
    "stability.spike_window=4",
    'stability.on_spike="rollback"',
    f"checkpoint.save_checkpoint_every={SAVED / STEPS}",
]
# Other ways through DeepSpeed's step: where the gradient is, and who updates.
OTHERS = {
    "bfloat16": ("gradient", ["models.policy.dtype=bfloat16"]),
    "offload": ("loss-inf", ["training.optimizer=sgd", 'deepspeed.config="offload.json"']),
}
STOP = ["early_stopping.enabled=true"]
CONVERGED = [*STOP, "early_stopping.min_delta=1e9", "early_stopping.patience=3"]
UNSTABLE = [
    *STOP,
    "early_stopping.grad_norm_threshold=1e-9",
    "early_stopping.grad_norm_window_size=2",
    "early_stopping.grad_norm_threshold_ratio=1.0",
]
# Every mode, every condition, every stage: what stops, where, and with which reason.
STOPPED = {
    "baseline": (UNSTABLE, 2, "unstable: 2 of the last 2 gradient norms exceed 1e-09"),
    "critic": (
        [*STOP, "early_stopping.variance_min=0.2"],
        1,
        "out of range: the variance of the predicted values is 0, outside [0.2, inf]",
    ),
    "verifiable": (
        [*CONVERGED, 'early_stopping.mode="all"', 'early_stopping.monitor="value_loss"'],
        4,
        "converged: value_loss has not improved by 1e+09 for 3 checks",
    ),
    "rho1": (
        [*UNSTABLE, *CONVERGED, 'early_stopping.mode="loss_only"'],
        4,
        "converged: loss has not improved by 1e+09 for 3 checks",
    ),
}
TRACKED = ['mlflow.tracking_uri="sqlite:///stopped.db"', "checkpoint.save_best=true", "checkpoint.save_final=true"]


def overrides(name: str, stage: str) -> list[str]:
    critic = ['experiment.critic_checkpoint="bad-numbers-critic"'] if stage == "verifiable" else []
    return [
        f'checkpoint.save_dir="bad-numbers/{name}"',
        "checkpoint.save_checkpoint_every=0",
        "checkpoint.save_best=false",
        "checkpoint.save_final=false",
        f"training.max_steps={STEPS}",
        f"data_sampling.n_samples={STEPS * BATCH}",
        "training.n_epochs=1.0",
        "training.batch_size=1",
        "training.gradient_accumulation_steps=2",
        "training.scheduler=constant",  # the runs that are compared differ in length
        "training.warmup_ratio=0.0",
        "training.eval_interval=100",
        "training.log_interval=1",
        'mlflow.tracking_uri=""',
        *critic,
    ]


def jobs() -> dict[str, dict]:
    found = {}

    def add(name: str, stage: str, *more: str, **keywords: object) -> None:
        config = f"stage_configs/local/{stage}.toml"
        override = [*overrides(str(keywords.pop("folder", name)), stage), *more]
        found[name] = {"stage": stage, "config": config, "override": override, **keywords}

    for stage in STAGES:
        tracked = TRACKED[:1] if stage == "rho1" else []
        add(f"{stage}-faulty", stage, *ROLLBACK, *tracked, "checkpoint.save_final=true", faults=FAULTS)
        add(f"{stage}-gone", stage, "checkpoint.save_final=true", faults=GONE)
    # Steps 1 to 5, back to 3, and 4, in which the signal comes.
    halted = {"folder": "halted", "faults": FAULTS}
    add("halted", "rho1", *ROLLBACK, **halted, stop_in=6)
    add("halted-on", "rho1", *ROLLBACK, **halted, resume="auto")
    for name, (kind, more) in OTHERS.items():
        add(f"{name}-faulty", "baseline", "training.max_steps=3", *more, faults=[[2, 1, kind]])
        add(f"{name}-gone", "baseline", "training.max_steps=3", *more, faults=[[2, None, "gone"]])
    half = ['models.policy.dtype="float16"', 'runtime.device="auto"', "training.max_steps=4", *UNSTABLE]
    half += ["early_stopping.grad_norm_threshold=1e9", "early_stopping.grad_norm_window_size=1"]
    add("float16", "baseline", *half, faults=[[2, 1, "steep"], [3, 1, "loss-nan"]])
    endless = {"folder": "endless", "faults": [[step, 1, "loss-nan"] for step in (2, 3, 4)]}
    add("endless", "critic", "stability.max_skipped_steps=3", **endless, stop_in=3)
    add("endless-on", "critic", "stability.max_skipped_steps=3", **endless, resume="auto")
    for stage, (more, _, _) in STOPPED.items():
        add(f"{stage}-stopped", stage, *more, *TRACKED, "checkpoint.save_checkpoint_every=1.0")
    stopped = {"folder": "stopped-halted"}
    add("stopped-halted", "critic", *CONVERGED, **stopped, stop_in=2)
    add("stopped-halted-on", "critic", *CONVERGED, **stopped, resume="auto")
    return found


@pytest.fixture(scope="module")
def ran(workspace: Path) -> tuple[Path, dict[str, int | str], str]:
    """Every job in one launch: the folder of runs, each job's end, and all that was said."""
    (workspace / "bad-numbers-critic").mkdir()
    make_critic(workspace, workspace / "bad-numbers-critic")
    zero = json.loads((REPOSITORY / "ds_configs/zero3_cpu.json").read_text())
    zero["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    (workspace / "offload.json").write_text(json.dumps(zero))
    MlflowClient(tracking_uri=f"sqlite:///{workspace / 'stopped.db'}").search_experiments()  # makes its tables
    root = workspace / "bad-numbers"
    root.mkdir()
    (root / "jobs.json").write_text(json.dumps(list(jobs().values())))
    driver = Path(__file__).with_name("faulty_driver.py")
    done = run_ranks(driver, [str(root / "jobs.json")], RANKS, workspace, timeout=600)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("all jobs done") == RANKS
    ends = dict(zip(jobs(), json.loads((root / "ends.json").read_text()), strict=True))
    return root, ends, done.stdout


@pytest.fixture
def runs(ran) -> Path:
    return ran[0]


def logged(root: Path, name: str) -> list[tuple[int, dict[str, float]]]:
    """Step and metrics of each line of a run's log, in the order of writing."""
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["metrics"]) for line in map(json.loads, lines) if "train/loss" in line["metrics"]]


def course(root: Path, name: str) -> list[tuple[float, float]]:
    """Loss and gradient norm of the steps that made the weights what they are, in their order."""
    last = dict(logged(root, name))
    passed_over = json.loads((root / name / "run.json").read_text())["passed_over_steps"]
    steps = [last[step] for step in sorted(last) if step not in passed_over]
    return [(m["train/loss"], m["optim/grad_norm"]) for m in steps if m["optim/grad_norm"] != "inf"]


def report(root: Path, name: str, step: int) -> dict:
    return json.loads((root / name / f"bad_steps/step_{step:08d}.json").read_text())


def summary(root: Path, name: str) -> dict:
    return json.loads((root / name / "run.json").read_text())


# --- bad numbers ---


@pytest.mark.parametrize("stage", STAGES)
def test_bad_rows_leave_no_trace_in_the_weights(runs: Path, stage: str) -> None:
    """A step with a NaN in one micro-batch of one rank is skipped; a spike is undone, and its rows passed over."""
    expected = course(runs, f"{stage}-gone")
    assert len(expected) == STEPS - 2
    assert course(runs, f"{stage}-faulty") == expected
    before, after = (runs / f"{stage}-{kind}/checkpoint_final" for kind in ("gone", "faulty"))
    files = sorted(file.name for file in before.glob("*.safetensors"))
    assert files
    for file in files:
        tensors, found = load_file(before / file), load_file(after / file)
        assert tensors.keys() == found.keys()
        assert all(bool((tensors[name] == found[name]).all()) for name in tensors), file


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_tracked_and_counted(runs: Path, stage: str) -> None:
    steps = logged(runs, f"{stage}-faulty")
    assert [step for step, _ in steps] == [1, 2, 3, 4, SPIKED, 4, 6]
    assert [m["optim/skipped_steps"] for _, m in steps] == [0, 1, 1, 1, 1, 1, 1]
    assert (steps[1][1]["train/loss"], steps[1][1]["optim/grad_norm"]) == ("nan", "inf")
    assert not any(name.startswith("data/") and "reward" in name for _, m in steps for name in m)
    found = summary(runs, f"{stage}-faulty")
    assert (found["steps"], found["skipped_steps"], found["passed_over_steps"]) == (STEPS, 1, [SPIKED])
    assert found["first_loss"] == steps[0][1]["train/loss"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_log_tells_a_rollback_apart(runs: Path, stage: str) -> None:
    lines = map(json.loads, (runs / f"{stage}-faulty/metrics.jsonl").read_text().splitlines())
    attempts = [(line["step"], line.get("attempt", 1)) for line in lines]
    assert attempts[:8] == [(1, 1), (2, 1), (3, 1), (4, 1), (SPIKED, 1), (SAVED, 2), (4, 2), (6, 2)]
    read = read_metrics(runs / f"{stage}-faulty/metrics.jsonl")
    assert list(read) == [1, 2, 3, 4, 6]
    taken = [(m["train/loss"], m["optim/grad_norm"]) for step, m in read.items() if step != SKIPPED]
    assert taken == course(runs, f"{stage}-gone")


def test_mlflow_has_a_replayed_step_once(runs: Path) -> None:
    """Step 4 was taken twice, to the same end; step 5 has happened, and was undone."""
    client = MlflowClient(tracking_uri=f"sqlite:///{runs.parent / 'stopped.db'}")
    tracked = client.get_run(summary(runs, "rho1-faulty")["mlflow_run_id"])
    history = client.get_metric_history(tracked.info.run_id, "train/loss")
    assert sorted(point.step for point in history) == [1, 2, 3, 4, SPIKED, 6]
    assert tracked.data.tags["attempts"] == "2"


@pytest.mark.parametrize("stage", STAGES)
def test_the_report_names_the_row(runs: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = report(runs, f"{stage}-faulty", SKIPPED)
    parts = found["micro_batches"]
    assert [(part["rank"], part["micro_batch"]) for part in parts] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [part["loss"] == "nan" for part in parts] == [False, False, False, True]
    monkeypatch.chdir(runs.parent)
    job = jobs()[f"{stage}-faulty"]
    resolved = load_config(Path(job["config"]), job["override"])
    data = open_data(resolved, RANKS)
    rows = data.plan.rows(SKIPPED - 1)
    (row,) = parts[3]["rows"]
    assert row["row"] == rows[FAULTY]
    assert sorted(r["row"] for part in parts for r in part["rows"]) == sorted(rows.tolist())
    line = Path("storage/data/sample/train.jsonl").read_text().splitlines()[row["line"] - 1]
    assert json.loads(line)["problem_id"] == row["problem_id"]
    assert found["lines_to_look_at"] == [row["line"]]
    assert found["config_hash"] == resolved.hash()
    assert found["dataset"]["fingerprint"] == data.train.fingerprint
    spike = report(runs, f"{stage}-faulty", SPIKED)
    passed = [r["row"] for r in spike["passed_over"][str(SPIKED)]]
    assert passed == data.plan.rows(SPIKED - 1).tolist()


def test_what_is_said(ran) -> None:
    said = ran[2]
    line = re.escape("storage/data/sample/train.jsonl; bad-numbers/rho1-faulty/bad_steps/step_00000002.json")
    assert re.search(rf"warning: step 2 was skipped: the loss is nan\. Look at line \d+ of {line}\n", said)
    assert (
        f"going back to bad-numbers/rho1-faulty/step_{SAVED:08d}; the rows of step {SPIKED} are passed over\n" in said
    )
    assert said.count("rho1-faulty/bad_steps/step_00000002.json") == 1, "both ranks come to it; one says it"


def test_a_resume_passes_over_what_the_run_did(runs: Path) -> None:
    assert [step for step, _ in logged(runs, "halted")] == [1, 2, 3, 4, SPIKED, 4, 6]
    assert course(runs, "halted") == course(runs, "rho1-gone")
    state = summary(runs, "halted")
    assert (state["skipped_steps"], state["passed_over_steps"]) == (1, [SPIKED])


@pytest.mark.parametrize("name", OTHERS)
def test_every_way_through_the_optimizer_skips(runs: Path, name: str) -> None:
    expected = course(runs, f"{name}-gone")
    assert len(expected) == 2
    assert course(runs, f"{name}-faulty") == expected
    found = report(runs, f"{name}-faulty", 2)
    assert found["what"] == ("the loss is inf" if name == "offload" else "the gradient is not finite")
    assert len(found["lines_to_look_at"]) == (1 if name == "offload" else BATCH)


def test_float16_finds_its_loss_scale_in_silence(ran) -> None:
    """An overflow that a smaller loss scale mends is counted, and is no bad step, nor one to stop at early."""
    root, ends, _ = ran
    assert ends["float16"] == 0
    steps = logged(root, "float16")
    assert [m["optim/skipped_steps"] for _, m in steps] == [0, 1, 2, 2]
    assert [m["optim/grad_norm"] == "inf" for _, m in steps] == [False, True, True, False]
    assert isinstance(steps[1][1]["train/loss"], float)
    assert {file.name for file in (root / "float16/bad_steps").glob("*.json")} == {"step_00000003.json"}


def test_too_many_in_a_row_stop_also_across_a_resume(ran) -> None:
    root, ends, _ = ran
    assert ends["endless"] == 143
    end = str(ends["endless-on"])
    assert end.startswith("RunError: stopped at step 4: 3 steps in a row had a loss or a gradient that is not finite")
    lines = sorted(line for step in (2, 3, 4) for line in report(root, "endless", step)["lines_to_look_at"])
    assert len(lines) == 3
    assert f"Look at lines {', '.join(map(str, lines))} of storage/data/sample/train.jsonl" in end
    assert end.endswith("go on with --resume bad-numbers/endless/step_00000003.")
    assert not (root / "endless/run.json").exists()
    assert (root / "endless/latest").read_text().strip() == "step_00000003", "no checkpoint of a run that went wrong"


# --- early stopping ---


@pytest.mark.parametrize("stage", STAGES)
def test_an_early_stop_writes_all_that_an_end_writes(ran, stage: str) -> None:
    root, ends, said = ran
    _, step, reason = STOPPED[stage]
    name = f"{stage}-stopped"
    assert ends[name] == 0
    assert summary(root, name)["steps"] == step
    assert f"stopped early at step {step}: {reason}" in said
    assert (root / name / f"step_{step:08d}/manifest.json").is_file()
    for export in ("checkpoint_best", "checkpoint_final"):
        facts = json.loads((root / name / export / "metrics.json").read_text())
        assert facts["step"] == step
        assert facts["val/loss"] > 0
        weights = {file.name for file in (root / name / export).glob("*.safetensors")}
        assert weights == {
            *(["model.safetensors"] if stage != "critic" else []),
            *(["value_head.safetensors"] if stage in ("critic", "verifiable") else []),
        }


@pytest.mark.parametrize("stage", STAGES)
def test_reason_and_figures_of_an_early_stop_are_tracked(runs: Path, stage: str) -> None:
    _, step, reason = STOPPED[stage]
    client = MlflowClient(tracking_uri=f"sqlite:///{runs.parent / 'stopped.db'}")
    found = client.get_run(summary(runs, f"{stage}-stopped")["mlflow_run_id"])
    assert found.info.status == "FINISHED"
    assert found.data.tags["early_stopping/reason"].startswith(reason)
    monitor = {"verifiable": "value_loss", "critic": "value_loss"}.get(stage, "loss")
    losses = [metrics[f"train/{monitor}"] for _, metrics in logged(runs, f"{stage}-stopped")]
    figures = {name: found.data.metrics[f"early_stopping/{name}"] for name in ("final_step", "best_value", "counter")}
    best = min(losses) if stage in ("baseline", "critic") else losses[0]
    # Without min_delta in the way each improvement counts; with it, only the first loss does.
    assert figures["final_step"] == step
    assert figures["best_value"] == pytest.approx(best)
    assert figures["counter"] == (3 if step == 4 else 0)


def test_the_stoppers_count_survives_a_resume(ran) -> None:
    root, ends, _ = ran
    assert ends["stopped-halted"] == 143
    assert ends["stopped-halted-on"] == 0
    assert [step for step, _ in logged(root, "stopped-halted")] == [1, 2, 3, 4]
    assert summary(root, "stopped-halted")["steps"] == 4


# --- as a user meets it ---


@pytest.fixture
def damaged(workspace: Path, tmp_path: Path) -> list[str]:
    """Overrides for a policy in which the weights of one token, which one row alone has, are NaN."""
    policy = tmp_path / "policy"
    shutil.copytree(workspace / "storage/models/micro-policy", policy)
    (token, *_) = AutoTokenizer.from_pretrained(policy)("§", add_special_tokens=False).input_ids
    tensors = load_file(policy / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, policy / "model.safetensors", {"format": "pt"})
    rows = [{"problem_id": f"p{n}", "instruction": "i", "output": f"x = {n}", "is_correct": True} for n in range(8)]
    rows[5]["output"] = "x = '§'"
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f'models.policy.path="{policy}"',
        f'dataset.train="{data}"',
        f'checkpoint.save_dir="{tmp_path}/run"',
        "checkpoint.save_checkpoint_every=0.25",
        "training.batch_size=2",
        "training.gradient_accumulation_steps=1",
        "training.n_epochs=1.0",
        "data_sampling.n_samples=8",
        f"data_sampling.seed={SEED}",
        "stability.max_skipped_steps=1",
        'mlflow.tracking_uri=""',
    ]


# With it, the row of the damaged token is read after a checkpoint has been written.
SEED = 2


def test_the_command_in_the_report_meets_the_same_numbers(damaged: list[str], workspace: Path, tmp_path: Path) -> None:
    command = ["wmtp-ds", "train", "--stage", "baseline", "--config", "stage_configs/local/baseline.toml"]
    done = run_preloaded([*command, *(part for text in damaged for part in ("--override", text))], workspace)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (error,) = re.findall("error: stopped at step .*", done.stderr)
    (file,) = (tmp_path / "run/bad_steps").glob("*.json")
    first = json.loads(file.read_text())
    assert 6 in first["lines_to_look_at"]
    assert f"line{'s' if len(first['lines_to_look_at']) > 1 else ''} " in error

    again = shlex.split(first["again"])
    assert f"{tmp_path}/run/step_{first['step'] - 1:08d}" in again
    repeated = run_preloaded(again, workspace)
    assert repeated.returncode == 1, repeated.stdout + repeated.stderr
    second = json.loads((tmp_path / f"run-step-{first['step']}/bad_steps" / file.name).read_text())
    assert second["micro_batches"] == first["micro_batches"]
    assert second["metrics"]["optim/lr"] == first["metrics"]["optim/lr"]
    assert sorted(path.name for path in (tmp_path / "run").glob("step_*")) == [
        f"step_{step:08d}" for step in range(1, first["step"])
    ], "the run itself is untouched"
