"""What MLflow gets of an evaluation, in a real SQLite store."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from wmtp_ds import mlflow_client, tracking
from wmtp_ds.config.schema import MlflowConfig
from wmtp_ds.decoding import Sampling
from wmtp_ds.evaluate.evaluation import Evaluation
from wmtp_ds.evaluate.model import Place
from wmtp_ds.evaluate.problems import ProblemSet
from wmtp_ds.evaluate.samples import SampleOptions
from wmtp_ds.evaluate.track import track_summary
from wmtp_ds.run_summary import write_summary
from wmtp_ds.tracking import start_tracking

pytestmark = pytest.mark.usefixtures("own_variables")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "FLUSH_INTERVAL", 0.05)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def trained(uri: str, experiment: str) -> tuple[Path, str]:
    """A run's folder as it is while the run goes on, or was killed: there is no run.json; and its MLflow id."""
    run = Path("checkpoints/run").absolute()
    config = MlflowConfig(tracking_uri=uri, experiment=experiment)
    tracker = start_tracking(config, run_name="run", run_dir=run, tags={}, params={})
    assert tracker.finish("FINISHED")
    assert tracker.run_id is not None
    return run, tracker.run_id


def evaluated(run: Path | None) -> tuple[Evaluation, dict[str, Any]]:
    """An evaluation that has finished."""
    options = SampleOptions(1, Sampling())
    place = Place(Path("model") if run is None else run / "checkpoint_best", run)
    evaluation = Evaluation(place, ProblemSet("rows", [], {}), options, (1,), Path("out").absolute(), "cpu")
    evaluation.output.mkdir(exist_ok=True)
    summary = {"figures": {"pass@1": 0.25, "prediction": {"loss_head_1": 2.5}}, "reused": False}
    for name in ("results.jsonl", "summary.json"):
        (evaluation.output / name).write_text(json.dumps(summary))
    return evaluation, summary


def sent(uri: str, experiment: str) -> list[Any]:
    """Evaluations in an experiment, newest first."""
    client = mlflow_client.connect(uri)
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else list(client.search_runs([found.experiment_id], "tags.kind = 'evaluation'"))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("ended", [False, True])
def test_figures_lie_below_the_run_that_trained_the_model(store: str, here: Path, named: bool, ended: bool) -> None:
    """Also where the run's own server is named, and before the run has ended."""
    run, run_id = trained(store, here.name)
    if ended:
        write_summary(run, mlflow_run_id=run_id)
    # Relative to the current folder, it is the same store.
    uri = f"sqlite:///{os.path.relpath(store.removeprefix('sqlite:///'))}"
    track_summary(*evaluated(run), uri if named else None)
    [child] = sent(store, here.name)
    assert child.data.tags["mlflow.parentRunId"] == run_id
    assert child.data.metrics == {"eval/pass_at_1": 0.25, "eval/loss_head_1": 2.5}
    names = {item.path for item in mlflow_client.connect(store).list_artifacts(child.info.run_id)}
    assert names == {"results.jsonl", "summary.json"}


def test_another_server_knows_nothing_of_the_run(store: str, here: Path) -> None:
    run, _ = trained(store, here.name)
    other = f"sqlite:///{here}/other.db"
    track_summary(*evaluated(run), other)
    [child] = sent(other, "wmtp-ds")
    assert "mlflow.parentRunId" not in child.data.tags
    assert not sent(store, here.name)


def test_a_server_gets_an_evaluation_once_and_another_one_too(store: str, here: Path) -> None:
    run, run_id = trained(store, here.name)
    evaluation, summary = evaluated(run)
    again = summary | {"reused": True}
    other = f"sqlite:///{here}/other.db"
    track_summary(evaluation, summary, other)
    track_summary(evaluation, again, other)
    assert len(sent(other, "wmtp-ds")) == 1
    track_summary(evaluation, again, None)  # to the run's own
    track_summary(evaluation, again, store)
    [child] = sent(store, here.name)
    assert child.data.tags["mlflow.parentRunId"] == run_id
    assert len(sent(other, "wmtp-ds")) == 1


def test_a_model_without_a_run_is_tracked_where_a_server_is_named(store: str, here: Path) -> None:
    evaluation, summary = evaluated(None)
    before = len(sent(store, "wmtp-ds"))
    track_summary(evaluation, summary, None)
    assert not (evaluation.output / "tracking.json").exists()
    track_summary(evaluation, summary, store)
    assert len(sent(store, "wmtp-ds")) == before + 1
