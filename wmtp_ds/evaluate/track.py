"""An evaluation's figures in MLflow, below the run that trained the model."""

from typing import Any

from wmtp_ds.config.schema import MlflowConfig
from wmtp_ds.evaluate.evaluation import Evaluation
from wmtp_ds.evaluate.files import RESULTS, SUMMARY
from wmtp_ds.tracking import start_tracking
from wmtp_ds.tracking_state import TrackingState


def track_summary(evaluation: Evaluation, summary: dict[str, Any], tracking_uri: str | None) -> None:
    """Send the figures, the results and the summary; an evaluation that was sent is not sent again.

    Args:
        evaluation: finished.
        summary: of it.
        tracking_uri: MLflow's; None takes that of the model's run, if it has one.
    """
    place, folder = evaluation.place, evaluation.output
    trained = _training_state(evaluation)
    uri = (trained.tracking_uri if trained else "") if tracking_uri is None else tracking_uri
    if not uri or (summary["reused"] and (folder / "tracking.json").exists()):
        return
    parent = place.tracked_run if tracking_uri is None else None
    config = MlflowConfig(
        tracking_uri=uri,
        experiment=trained.experiment if trained and tracking_uri is None else "wmtp-ds",
        parent_run_id=parent or "",
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


def _training_state(evaluation: Evaluation) -> TrackingState | None:
    if evaluation.place.run is None:
        return None
    try:
        return TrackingState.load(evaluation.place.run)
    except Exception:  # a run without tracking, or a damaged file: nothing that an evaluation needs
        return None
