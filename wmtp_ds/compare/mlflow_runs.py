"""Runs from MLflow: a server, or a database file."""

import dataclasses
import math
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp_ds import mlflow_client
from wmtp_ds.compare.run import Run, Series, last, without_others_losses
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.evaluate.files import RESULTS, SUMMARY, Finished, read_finished
from wmtp_ds.run_summary import BEST, FINAL

if TYPE_CHECKING:
    import mlflow.entities

RUN_ID = re.compile(r"[0-9a-f]{32}")
_RESUMED = "resumed."
_PARENT = "mlflow.parentRunId"


class MlflowRuns:
    """Reads runs of one MLflow store.

    Args:
        tracking_uri: of the store.

    Raises:
        UserError: it is none, or a database file that is not there.
    """

    def __init__(self, tracking_uri: str):
        if not tracking_uri:
            raise UserError("tracking is off (the tracking URI is empty): give runs' folders, or --tracking-uri URI")
        self._shown = mlflow_client.mask_secrets(tracking_uri)
        self._uri = mlflow_client.clean_tracking_uri(tracking_uri)
        if self._uri.startswith("sqlite:////"):  # opening a database that is not there would make an empty one
            database = Path(self._uri.removeprefix("sqlite:///").partition("?")[0])
            if not database.exists():
                raise UserError(
                    f"there is no MLflow database at {database}: name the one that has the runs (--tracking-uri), or "
                    "give the runs' folders"
                )
        self._client: Any = None

    def read(self, run_id: str) -> Run:
        """A run with its evaluations.

        Raises:
            UserError: the store does not have it.
            RunError: the store cannot be reached.
        """
        try:
            if self._client is None:
                self._client = mlflow_client.connect(self._uri, timeout=30, retries=2)
            return self._read(self._get(run_id))
        except UserError:
            raise
        except Exception as error:
            raise RunError(f"MLflow at {self._shown} cannot be read: {mlflow_client.explain(error)}") from None

    def _get(self, run_id: str) -> "mlflow.entities.Run":
        try:
            run = self._client.get_run(run_id)
        except Exception as error:
            forbidden = mlflow_client.is_forbidden(error)
            if not forbidden and mlflow_client.error_code(error) != "RESOURCE_DOES_NOT_EXIST":
                raise
            hidden = ", or does not show it to this user" if forbidden else ""
            raise UserError(
                f"MLflow at {self._shown} has no run {run_id}{hidden}: "
                "copy the id from MLflow, name another store (--tracking-uri), or give the run's folder"
            ) from None
        if run.info.lifecycle_stage == "deleted":
            raise UserError(
                f"the run {run_id} was deleted from MLflow at {self._shown}: restore it there, or give its folder"
            )
        return run

    def _read(self, run: "mlflow.entities.Run") -> Run:
        tags = run.data.tags
        if tags.get("kind") == "evaluation":
            return self._of_evaluation(run)
        alone = self._training(run)
        evaluations, remarks = self._evaluations(run)
        return dataclasses.replace(alone, evaluations=evaluations, remarks=(*alone.remarks, *remarks))

    def _training(self, run: "mlflow.entities.Run") -> Run:
        """All but evaluations."""
        remarks = []
        if run.info.status != "FINISHED":
            remarks.append(f"has not come to its end: MLflow says {run.info.status}")
        if "attempts" in run.data.tags:
            remarks.append(
                "went back to a checkpoint: of steps that were taken twice the last counts, but MLflow keeps those "
                "that were passed over, too; its folder has the exact course"
            )
        tags = dict(run.data.tags)
        # Parameters cannot change in MLflow; what a resume has changed is in tags.
        resumed = {key.removeprefix(_RESUMED): text for key, text in tags.items() if key.startswith(_RESUMED)}
        config = {**run.data.params, **resumed}
        series = {name: self._history(run.info.run_id, name) for name in sorted(run.data.metrics)}
        seconds = last(series.get("perf/seconds", {}))
        if seconds is None and run.info.end_time and run.info.start_time:
            seconds = (run.info.end_time - run.info.start_time) / 1000
        return Run(
            name=run.info.run_name or run.info.run_id,
            identity=run.info.run_id,
            config=config,
            series=without_others_losses(series, config.get("experiment.stage")),
            tags=tags,
            completed=run.info.status == "FINISHED",
            steps=max((max(values) for values in series.values() if values), default=None),
            tokens=last(series.get("perf/tokens_seen", {})),
            seconds=seconds,
            remarks=tuple(remarks),
        )

    def _history(self, run_id: str, name: str) -> Series:
        points = self._client.get_metric_history(run_id, name)
        # SQL stores keep infinities as the largest number that they have.
        largest = 1.7976931348623157e308
        return {
            point.step: math.copysign(math.inf, point.value) if abs(point.value) >= largest else point.value
            for point in sorted(points, key=lambda point: (point.step, point.timestamp))
        }

    # --- evaluations ---

    def _evaluations(self, run: "mlflow.entities.Run") -> tuple[tuple[Finished, ...], list[str]]:
        wanted = f"tags.`{_PARENT}` = '{run.info.run_id}' and tags.kind = 'evaluation'"
        found, remarks = [], []
        children = self._client.search_runs([run.info.experiment_id], wanted, order_by=["attributes.start_time DESC"])
        for child in children:
            try:
                found.append(self._finished(child))
            except UserError as error:
                remarks.append(f"an evaluation is left out: {error}")
        found, others = _of_the_export(found)
        remarks += others
        if not found and run.data.tags.get("stage") != "critic":
            remarks.append("has no evaluation below it in MLflow: wmtp-ds evaluate makes one")
        return tuple(found), remarks

    def _of_evaluation(self, run: "mlflow.entities.Run") -> Run:
        parent = run.data.tags.get(_PARENT)
        found = (self._finished(run),)
        if parent is None:
            name = run.info.run_name or run.info.run_id
            orphan = ("an evaluation alone: it has no run above it",)
            return Run(name=name, identity=run.info.run_id, evaluations=found, remarks=orphan)
        alone = self._training(self._get(parent))
        remarks = alone.remarks
        if (model := Path(found[0].model)).name not in (BEST, FINAL):
            remarks += (f"the evaluation is of {model}; curves and metrics are the whole run's",)
        identity = f"{parent}#{run.info.run_id}"
        return dataclasses.replace(alone, identity=identity, evaluations=found, remarks=remarks)

    def _finished(self, run: "mlflow.entities.Run") -> Finished:
        from mlflow.artifacts import download_artifacts

        with tempfile.TemporaryDirectory(prefix="wmtp-compare-") as temporary:
            for name in (RESULTS, SUMMARY):
                try:
                    download_artifacts(
                        run_id=run.info.run_id, artifact_path=name, dst_path=temporary, tracking_uri=self._uri
                    )
                except Exception as error:
                    raise UserError(
                        f"the run {run.info.run_id} has no {name}: {mlflow_client.explain(error)}"
                    ) from None
            found = read_finished(Path(temporary))
        return dataclasses.replace(found, place=f"runs:/{run.info.run_id}")


def _of_the_export(found: list[Finished]) -> tuple[list[Finished], list[str]]:
    """The evaluations that stand for a run, and why others do not.

    They are those of its best export (of the final one where only that was evaluated), with the weights that the newest
    of them has seen: a run that goes on replaces its export.

    Args:
        found: of one run, the newest first.
    """
    names = [Path(one.model).name for one in found]
    export = BEST if BEST in names else FINAL
    newest = next((one.model_key for one in found if Path(one.model).name == export), None)
    kept, remarks = [], []
    for one, name in zip(found, names, strict=True):
        if name != export:
            stands = f"{export} stands for the run" if newest else f"neither {BEST} nor {FINAL}"
            remarks.append(f"the evaluation {one.place} is left out: it is of {one.model}, {stands}")
        elif one.model_key != newest:
            remarks.append(f"the evaluation {one.place} is left out: {one.model} has held another model since")
        else:
            kept.append(one)
    return kept, remarks
