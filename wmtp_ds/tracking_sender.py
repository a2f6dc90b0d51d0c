"""Brings an MLflow run up to what a run directory holds: while training, and from ``track sync`` later.

It goes in small steps and moves the cursor in ``tracking.json`` after each, so it can be cut off anywhere and
started again. A step whose answer was lost is repeated with the same time stamps; MLflow's SQL stores drop
points that they already have.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from wmtp_ds import mlflow_client
from wmtp_ds.errors import RunError
from wmtp_ds.tracking_state import (
    METRICS_FILE,
    Chunk,
    MetricLine,
    TrackedArtifact,
    TrackingState,
    files_below,
    read_chunk,
    unread_bytes,
)

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param, Run, RunTag
    from mlflow.tracking import MlflowClient

logger = logging.getLogger("wmtp_ds.tracking")

# MLflow's limits for one request, one parameter, one tag, one name.
MAX_METRICS = 1000
MAX_PARAMS_TAGS = 100
MAX_PARAM_VALUE = 6000
MAX_TAG_VALUE = 8000
MAX_KEY = 250

LOCAL_ID_TAG = "wmtp.local_id"
_RUN_ID = re.compile(r"[A-Za-z0-9][\w-]{0,255}")
# An upload slower than this (bytes a second) is taken for stuck.
_SLOWEST_UPLOAD = 2_000_000
_ITEM_ERRORS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")

T = TypeVar("T")


class TrackingBlockedError(RunError):
    """MLflow answers, but what it says needs a person: the run was deleted, or lives elsewhere."""


def metric_key(name: str) -> str:
    """The name MLflow accepts: other characters become underscores, at most 250 of them."""
    key = re.sub(r"[^/\w.\- :]", "_", name, flags=re.ASCII)
    key = "/".join(part for part in key.split("/") if part not in ("", ".", ".."))
    return key[:MAX_KEY] or "_"


class Sender:
    """Brings the MLflow run up to what a run directory holds.

    Parameters
    ----------
    tracking_uri:
        The real URI (the one in ``state`` has its secrets masked), from
        :func:`wmtp_ds.mlflow_client.clean_tracking_uri`.
    timeout, retries:
        For each HTTP request.
    stopped:
        Asked between steps; True makes :meth:`send` return early.
    """

    def __init__(
        self,
        run_dir: Path,
        state: TrackingState,
        tracking_uri: str,
        *,
        timeout: int = 10,
        retries: int = 0,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.run_dir = run_dir
        self.state = state
        self.progress = 0  # steps that MLflow has taken
        self.sent_points = 0
        self.sent_files = 0
        self.missing: list[str] = []
        self.allowance = 0.0  # further seconds that the step under way may take: a large upload
        self._uri = tracking_uri
        self._timeout = timeout
        self._retries = retries
        self._stopped = stopped
        self._client: MlflowClient | None = None
        self._attached = False

    def send(self) -> None:
        """Send all that is missing. Raises what MLflow raises, or :class:`TrackingBlockedError`."""
        if self._client is None:
            self._client = mlflow_client.connect(self._uri, timeout=self._timeout, retries=self._retries)
        if not self._attached:
            self._attach(self._client)
            self._attached = True
        self._send_tags_and_params()
        self._send_metrics()
        trouble = self._send_artifacts(self._client)
        if not set(self._unsent()) - {"artifacts"}:
            self._send_status(self._client)
        if trouble is not None:
            raise trouble

    def unsent(self) -> str:
        """Say what of the directory MLflow lacks, besides the run's final status; empty if nothing."""
        return ", ".join(f"{count} {what}" for what, count in self._unsent().items())

    def _unsent(self) -> dict[str, int]:
        state = self.state
        with state.lock:
            counts = {
                "tags": len(state.unsent_tags),
                "params": len(state.unsent_params),
                "artifacts": sum(not artifact.sent for artifact in state.artifacts),
                "bytes of metrics": unread_bytes(self.run_dir / METRICS_FILE, state.sent_bytes),
            }
        return {what: count for what, count in counts.items() if count}

    def complete(self) -> bool:
        """Whether MLflow has everything that the directory holds."""
        sent_status = self.state.status_sent == self.state.status
        return self.state.run_id is not None and sent_status and not self.unsent()

    # The run

    def _attach(self, client: MlflowClient) -> None:
        state = self.state
        if state.run_id is None:
            experiment_id = self._ensure_experiment(client)
            run = self._find_lost_run(client, experiment_id) if state.creating else None
            if run is None:
                run = self._create_run(client, experiment_id)
            if not _RUN_ID.fullmatch(str(run.info.run_id)):
                raise RuntimeError("the answer holds no run id: is it an MLflow server?")
            self._update(run_id=run.info.run_id, experiment_id=experiment_id, creating=False)
        else:
            run = self._get_run(client, state.run_id)
            self._update(experiment_id=run.info.experiment_id)
        self._drop_known_params(run)
        self._mask_known_tags(client, run)
        if state.inherited:  # `mlflow run` gave it a random name
            client.update_run(run.info.run_id, name=state.run_name)
            self._update(inherited=False)
        self._update(status_sent=run.info.status)
        if state.status == "RUNNING" and run.info.status != "RUNNING":  # a resume
            client.update_run(run.info.run_id, status="RUNNING")
            self._update(status_sent="RUNNING")

    def _ensure_experiment(self, client: MlflowClient) -> str:
        name, location = self.state.experiment, self.state.artifact_location
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                made = client.create_experiment(name, artifact_location=location or None)
                if not made:
                    raise RuntimeError("the answer holds no experiment: is it an MLflow server?")
                return str(made)
            except Exception as error:
                if mlflow_client.error_code(error) != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = client.get_experiment_by_name(name)  # another process was faster
        if experiment is None or not experiment.experiment_id:
            raise RuntimeError("the answer holds no experiment: is it an MLflow server?")
        if experiment.lifecycle_stage == "deleted":
            raise TrackingBlockedError(
                f"the MLflow experiment '{name}' was deleted.\n  Mend: restore it (mlflow experiments restore "
                f"--experiment-id {experiment.experiment_id}), or set mlflow.experiment to another name."
            )
        if location and experiment.artifact_location.rstrip("/") != location.rstrip("/"):
            logger.warning(
                "mlflow.s3_artifacts = '%s' has no effect: the experiment '%s' was created with '%s'",
                *(mlflow_client.mask_secrets(text) for text in (location, name, experiment.artifact_location)),
            )
        return str(experiment.experiment_id)

    def _find_lost_run(self, client: MlflowClient, experiment_id: str) -> Run | None:
        """The run that an earlier request made although its answer never came."""
        wanted = f"tags.`{LOCAL_ID_TAG}` = '{self.state.local_id}'"
        runs = client.search_runs([experiment_id], filter_string=wanted, max_results=1)
        return runs[0] if runs else None

    def _create_run(self, client: MlflowClient, experiment_id: str) -> Run:
        state = self.state
        tags = {LOCAL_ID_TAG: state.local_id}
        self._update(creating=True)
        return client.create_run(experiment_id, start_time=state.start_time, tags=tags, run_name=state.run_name)

    def _get_run(self, client: MlflowClient, run_id: str) -> Run:
        """The run, if it is there and can be written to."""
        mend = (
            f"\n  Mend: restore it there, or `wmtp-ds track sync --new-run {self.run_dir}` sends "
            "all of it as a new run."
        )
        where = mlflow_client.mask_secrets(self._uri)
        try:
            run = client.get_run(run_id)
        except Exception as error:
            if mlflow_client.is_forbidden(error):
                raise TrackingBlockedError(
                    f"{where} has no run {run_id}, or does not show it to this user.\n  Mend: check "
                    f"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; if the run is gone, `wmtp-ds track sync "
                    f"--new-run {self.run_dir}` sends all of it as a new run."
                ) from None
            if mlflow_client.error_code(error) != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise TrackingBlockedError(f"{where} has no run {run_id}.{mend}") from None
        if run.info.run_id != run_id:
            raise RuntimeError("the answer holds no run: is it an MLflow server?")
        if run.info.lifecycle_stage == "deleted":
            raise TrackingBlockedError(f"the run {run_id} was deleted at {where}.{mend}")
        return run

    def _drop_known_params(self, run: Run) -> None:
        """Parameters cannot change in MLflow: those that did, in a resume, become tags."""
        state = self.state
        known = run.data.params
        with state.lock:
            old = [key for key in state.unsent_params if key in known]
            changed = {key: state.params[key] for key in old if known[key] != state.params[key]}
            state.unsent_params = [key for key in state.unsent_params if key not in known]
            state.params.update({key: known[key] for key in old})
            state.add_tags({f"resumed.{key}"[:MAX_KEY]: value for key, value in changed.items()})
            state.save(self.run_dir)
        if changed:
            logger.warning(
                "MLflow keeps the first values of parameters; changed in this resume, and logged as tags resumed.*: %s",
                ", ".join(sorted(changed)),
            )

    def _mask_known_tags(self, client: MlflowClient, run: Run) -> None:
        """`mlflow run` tags its run with the git remote, which may hold a token."""
        for key, value in run.data.tags.items():
            if (masked := mlflow_client.mask_secrets(value)) != value:
                client.set_tag(run.info.run_id, key, masked)

    # What the run gets

    def _send_tags_and_params(self) -> None:
        from mlflow.entities import Param, RunTag

        state = self.state
        with state.lock:
            tags = {key: state.tags[key] for key in state.unsent_tags}
            params = {key: state.params[key] for key in state.unsent_params}
        for keys in _batches(list(tags), MAX_PARAMS_TAGS):
            self._log_batch(tags=[RunTag(key, tags[key]) for key in keys])
            with state.lock:  # a tag that was set anew meanwhile stays to be sent
                sent = {key for key in keys if state.tags[key] == tags[key]}
                self._update(unsent_tags=[key for key in state.unsent_tags if key not in sent])
            self.progress += 1
        for keys in _batches(list(params), MAX_PARAMS_TAGS):
            self._log_batch(params=[Param(key, params[key]) for key in keys])
            with state.lock:
                self._update(unsent_params=[key for key in state.unsent_params if key not in keys])
            self.progress += 1

    def _send_metrics(self) -> None:
        state = self.state
        while not self._stopped():
            chunk = read_chunk(self.run_dir / METRICS_FILE, state.sent_bytes, MAX_METRICS)
            if not chunk.n_lines:
                return
            points = [point for line in chunk.lines for point in _points(line)]
            for batch in _batches(points, MAX_METRICS):
                self._log_batch(metrics=batch)
            self.sent_points += len(points)
            self._advance(chunk)

    def _advance(self, chunk: Chunk) -> None:
        state = self.state
        if chunk.n_damaged and not state.damaged_lines:
            logger.warning("%s holds damaged lines, which are skipped", self.run_dir / METRICS_FILE)
        restarted = chunk.end < state.sent_bytes
        self._update(
            sent_bytes=chunk.end,
            sent_lines=chunk.n_lines if restarted else state.sent_lines + chunk.n_lines,
            sent_step=chunk.lines[-1].step if chunk.lines else state.sent_step,
            damaged_lines=state.damaged_lines + chunk.n_damaged,
        )
        self.progress += 1

    def _log_batch(
        self,
        metrics: Sequence[Metric] = (),
        params: Sequence[Param] = (),
        tags: Sequence[RunTag] = (),
    ) -> None:
        """Log a batch; of a batch that MLflow refuses, all but the items at fault."""
        client, run_id = self._client, self.state.run_id
        if client is None or run_id is None or not (metrics or params or tags):
            return
        try:
            client.log_batch(run_id, metrics=metrics, params=params, tags=tags, synchronous=True)
            return
        except Exception as error:
            if mlflow_client.error_code(error) not in _ITEM_ERRORS:
                raise
            # A deleted run is refused with the same code: then nothing is wrong with the items.
            self._get_run(client, run_id)
            items = [*metrics, *params, *tags]
            if len(items) == 1:
                self._reject(items[0], error)
                return
        for kind, values in (("metrics", metrics), ("params", params), ("tags", tags)):
            middle = (len(values) + 1) // 2
            for half in (values[:middle], values[middle:]):
                if half:
                    self._log_batch(**{kind: half})  # type: ignore[arg-type]

    def _reject(self, item: Any, error: Exception) -> None:
        what = mlflow_client.mask_secrets(f"{type(item).__name__.lower()} {item.key}")
        if what not in self.state.rejected:
            logger.warning("MLflow refuses %s: %s", what, mlflow_client.explain(error))
            self._update(rejected=[*self.state.rejected, what][:100])

    def _send_status(self, client: MlflowClient) -> None:
        state = self.state
        with state.lock:
            status, end_time, run_id = state.status, state.end_time, state.run_id
        if status == state.status_sent or run_id is None or self._stopped():
            return
        client.set_terminated(run_id, status=status, end_time=end_time)
        self._update(status_sent=status)
        self.progress += 1

    # Artifacts

    def _send_artifacts(self, client: MlflowClient) -> Exception | None:
        """Send what is pending, up to the first failure, which is returned; the rest of the run goes on."""
        state = self.state
        with state.lock:
            pending = [artifact for artifact in state.artifacts if not artifact.sent]
        for artifact in pending:
            try:
                sent = self._send_artifact(client, artifact)
            except Exception as error:
                with state.lock:  # the others come first the next time
                    state.artifacts.sort(key=lambda other: other is artifact)
                return error
            if sent:
                with state.lock:
                    artifact.sent = True
                    state.save(self.run_dir)
        return None

    def _send_artifact(self, client: MlflowClient, artifact: TrackedArtifact) -> bool:
        """Send the files that MLflow lacks, metrics in between; False if stopped before all were sent."""
        path = Path(artifact.path)
        source = path if path.is_absolute() else self.run_dir / path
        run_id = self.state.run_id
        if not source.exists():
            logger.warning("the artifact %s is gone and was not sent", source)
            self.missing.append(str(source))
            return True
        for name, file in files_below(source):
            if self._stopped() or run_id is None:
                return False
            before = _signature(file)
            if artifact.done.get(name) == before:
                continue
            folder = Path(name).parent if source.is_file() else Path(source.name) / Path(name).parent
            target = (Path(artifact.artifact_path) / folder).as_posix()
            seconds = 60 + before[0] // _SLOWEST_UPLOAD
            self.allowance = seconds
            try:
                with mlflow_client.patience(seconds):
                    client.log_artifact(run_id, str(file), None if target == "." else target)
            finally:
                self.allowance = 0.0
            if _signature(file) == before:  # else it was written to meanwhile: sent again next time
                with self.state.lock:
                    artifact.done[name] = before
                    self.state.save(self.run_dir)
            self.sent_files += 1
            self.progress += 1
            self._send_metrics()
        return all(artifact.done.get(name) == _signature(file) for name, file in files_below(source))

    def _update(self, **fields: Any) -> None:
        with self.state.lock:
            for name, value in fields.items():
                setattr(self.state, name, value)
            self.state.save(self.run_dir)


def _points(line: MetricLine) -> Iterable[Metric]:
    from mlflow.entities import Metric

    for name, value in line.metrics.items():
        if name not in line.replayed:
            yield Metric(metric_key(name), value, line.time_ms, line.step)


def _batches(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _signature(file: Path) -> list[int]:
    try:
        stat = file.stat()
    except FileNotFoundError:
        return [-1, -1]
    return [stat.st_size, stat.st_mtime_ns]
