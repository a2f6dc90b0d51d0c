"""Stages in a row: all configs checked before the first starts, the critic handed over, nothing trained twice."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from wmtp_ds import pipeline as pipelining
from wmtp_ds.cli.main import main
from wmtp_ds.config.training import CriticTraining, unregister_stage
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.launch import Request
from wmtp_ds.pipeline import critic_of, plan_pipeline, run_pipeline
from wmtp_ds.run_summary import read_summary, write_summary

LOCAL = "stage_configs/local/{}.toml"
UNTRACKED = 'mlflow.tracking_uri=""'


@pytest.fixture
def here(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small checkout as the current directory, without runs."""
    monkeypatch.chdir(checkout)
    shutil.rmtree(checkout / "checkpoints", ignore_errors=True)
    return checkout


def request(stage: str, *override: str, config: str | None = None) -> Request:
    return Request(stage, config=Path(config or LOCAL.format(stage)), override=(UNTRACKED, *override))


class Launcher:
    """Stands for the real one: leaves in the run's folder what training leaves, or fails."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.codes: dict[str, int] = {}
        self.run_ids = False
        self.exports = True

    def __call__(self, asked: Request) -> int:
        self.requests.append(asked)
        code = self.codes.get(asked.stage, 0)
        if code == 0:
            config = asked.load(checks=False).config
            folder = Path(config.checkpoint.save_dir)
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "checkpoint_best").mkdir(parents=True) if self.exports else folder.mkdir(parents=True)
            lines = [{"step": s, "time": 0, "metrics": {"train/loss": 3.0 / s, "val/loss": 2.0}} for s in (1, 2)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            write_summary(
                folder,
                completed=True,
                stage=asked.stage,
                steps=2,
                first_loss=3.0,
                last_loss=1.5,
                seconds=1.0,
                tokens_per_s=100.0,
                mlflow_run_id=f"{asked.stage}-run" if self.run_ids else None,
                **{"val/loss": 2.0},
            )
        return code

    @property
    def stages(self) -> list[str]:
        return [asked.stage for asked in self.requests]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    fake = Launcher()
    monkeypatch.setattr(pipelining, "launch", fake)
    monkeypatch.setattr(pipelining, "_why_not_in_mlflow", lambda *_: "")
    return fake


def run(*requests: Request, reuse: bool = False) -> tuple[int, list[str], list[str]]:
    """Exit code, names of the complete runs' folders, and what was said."""
    said: list[str] = []
    code, folders = run_pipeline(requests, name="trial", reuse=reuse, say=said.append)
    return code, [folder.name for folder in folders], said


# --- the plan ---


def test_a_critic_that_is_not_there_yet_is_no_problem(here):
    assert not (here / "checkpoints").exists()
    for override in ((), ('mlflow.tracking_uri="sqlite:///mlflow.db"',)):
        requests = [request(stage, *override) for stage in ("baseline", "critic", "verifiable", "rho1")]
        steps = plan_pipeline(requests)
        assert [step.request for step in steps] == requests
        assert [step.folder.name for step in steps] == [f"local-{asked.stage}" for asked in requests]
        assert [step.makes_critic for step in steps] == [False, True, False, False]
    assert not (here / "checkpoints").exists()


@pytest.mark.parametrize("stages", [["verifiable"], ["verifiable", "critic"], ["baseline", "verifiable"]])
def test_without_a_critic_before_it_the_configs_own_is_needed(here, stages):
    with pytest.raises(UserError, match=r"checkpoints/local-critic/checkpoint_best does not exist"):
        plan_pipeline([request(stage) for stage in stages])


def test_all_problems_of_all_configs_are_said_before_anything_starts(here, launcher):
    requests = [
        request("critic", 'models.policy.path="nowhere/policy"'),
        request("verifiable", "training.beta=-1", 'experiment.critic_checkpoint="gone"'),
        request("rho1", 'models.reference.path="nowhere/reference"', "training.k_percent=2"),
    ]
    with pytest.raises(UserError) as caught:
        run(*requests)
    message = str(caught.value)
    for part in ("nowhere/policy", "training.beta", "nowhere/reference", "training.k_percent"):
        assert message.count(part) >= 1, part
    for stage in ("critic", "verifiable", "rho1"):
        assert f"stage_configs/local/{stage}.toml: " in message
    # The critic of verifiable comes from the pipeline, whatever its own config says.
    assert "critic_checkpoint" not in message
    assert launcher.requests == []


def test_a_check_of_another_kind_is_not_lost_beside_the_critics(here):
    """What is wrong besides the critic is counted and said, and the critic is not."""
    with pytest.raises(UserError) as caught:
        plan_pipeline([request("critic"), request("verifiable", 'dataset.train="nowhere.jsonl"')])
    assert "verifiable.toml: 1 problem\n" in str(caught.value)
    assert "nowhere.jsonl" in str(caught.value)


def test_two_stages_in_one_folder(here):
    same = 'checkpoint.save_dir="checkpoints/same"'
    with pytest.raises(UserError, match="two stages of the pipeline write to checkpoints/same"):
        plan_pipeline([request("baseline", same), request("rho1", same)])


def test_a_critic_that_would_not_be_exported_is_said_before_it_is_trained(here, launcher):
    requests = [request("critic", "checkpoint.save_best=false"), request("verifiable")]
    with pytest.raises(UserError, match=r"critic\.toml: checkpoint\.save_best is false, but .*verifiable\.toml needs"):
        run(*requests)
    assert launcher.requests == []
    plan_pipeline([requests[0], request("rho1")])  # nobody needs it


# --- running ---


def test_the_critic_is_handed_over_by_path_where_nothing_is_tracked(here, launcher):
    code, folders, said = run(*(request(stage) for stage in ("baseline", "critic", "verifiable", "rho1")))
    assert (code, folders) == (0, ["local-baseline", "local-critic", "local-verifiable", "local-rho1"])
    assert launcher.stages == ["baseline", "critic", "verifiable", "rho1"]
    critics = [asked.critic_checkpoint for asked in launcher.requests]
    assert critics == [None, None, "checkpoints/local-critic/checkpoint_best", None]
    assert all(asked.override == (UNTRACKED,) for asked in launcher.requests), "no parent run"
    assert said == []


def test_the_critic_is_handed_over_as_an_artifact_where_it_is_tracked(here, launcher, monkeypatch):
    launcher.run_ids = True
    monkeypatch.setattr(pipelining, "_start_parent", lambda *_: "parent-run")
    tracked = 'mlflow.tracking_uri="sqlite:///mlflow.db"'
    code, _, _ = run(request("critic", tracked), request("verifiable", tracked))
    assert code == 0
    critic = critic_of(here / "checkpoints/local-critic")
    assert critic.startswith("runs:/critic-run/")
    assert [asked.critic_checkpoint for asked in launcher.requests] == [None, critic]
    assert [asked.override[-1] for asked in launcher.requests] == ['mlflow.parent_run_id="parent-run"'] * 2


def test_an_artifact_that_mlflow_cannot_give_is_handed_over_by_path(here, launcher, monkeypatch):
    """The server may have died, or have no room for artifacts: the critic lies here all the same."""
    launcher.run_ids = True
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(pipelining, "launch", launcher)
    dead = 'mlflow.tracking_uri="http://127.0.0.1:9"'
    requests = [request("critic", dead), request("verifiable", dead)]
    code, _, said = run(*requests, reuse=True)
    assert code == 0
    assert launcher.requests[-1].critic_checkpoint == "checkpoints/local-critic/checkpoint_best"
    assert any(re.search("runs:/critic-run/.* cannot be had .* handed over as checkpoints/", line) for line in said)
    # It is the same critic, and so verifiable is not trained again once the server is back.
    monkeypatch.setattr(pipelining, "_why_not_in_mlflow", lambda *_: "")
    launcher.requests.clear()
    assert run(*requests, reuse=True)[0] == 0
    assert launcher.requests == []


def test_an_artifact_of_another_server_is_handed_over_by_path(here, launcher, monkeypatch):
    launcher.run_ids = True
    monkeypatch.setattr(pipelining, "_start_parent", lambda *_: None)
    run(request("critic", 'mlflow.tracking_uri="sqlite:///mlflow.db"'), request("verifiable"))
    assert launcher.requests[-1].critic_checkpoint == "checkpoints/local-critic/checkpoint_best"


def test_the_last_critic_before_a_stage_is_the_one(here, launcher):
    second = request("critic", 'experiment.name="second"')
    run(request("critic"), second, request("verifiable"))
    assert launcher.requests[-1].critic_checkpoint == "checkpoints/second/checkpoint_best"


def test_a_stage_of_ones_own_makes_a_critic_too(here, launcher):
    class OwnCritic(CriticTraining, stage="own_critic"):
        """A fifth stage that trains a value head."""

    try:
        own = request("own_critic", 'experiment.stage="own_critic"', config=LOCAL.format("critic"))
        assert run(own, request("verifiable"))[0] == 0
    finally:
        unregister_stage("own_critic")
    assert launcher.requests[-1].critic_checkpoint == "checkpoints/local-critic/checkpoint_best"


@pytest.mark.parametrize(("failing", "code"), [("critic", 1), ("critic", 143), ("verifiable", 2), ("baseline", 130)])
def test_a_stage_that_fails_ends_the_pipeline(here, launcher, failing, code):
    launcher.codes[failing] = code
    stages = ["baseline", "critic", "verifiable", "rho1"]
    found, folders, said = run(*(request(stage) for stage in stages))
    before = stages[: stages.index(failing)]
    assert (found, folders) == (code, [f"local-{stage}" for stage in before])
    assert launcher.stages == [*before, failing]
    assert said == [f"{failing} ended with exit code {code}; the stages after it were not started"]


def test_exit_code_0_without_a_completed_run_is_a_failure(here, monkeypatch):
    """The launcher returns 0 where it was killed itself."""
    monkeypatch.setattr(pipelining, "launch", lambda _: 0)
    assert run(request("baseline"), request("rho1"))[:2] == (1, [])


def test_a_critic_that_was_not_exported(here, launcher):
    launcher.exports = False
    with pytest.raises(RunError, match=r"local-critic has no checkpoint_best.*checkpoint\.save_best"):
        run(request("critic"), request("verifiable"))


# --- reuse ---


def test_what_is_complete_is_not_trained_again(here, launcher):
    stages = ["baseline", "critic", "verifiable"]
    requests = [request(stage) for stage in stages]
    run(*requests, reuse=True)
    code, folders, said = run(*requests, reuse=True)
    assert (code, folders) == (0, [f"local-{stage}" for stage in stages])
    assert launcher.stages == stages, "once each"
    assert len(said) == 3
    assert all("is complete and its config has not changed; not trained again" in line for line in said)
    run(*requests)
    assert launcher.stages == stages * 2, "without reuse all are"


@pytest.mark.parametrize(
    ("stage", "override", "again"),
    [
        ("verifiable", "training.beta=0.5", ["verifiable"]),
        ("baseline", "runtime.seed=9", ["baseline"]),
        ("critic", "training.gamma=0.9", ["critic"]),
    ],
)
def test_a_changed_config_is_trained_again(here, launcher, stage, override, again):
    stages = ["baseline", "critic", "verifiable"]
    run(*(request(name) for name in stages), reuse=True)
    launcher.requests.clear()
    run(*(request(name, *([override] if name == stage else [])) for name in stages), reuse=True)
    assert launcher.stages == again


def test_a_new_critic_run_is_handed_to_verifiable_again(here, launcher, monkeypatch):
    launcher.run_ids = True
    monkeypatch.setattr(pipelining, "_start_parent", lambda *_: "parent")
    tracked = 'mlflow.tracking_uri="sqlite:///mlflow.db"'
    requests = [request("critic", tracked), request("verifiable", tracked)]
    run(*requests, reuse=True)
    write_summary(here / "checkpoints/local-critic", mlflow_run_id="another-run")
    launcher.requests.clear()
    run(*requests, reuse=True)
    assert launcher.stages == ["verifiable"]
    assert "another-run" in str(launcher.requests[0].critic_checkpoint)


def test_an_unfinished_run_is_trained_again(here, launcher):
    run(request("baseline"), reuse=True)
    write_summary(here / "checkpoints/local-baseline", completed=False)
    run(request("baseline"), reuse=True)
    assert launcher.stages == ["baseline", "baseline"]
    assert read_summary(here / "checkpoints/local-baseline")["completed"] is True


# --- the parent run ---


def test_a_server_that_does_not_answer_costs_the_parent_and_nothing_else(here, launcher, monkeypatch):
    def refuse(_: str) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr("wmtp_ds.mlflow_client.connect", refuse)
    code, _, said = run(request("baseline", 'mlflow.tracking_uri="http://127.0.0.1:9"'))
    assert code == 0
    assert said[0].startswith("warning: MLflow made no parent run (")
    assert not any("parent_run_id" in part for part in launcher.requests[0].override)


def test_the_parent_is_made_once_and_its_config_may_name_it(here, launcher, monkeypatch):
    made = []

    class Client:
        def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
            return None

        def create_experiment(self, name: str, artifact_location: str | None) -> str:
            made.append(("experiment", name, artifact_location))
            return "7"

        def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> SimpleNamespace:
            made.append(("run", experiment, run_name, tags["stage"]))
            return SimpleNamespace(info=SimpleNamespace(run_id="made-run"))

        def set_terminated(self, run_id: str) -> None:
            made.append(("ended", run_id))

    monkeypatch.setattr("wmtp_ds.mlflow_client.connect", lambda _: Client())
    tracked = ('mlflow.tracking_uri="sqlite:///mlflow.db"', 'mlflow.s3_artifacts="s3://bucket/prefix"')
    run(request("baseline", *tracked), request("rho1", *tracked))
    assert [entry[0] for entry in made] == ["experiment", "run", "ended"]
    assert made[0][2] == "s3://bucket/prefix"
    assert made[1][1:] == ("7", "trial", "pipeline")
    assert {asked.override[-1] for asked in launcher.requests} == {'mlflow.parent_run_id="made-run"'}
    made.clear()
    launcher.requests.clear()
    run(request("baseline", *tracked, 'mlflow.parent_run_id="given"'))
    assert made == []
    assert launcher.requests[0].override[-1] == 'mlflow.parent_run_id="given"'


# --- the command ---


@pytest.fixture
def command(here, launcher, capsys) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["pipeline", *arguments, "--override", UNTRACKED])
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return call


def test_the_command_shows_a_table_and_a_figure(command, launcher, here):
    figure = "new/folder/loss"
    code, out, _ = command(
        LOCAL.format("critic"), LOCAL.format("verifiable"), "--num_gpus", "3", "--device", "cpu", "--figure", figure
    )
    assert code == 0
    for part in ("stage", "val loss", "critic", "verifiable", "1.5000", "not tracked"):
        assert part in out
    assert (here / figure).read_bytes().startswith(b"\x89PNG")
    assert [(asked.num_gpus, asked.device) for asked in launcher.requests] == [(3, "cpu")] * 2


def test_json_is_strict(command, launcher, here, monkeypatch):
    original = pipelining.launch

    def diverge(asked: Request) -> int:
        code = original(asked)
        write_summary(Path("checkpoints/local-baseline"), last_loss=math.nan, first_loss=math.inf)
        return code

    monkeypatch.setattr(pipelining, "launch", diverge)
    code, out, _ = command(LOCAL.format("baseline"), "--json")
    (result,) = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (code, result["stage"], result["folder"]) == (0, "baseline", "checkpoints/local-baseline")
    assert (result["last_loss"], result["first_loss"], result["val/loss"]) == (None, None, 2.0)


def test_the_command_returns_the_failing_stages_code(command, launcher):
    launcher.codes["rho1"] = 143
    code, out, err = command(LOCAL.format("baseline"), LOCAL.format("rho1"))
    assert code == 143
    assert "baseline" in out
    assert "rho1 ended with exit code 143" in err


def test_the_command_says_all_that_is_wrong_with_all_files(command, launcher, here):
    (here / "broken.toml").write_text("[experiment\n")
    code, out, err = command("nowhere.toml", "broken.toml", LOCAL.format("baseline"))
    assert (code, out) == (2, "")
    assert "nowhere.toml: 1 problem" in err
    assert "broken.toml: 1 problem" in err
    (here / "broken.toml").unlink()
    assert launcher.requests == []


def test_a_figure_that_cannot_be_written_is_said_before_training(command, launcher, here):
    for figure, part in (("stage_configs", "is a directory"), ("bin/train_stage.py/x.png", "cannot be made")):
        code, _, err = command(LOCAL.format("baseline"), "--figure", figure)
        assert code == 2
        assert part in err
    assert launcher.requests == []
