"""Completes a tracked run after the fact: what ``wmtp-ds track sync`` does."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from wmtp_ds import mlflow_client
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.tracking_sender import Sender
from wmtp_ds.tracking_state import METRICS_FILE, STATE_FILE, RunLock, TrackingState


@dataclass(frozen=True)
class SyncReport:
    """What ``track sync`` did."""

    run_dir: str
    run_id: str
    experiment_id: str
    status: str
    metric_points: int  # sent now
    artifact_files: int  # sent now
    metric_lines: int  # of metrics.jsonl, sent in all
    missing_artifacts: list[str]
    rejected: list[str]


def sync_run(run_dir: Path, *, tracking_uri: str | None = None, new_run: bool = False, attempts: int = 3) -> SyncReport:
    """Send to MLflow what a run directory holds and MLflow lacks; doing it twice sends nothing twice.

    Parameters
    ----------
    tracking_uri:
        Where to; default: where the run was tracked.
    new_run:
        Send everything as a new run, if the old one is lost.
    attempts:
        How often to try, each going on where the last was cut off.

    Raises
    ------
    UserError
        ``run_dir`` is no run directory, or the tracking URI is not known.
    RunError
        The run is still being trained, or MLflow could not take everything.
    """
    state = _load_state(run_dir)
    uri = mlflow_client.clean_tracking_uri(_sync_uri(run_dir, state, tracking_uri))
    lock = RunLock(run_dir)
    lock.acquire()
    try:
        state = _load_state(run_dir)  # now that nobody else writes it
        if new_run:
            state.start_over()
        _keep_inside(run_dir, state)
        state.tracking_uri = mlflow_client.mask_secrets(uri)
        if state.status == "RUNNING":  # the process died without saying so
            state.status = "KILLED"
            state.end_time = int((run_dir / STATE_FILE).stat().st_mtime * 1000)
        state.save(run_dir)
        sender = Sender(run_dir, state, uri, timeout=60, retries=2)
        _send_with_attempts(sender, attempts)
    finally:
        lock.release()
    return SyncReport(
        run_dir=str(run_dir),
        run_id=state.run_id or "",
        experiment_id=state.experiment_id or "",
        status=state.status,
        metric_points=sender.sent_points,
        artifact_files=sender.sent_files,
        metric_lines=state.sent_lines,
        missing_artifacts=sender.missing,
        rejected=state.rejected,
    )


def _load_state(run_dir: Path) -> TrackingState:
    try:
        return TrackingState.load(run_dir)
    except FileNotFoundError:
        found = sorted(str(path.parent) for path in run_dir.glob(f"*/{STATE_FILE}"))
        hint = f" Did you mean {' or '.join(found[:5])}?" if found else ""
        raise UserError(
            f"{run_dir} is not the directory of a run: it holds no {STATE_FILE}.{hint}\n  Mend: give the "
            f"directory that training wrote {METRICS_FILE} into."
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {run_dir / STATE_FILE}: {error.strerror}.") from None


def _keep_inside(run_dir: Path, state: TrackingState) -> None:
    """Leave out artifacts that lie elsewhere: a folder from somebody else could ask for any file of this machine."""
    root = os.path.realpath(run_dir)
    for artifact in state.artifacts:
        if not artifact.sent and not Path(os.path.realpath(run_dir / artifact.path)).is_relative_to(root):
            artifact.sent = True
            state.rejected.append(f"{artifact.path}: it lies outside {run_dir}")


def _sync_uri(run_dir: Path, state: TrackingState, given: str | None) -> str:
    if given:
        return given
    stored = state.tracking_uri
    if stored and mlflow_client.MASK not in stored:
        return stored
    if inherited := os.environ.get("MLFLOW_TRACKING_URI"):
        return inherited
    why = (
        f"its tracking URI had credentials, which are not stored ({stored})"
        if stored
        else "the run was trained with tracking off"
    )
    raise UserError(
        f"cannot tell where to send {run_dir}: {why}.\n  Mend: wmtp-ds track sync --tracking-uri URI "
        f"{run_dir} (or set MLFLOW_TRACKING_URI)."
    )


def _send_with_attempts(sender: Sender, attempts: int) -> None:
    for attempt in range(1, attempts + 1):
        before = sender.progress
        try:
            sender.send()
            if sender.complete():
                return
            raise RuntimeError("files changed while they were sent")
        except UserError:
            raise
        except Exception as error:
            if attempt == attempts and sender.progress == before:
                raise RunError(
                    f"MLflow at {mlflow_client.mask_secrets(sender.state.tracking_uri)} did not take everything: "
                    f"{mlflow_client.explain(error)}\n  Nothing is lost; mend that and run the command again."
                ) from None
        time.sleep(min(2.0**attempt, 10.0) / 4)
    raise RunError(f"MLflow takes the run in pieces only; run `wmtp-ds track sync {sender.run_dir}` again to go on.")
