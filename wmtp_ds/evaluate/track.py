"""An evaluation's figures in MLflow, below the run that trained the model."""

from pathlib import Path
from typing import Any

from wmtp_ds import mlflow_client
from wmtp_ds.config.schema import MlflowConfig
from wmtp_ds.errors import UserError
from wmtp_ds.evaluate.evaluation import Evaluation
from wmtp_ds.evaluate.files import RESULTS, SUMMARY
from wmtp_ds.tracking import start_tracking
from wmtp_ds.tracking_state import TrackingState


def track_summary(evaluation: Evaluation, summary: dict[str, Any], tracking_uri: str | None) -> None:
    """Send the figures, the results and the summary; an evaluation that this server has is not sent again.

    Args:
        evaluation: finished.
        summary: of it.
        tracking_uri: MLflow's; None takes that of the model's run, if it has one. On the run's own server the
            evaluation lies below the run, in its experiment.
    """
    place, folder = evaluation.place, evaluation.output
    trained = place.tracking
    uri = (trained.tracking_uri if trained else "") if tracking_uri is None else tracking_uri
    if not uri or (summary["reused"] and _is_same(uri, _sent_to(folder))):
        return
    is_runs_own = trained is not None and _is_same(uri, trained.tracking_uri)
    config = MlflowConfig(
        tracking_uri=uri,
        experiment=trained.experiment if trained is not None and is_runs_own else "wmtp-ds",
        parent_run_id=(place.tracked_run or "") if is_runs_own else "",
    )
    options = evaluation.options.deciding()
    params = {"model": str(place.folder), "problems": evaluation.problem_set.name, **options.pop("sampling"), **options}
    tracker = start_tracking(
        config,
        run_name=f"evaluate-{evaluation.problem_set.name}",
        run_dir=folder,
        tags={"kind": "evaluation"},
        params=params,
    )
    figures = summary["figures"]
    metrics = {name.replace("@", "_at_"): value for name, value in figures.items() if isinstance(value, int | float)}
    metrics |= figures["prediction"] or {}
    tracker.log(0, {f"eval/{name}": value for name, value in metrics.items()})
    for name in (RESULTS, SUMMARY):
        tracker.log_artifact(folder / name)
    tracker.finish("FINISHED")


def _sent_to(folder: Path) -> str:
    """The address in an evaluation's tracking.json; "" where there is none, or it is damaged."""
    try:
        return TrackingState.load(folder).tracking_uri
    except (OSError, UserError):
        return ""


def _is_same(uri: str, stored: str) -> bool:
    """Whether an address is that in a tracking.json, which is cleaned and holds no secrets."""
    return mlflow_client.mask_secrets(mlflow_client.clean_tracking_uri(uri)) == stored
