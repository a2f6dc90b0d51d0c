"""What a run does about bad numbers: what is reported, said, passed over, and when it ends. Without an engine."""

import json
import math
import shlex
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from wmtp_ds import distributed
from wmtp_ds.bad_steps import NO_ROW
from wmtp_ds.checkpoint_files import write_manifest
from wmtp_ds.cli.train import train as train_command
from wmtp_ds.config import load_config
from wmtp_ds.data.index import build_index
from wmtp_ds.errors import RunError
from wmtp_ds.guard import Guard
from wmtp_ds.stability import CONSTANT_STEPS

NAN = math.nan
SPIKES = ("stability.spike_factor=3.0", "stability.spike_window=4", "training.log_interval=1")
ROLLBACK = (*SPIKES, "stability.on_spike=rollback")


class Run:
    """A guard, and the steps that it is told of; the rows of step s are 2s - 2 and 2s - 1, one a micro-batch."""

    def __init__(self, root: Path, *overrides: str, stage: str = "baseline", rewards: tuple[float, float] = (0.0, 1.0)):
        self.root, self.rewards, self.said = root / "run", rewards, list[str]()
        self.resolved = load_config(Path(f"stage_configs/local/{stage}.toml"), list(overrides), checks=False)
        file = root / "train.jsonl"
        row = {"instruction": "i", "output": "o", "is_correct": True}
        # A blank line after each row: row r is line 2r + 1.
        file.write_text("".join(json.dumps(row | {"problem_id": f"p{r}"}) + "\n\n" for r in range(40)))
        rows = SimpleNamespace(rows=lambda step: np.array([2 * step, 2 * step + 1]))
        data: Any = SimpleNamespace(train=build_index(file), plan=rows)
        self.guard = Guard(self.root, self.resolved, data, self.said.append)

    def step(self, step: int, *losses: float, norm: float = 1.0, rescaled: bool = False, **more: float) -> str:
        rows = ([2 * step - 2], [2 * step - 1, NO_ROW])
        hosts = [
            SimpleNamespace(row_ids=torch.tensor(r), rewards=torch.tensor([v]))
            for r, v in zip(rows, self.rewards, strict=True)
        ]
        window: Any = [SimpleNamespace(host=host) for host in hosts]
        metrics = {"train/loss": sum(losses), "optim/grad_norm": norm, **more, **self.guard.extremes(window)}
        verdict = self.guard.judge(metrics, rescaled=rescaled)
        assert not any(name.startswith("data/") for name in metrics)
        self.guard.answer(step, metrics, window, [torch.tensor(loss) for loss in losses])
        return verdict

    def save(self, step: int) -> Path:
        folder = self.root / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps(self.guard.state_dict()))
        write_manifest(folder, step=step, world_size=1, global_batch=8)
        self.guard.came_by(folder)
        return folder

    def roll_back(self) -> None:
        assert self.guard.rollback is not None
        source = self.guard.rollback
        self.guard.load_state_dict(json.loads((source / "state.json").read_text()))
        self.guard.came_by(source)

    def report(self, step: int) -> dict[str, Any]:
        def refuse(text: str) -> float:
            raise AssertionError(f"{text} is not JSON")

        text = (self.root / f"bad_steps/step_{step:08d}.json").read_text()
        found: dict[str, Any] = json.loads(text, parse_constant=refuse)
        return found


@pytest.fixture
def here(tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(checkout)
    return tmp_path


# --- bad steps ---


def test_a_bad_step_is_said_and_written_down(here: Path) -> None:
    run = Run(here, "stability.max_skipped_steps=2")
    run.save(4)
    assert run.step(5, 0.5, NAN, norm=math.inf) == "bad"
    (line,) = run.said
    # Of its two micro-batches the second one's loss was NaN: row 9, which is line 19.
    assert line == (
        f"warning: step 5 was skipped: the loss is nan. Look at line 19 of {here}/train.jsonl; "
        f"{run.root}/bad_steps/step_00000005.json"
    )
    report = run.report(5)
    assert report["step"] == 5
    assert report["what"] == "the loss is nan"
    assert report["lines_to_look_at"] == [19]
    first, second = report["micro_batches"]
    row = {"row": 8, "line": 17, "problem_id": "p8", "is_correct": True}
    assert first == {"rank": 0, "micro_batch": 0, "loss": 0.5, "rows": [row]}
    assert (second["loss"], [r["row"] for r in second["rows"]]) == ("nan", [9])
    assert report["metrics"] == {"train/loss": "nan", "optim/grad_norm": "inf"}
    assert report["config_hash"] == run.resolved.hash()
    assert report["config"]["training.learning_rate"] == run.resolved.config.training.learning_rate
    assert report["dataset"] == {
        "file": f"{here}/train.jsonl",
        "fingerprint": build_index(here / "train.jsonl").fingerprint,
    }
    assert (report["world_size"], report["stage"], report["passed_over"]) == (1, "baseline", {})
    assert sorted(path.name for path in (run.root / "bad_steps").iterdir()) == [
        f"config-{run.resolved.hash()}.toml",
        "step_00000005.json",
    ]


def test_where_each_loss_is_finite_all_rows_are_to_be_looked_at(here: Path) -> None:
    run = Run(here)
    run.step(1, 0.5, 0.25, norm=math.inf)
    assert "step 1 was skipped: the gradient is not finite. Look at lines 1, 3 of" in run.said[0]
    assert run.report(1)["lines_to_look_at"] == [1, 3]


def test_the_command_is_one_that_trains_this_step_again(here: Path) -> None:
    run = Run(here)
    source = run.save(4)
    run.step(5, NAN, 1.0)
    command = shlex.split(run.report(5)["again"])
    assert command[:2] == ["wmtp-ds", "train"]
    typed = train_command.make_context("train", command[2:], resilient_parsing=True).params
    assert (typed["stage"], typed["num_gpus"], typed["resume"]) == ("baseline", 1, str(source))
    again = load_config(typed["config"], list(typed["override"]), checks=False).config
    before = run.resolved.config
    assert again.training == before.training, "the rows and the learning rate of a step depend on the number of steps"
    assert again.data_sampling == before.data_sampling
    assert str(again.checkpoint.save_dir) == f"{before.checkpoint.save_dir}-step-5"
    assert (again.stability.max_skipped_steps, again.mlflow.tracking_uri) == (1, "")


def test_on_several_machines_there_is_no_such_command(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value])
    monkeypatch.setenv("LOCAL_SIZE", "2")
    run = Run(here)
    run.step(1, NAN, 1.0)
    assert run.report(1)["again"] is None


def test_secrets_stay_out_of_the_report(here: Path) -> None:
    run = Run(here, 'mlflow.tracking_uri="http://me:planted@host"')
    run.step(1, NAN, 1.0)
    for file in (run.root / "bad_steps").iterdir():
        assert "planted" not in file.read_text()
        assert file.suffix != ".toml" or tomllib.loads(file.read_text())["stability"]["max_skipped_steps"] == 5


def test_too_many_in_a_row_stop_with_the_rows(here: Path) -> None:
    run = Run(here, "stability.max_skipped_steps=2")
    checkpoint = run.save(4)
    run.step(5, NAN, 1.0)
    run.step(6, 1.0, 1.0)
    run.step(7, 1.0, NAN)
    with pytest.raises(RunError) as caught:
        run.step(8, math.inf, 1.0)
    assert isinstance(caught.value, RunError)
    assert caught.value.exit_code == 1
    text = str(caught.value)
    assert text.startswith("stopped at step 8: 2 steps in a row had a loss or a gradient that is not finite")
    assert f"Look at lines 27, 29 of {here}/train.jsonl" in text
    assert "the weights are as before step 7" in text
    assert text.endswith(f"go on with --resume {checkpoint}.")
    assert run.report(8)["what"] == "the loss is inf"


def test_a_full_disk_is_no_reason_to_stop(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str, **_: Any) -> None:
        raise OSError(28, "No space left on device")

    run = Run(here)
    monkeypatch.setattr(Path, "write_text", full)
    run.step(1, NAN, 1.0)
    assert run.said[0].endswith("step_00000001.json cannot be written: No space left on device")
    assert "Look at line 1 of" in run.said[0]


def test_a_lowered_loss_scale_is_passed_in_silence(here: Path) -> None:
    run = Run(here, "stability.max_skipped_steps=1")
    for step in range(1, 10):
        assert run.step(step, 1.0, 1.0, norm=math.inf, rescaled=True) == "sound"
    assert run.said == []
    assert not run.root.exists()


def test_sound_steps_exchange_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a sound step needs no exchange")

    for name in ("gather_objects", "broadcast_object", "barrier", "gather_equal", "sum_over_ranks", "max_over_ranks"):
        monkeypatch.setattr(distributed, name, refuse)
    run = Run(here, *ROLLBACK, stage="critic")
    monkeypatch.setattr(torch.Tensor, "__float__", refuse)
    for step in range(1, 15):
        assert run.step(step, 1.0, 1.0, **{"value/std": 0.2, "value/mean": 0.5}) == "sound"
    assert run.said == []
    assert not run.root.exists()


# --- spikes ---


def test_a_spike_is_warned_about_when_it_begins(here: Path) -> None:
    run = Run(here, *SPIKES)
    for step, loss in enumerate([1.0, 1.0, 1.0, 9.0, 9.0, 1.0, 1.0, 1.0, 9.0], start=1):
        run.step(step, loss / 2, loss / 2)
        assert run.guard.rollback is None
    assert [line.split(":")[1] for line in run.said] == [" step 4", " step 9"]
    assert "the loss 9 is above 3, 3 times the median of the 3 losses before" in run.said[0]
    assert run.report(4)["lines_to_look_at"] == [13, 15]
    assert run.report(4)["passed_over"] == {}
    assert "stability.on_spike=rollback" in run.report(4)["again"]


def test_a_spike_goes_back_and_passes_over_its_rows(here: Path) -> None:
    run = Run(here, *ROLLBACK)
    for step in (1, 2):
        run.step(step, 0.5, 0.5)
    checkpoint = run.save(2)
    run.step(3, 0.5, 0.5)
    run.step(4, 9.0, 0.5)
    assert run.guard.rollback == checkpoint
    assert [r["line"] for r in run.report(4)["passed_over"]["4"]] == [13, 15]
    assert run.said[-1] == f"going back to {checkpoint}; the rows of step 4 are passed over"
    run.roll_back()
    assert run.guard.rollback is None
    assert [run.guard.passes_over(step) for step in (3, 4, 5)] == [False, True, False]
    run.step(3, 0.5, 0.5)
    state = run.guard.state_dict()
    assert (state["passed_over"], state["rollbacks"], state["losses"]) == ([4], 1, [1.0, 1.0, 1.0])
    # The loss stays high: the update of step 3 has broken the weights, and they are in the checkpoint of step 3.
    run.save(3)
    run.step(5, 9.0, 0.5)
    assert run.guard.rollback == checkpoint
    run.roll_back()
    assert run.guard.passed_over == [3, 4, 5]


def test_a_damaged_checkpoint_is_not_gone_back_to(here: Path) -> None:
    run = Run(here, *ROLLBACK)
    for step in (1, 2, 3):
        run.step(step, 0.5, 0.5)
    first, second = run.save(2), run.save(3)
    (second / "state.json").write_text("{}")
    run.step(4, 9.0, 0.5)
    assert run.guard.rollback == first


def test_without_a_checkpoint_the_run_goes_on_and_says_so_once(here: Path) -> None:
    run = Run(here, *ROLLBACK)
    for step, loss in enumerate([1.0, 1.0, 1.0, 9.0, 1.0, 9.0], start=1):
        run.step(step, loss / 2, loss / 2)
        assert run.guard.rollback is None
    assert sum("there is no checkpoint of this run before step 4" in line for line in run.said) == 1
    assert sum("a spike" in line for line in run.said) == 2
    assert not any("there is no checkpoint" in line and "step 6" in line for line in run.said)
    assert run.guard.passed_over == []


def test_too_many_rollbacks_stop(here: Path) -> None:
    run = Run(here, *ROLLBACK, "stability.max_rollbacks=1")
    for step in (1, 2):
        run.step(step, 0.5, 0.5)
    checkpoint = run.save(2)
    run.step(3, 9.0, 0.5)
    run.roll_back()
    run.step(4, 0.5, 0.5)
    with pytest.raises(RunError) as caught:
        run.step(5, 9.0, 0.5)
    assert str(caught.value).startswith("stopped at step 5: the loss 9.5 is above 3")
    assert "after 1 rollbacks (stability.max_rollbacks)" in str(caught.value)
    assert str(caught.value).endswith(f"go on with --resume {checkpoint}.")
    assert run.report(5)["passed_over"] == {}


# --- warnings ---


def test_warnings_name_the_step_and_a_bad_step_has_none(here: Path) -> None:
    run = Run(here, stage="critic")
    for step in range(1, 2 * CONSTANT_STEPS):
        run.step(step % 15 + 1, 0.5, 0.5, **{"value/std": 0.0, "value/mean": 0.5})
    assert len(run.said) == 1
    assert run.said[0].startswith(f"warning: step {CONSTANT_STEPS % 15 + 1}: the value head has predicted about 0.5")
    alike = Run(here, stage="critic", rewards=(1.0, 1.0))
    for _ in range(2 * CONSTANT_STEPS):
        alike.step(1, 0.5, 0.5, **{"value/std": 0.0, "value/mean": 0.5})
    assert alike.said == []


def test_rewards_of_all_ranks_count(here: Path) -> None:
    """Each rank's own are alike; the extremes that `WindowMetrics` takes over the ranks are not."""
    run = Run(here, stage="critic", rewards=(1.0, 1.0))
    for _ in range(CONSTANT_STEPS):
        metrics = {"train/loss": 1.0, "optim/grad_norm": 1.0, "value/std": 0.0, "value/mean": 0.5}
        run.guard.judge(metrics | {"data/reward_high": 1.0, "data/minus_reward_low": -0.0}, rescaled=False)
        run.guard.answer(1, metrics, [], [])
    assert len(run.said) == 1
