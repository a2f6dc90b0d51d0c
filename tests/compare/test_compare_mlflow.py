"""Runs by their ids, from a real SQLite store; and the same runs by their folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wmtp_ds import mlflow_client, tracking
from wmtp_ds.config.schema import MlflowConfig
from wmtp_ds.tracking import start_tracking

Make = Callable[..., Path]
Call = Callable[..., tuple[int, Any, str]]


pytestmark = pytest.mark.usefixtures("own_variables")


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FLUSH_INTERVAL", 0.05)


def run_id(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["mlflow_run_id"])


def track_evaluation(store: str, folder: Path, parent: str) -> str:
    """As `wmtp-ds evaluate` does."""
    config = MlflowConfig(tracking_uri=store, parent_run_id=parent)
    tracker = start_tracking(
        config, run_name="evaluate-mbpp", run_dir=folder, tags={"kind": "evaluation"}, params={"problems": "mbpp"}
    )
    for name in ("results.jsonl", "summary.json"):
        tracker.log_artifact(folder / name)
    assert tracker.finish()
    assert tracker.run_id is not None
    return tracker.run_id


def test_ids_and_folders_say_the_same(
    make_run: Make, make_evaluation: Make, compare: Call, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = {
        step: {"val/loss": 3.0 / step, "train/loss": 2.0 / step, "perf/tokens_seen": 9.0 * step} for step in (2, 4)
    }
    metrics[6] = {"val/loss": float("nan"), "train/loss": float("inf"), "perf/seconds": 7.0}
    runs = [
        make_run("one", uri=store, metrics=metrics),
        make_run("two", "training.learning_rate=7e-4", uri=store, tags={"world_size": "4"}),
    ]
    ids = [run_id(run) for run in runs]
    children = []
    for correct, run in enumerate(runs):
        counts = {"p": (1, correct), "q": (1, 1)}
        folder = make_evaluation(run / "evaluation", run / "checkpoint_best", counts)
        children.append(track_evaluation(store, folder, run_id(run)))
    _, by_folder, _ = compare(*runs, "--json", "--output", "folders")
    code, by_id, err = compare(*ids, "--tracking-uri", store, "--json", "--output", "ids")
    assert code == 0, err
    for part in ("arms", "config_differences", "metrics", "curves"):
        assert by_id[part] == by_folder[part], part
    assert set(by_id["curves"]) >= {"val/loss", "train/loss"}
    assert by_id["curves"]["val/loss"]["one"] == [[2, 1.5], [4, 0.75], [6, "nan"]]
    for name, facts in by_id["runs"].items():
        same = {key: value for key, value in facts.items() if key != "evaluations"}
        assert same == {key: value for key, value in by_folder["runs"][name].items() if key != "evaluations"}
    assert [facts["ranks"] for facts in by_id["runs"].values()] == [2, 4]
    records = [
        [{k: v for k, v in r.items() if k != "evaluations"} for r in found["pass_at_k"]] for found in (by_id, by_folder)
    ]
    assert records[0] == records[1]
    assert records[0][0]["difference"] == 0.5
    # The store that the environment names, ids as MLflow writes them, evaluations themselves, and both kinds mixed.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    _, mixed, _ = compare(f"runs:/{ids[0]}", runs[1], "--json")
    assert mixed["curves"] == by_id["curves"]
    _, evaluated, _ = compare(*children, "--json")
    assert evaluated["pass_at_k"][0]["difference"] == 0.5
    assert evaluated["arms"] == by_id["arms"]
    code, _, err = compare(ids[0], runs[0])
    assert code == 2
    assert "the same run twice" in err


def test_what_a_resume_has_changed_and_steps_taken_twice(make_run: Make, compare: Call, store: str) -> None:
    run = make_run("one", uri=store, metrics={step: {"train/loss": float(step)} for step in (1, 2, 3, 4)})
    config = MlflowConfig(tracking_uri=store)
    tracker = start_tracking(
        config,
        run_name="one",
        run_dir=run,
        tags={},
        params={"training.learning_rate": 0.5},
        resume_run_id=run_id(run),
    )
    tracker.go_back(2)
    for step in (3, 4, 5):
        tracker.log(step, {"train/loss": 10.0 * step})
    assert tracker.finish()
    other = make_run("two", uri=store)
    _, found, _ = compare(run_id(run), run_id(other), "--tracking-uri", store, "--json")
    assert found["curves"]["train/loss"]["one"] == [[1, 1.0], [2, 2.0], [3, 30.0], [4, 40.0], [5, 50.0]]
    assert found["config_differences"]["training.learning_rate"]["one"] == "0.5"
    assert any("one: went back to a checkpoint" in text for text in found["warnings"])


def test_runs_that_are_not_there(make_run: Make, compare: Call, store: str, here: Path) -> None:
    one = make_run("one", uri=store)
    unknown = "0" * 32
    code, _, err = compare(one, unknown, "--tracking-uri", store)
    assert code == 2
    assert f"has no run {unknown}" in err
    other = make_run("two", uri=store)
    client = mlflow_client.connect(store)
    client.delete_run(run_id(other))
    code, _, err = compare(one, run_id(other), "--tracking-uri", store)
    assert code == 2
    assert "was deleted from MLflow" in err
    code, _, err = compare(one, unknown, "--tracking-uri", "http://127.0.0.1:9")
    assert code == 1
    assert "MLflow at http://127.0.0.1:9 cannot be read" in err
    code, _, err = compare(one, unknown, "--tracking-uri", "")
    assert code == 2
    assert "tracking is off" in err
    assert not list(here.glob("*.db"))


def test_evaluations_below_a_run_count_if_they_are_of_its_export_as_it_is_now(
    make_run: Make, make_evaluation: Make, compare: Call, store: str
) -> None:
    run, other = make_run("one", uri=store), make_run("two", uri=store)
    step, best = run / "exported_step_00000002", run / "checkpoint_best"
    step.mkdir()
    (step / "config.json").write_text("{}")
    track_evaluation(store, make_evaluation(other / "e", other / "checkpoint_best", {"p": (1, 0)}), run_id(other))
    children = [track_evaluation(store, make_evaluation(run / "early", best, {"p": (1, 0)}), run_id(run))]
    (best / "config.json").write_text('{"trained": "on"}')
    for number, (model, correct) in enumerate(((best, 1), (step, 0))):
        folder = make_evaluation(run / f"e{number}", model, {"p": (1, correct)})
        children.append(track_evaluation(store, folder, run_id(run)))
    early, now, of_step = (f"runs:/{child}" for child in children)
    _, found, _ = compare(run_id(other), run_id(run), "--tracking-uri", store, "--json")
    assert found["runs"]["one"]["evaluations"] == [now]
    assert found["pass_at_k"][0]["difference"] == 1.0
    assert f"one: the evaluation {early} is left out: {best} has held another model since" in found["warnings"]
    left_out = f"one: the evaluation {of_step} is left out: it is of {step}, checkpoint_best stands for the run"
    assert left_out in found["warnings"]
    _, found, _ = compare(run_id(other), children[-1], "--tracking-uri", store, "--json")
    assert found["pass_at_k"][0]["difference"] == 0.0
    assert f"one: the evaluation is of {step}; curves and metrics are the whole run's" in found["warnings"]


def test_a_run_that_was_evaluated_at_a_checkpoint_alone(
    make_run: Make, make_evaluation: Make, compare: Call, store: str
) -> None:
    run, other = make_run("one", uri=store), make_run("two", uri=store)
    for name in ("exported_step_00000002", "checkpoint_final"):
        (run / name).mkdir()
        (run / name / "config.json").write_text("{}")
    track_evaluation(store, make_evaluation(run / "a", run / "exported_step_00000002", {"p": (1, 1)}), run_id(run))
    track_evaluation(store, make_evaluation(other / "a", other / "checkpoint_best", {"p": (1, 1)}), run_id(other))
    _, found, _ = compare(run_id(run), run_id(other), "--tracking-uri", store, "--json")
    assert found["pass_at_k"] == []
    assert "one: has no evaluation below it in MLflow: wmtp-ds evaluate makes one" in found["warnings"]
    assert any("exported_step_00000002, neither checkpoint_best nor" in text for text in found["warnings"])
    track_evaluation(store, make_evaluation(run / "b", run / "checkpoint_final", {"p": (1, 0)}), run_id(run))
    _, found, _ = compare(run_id(run), run_id(other), "--tracking-uri", store, "--json")
    assert found["pass_at_k"][0]["difference"] == 1.0, "there is no best export that it could be told from"
