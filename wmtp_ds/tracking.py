"""One MLflow run a stage, written by rank 0 alone, and never at the cost of the training.

A metric goes to ``run_dir/metrics.jsonl`` first, in a few microseconds. A daemon thread reads that file and
brings MLflow up to it (:mod:`wmtp_ds.tracking_sender`). If the server is down, slow or wrong, one warning is
given, the file keeps growing, and ``wmtp-ds track sync RUN_DIR`` completes the MLflow run afterwards.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp_ds import mlflow_client
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.tracking_sender import MAX_KEY, MAX_PARAM_VALUE, MAX_TAG_VALUE, Sender, metric_key
from wmtp_ds.tracking_state import (
    METRICS_FILE,
    STATE_FILE,
    Journal,
    RunLock,
    TrackingState,
)

if TYPE_CHECKING:
    from wmtp_ds.config.schema import MlflowConfig

logger = logging.getLogger("wmtp_ds.tracking")

# Seconds between two sendings: usually, and at most. In between, a sending is followed by a pause long enough
# that the thread, which shares Python's lock with the training, takes this share of the time and no more.
FLUSH_INTERVAL = 5.0
LONGEST_INTERVAL = 60.0
LARGEST_SHARE = 0.02
# The thread's name; it outlives the tracker if it is stuck in a request.
SENDING = "wmtp-tracking"
# Failures in a row that end the last attempt.
LAST_ATTEMPTS = 3


class Tracker:
    """The run that is being trained. Made by :func:`start_tracking`; used by one thread of rank 0.

    No method raises for anything that MLflow or the disk does, and only :meth:`finish` and
    :meth:`wait_for_run_id` wait, both for a bounded time.
    """

    def __init__(self, run_dir: Path, state: TrackingState, lock: RunLock) -> None:
        self.run_dir = run_dir
        self._state = state
        self._lock = lock
        self._journal = Journal(run_dir / METRICS_FILE)
        self._finished = self._complete = False
        self._warned_value = False
        state.save(run_dir)

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None until the server has made the run."""
        return self._state.run_id

    @property
    def experiment_id(self) -> str | None:
        """The MLflow experiment's id; None until it is known."""
        return self._state.experiment_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append ``metrics`` of an optimizer step; NaN and infinities are kept.

        Values are anything that ``float`` takes; a value that it does not take is left out, with a warning.
        """
        values: dict[str, float] = {}
        for name, value in metrics.items():
            try:
                values[name] = float(value)
            except (TypeError, ValueError, OverflowError):
                if not self._warned_value:
                    self._warned_value = True
                    logger.warning("the metric %s is no number (%s): left out", name, type(value).__name__)
        if not self._finished:
            self._journal.append(step, values)

    def go_back(self, step: int) -> None:
        """The run goes on after ``step``: resumed from a checkpoint, or rolled back to one. Read ``metrics.jsonl``.

        What is logged from now on counts, and later steps that the run has logged before do not: their lines stay,
        those that follow have a higher ``attempt``. MLflow gets a step again where its values differ, with a later
        time; the tag ``attempts`` says that it happened.
        """
        if self._finished:
            return
        attempt = self._journal.go_back(step)
        if attempt > 1:
            self.set_tags({"attempts": attempt})

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Send a file, or a folder under its own name, into the folder ``artifact_path`` of the run.

        ``log_artifact(Path("x/checkpoint_best"), "checkpoints")`` makes
        ``runs:/<run_id>/checkpoints/checkpoint_best``. It is read later, on the tracker's thread: it must
        stay where it is. What has changed meanwhile is sent as it is then.
        """
        absolute = Path(os.path.abspath(path))
        root = Path(os.path.abspath(self.run_dir))
        # Relative to the run directory if it lies there, so that the directory may be moved before a sync.
        stored = absolute.relative_to(root) if absolute.is_relative_to(root) else absolute
        self._state.add_artifact(str(stored), artifact_path or "")
        self._state.save(self.run_dir)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags of the run; a tag that is set again takes the new value."""
        self._state.add_tags(texts_of(tags, MAX_TAG_VALUE))
        self._state.save(self.run_dir)

    def wait_for_run_id(self, timeout: float = 10.0) -> str | None:
        """Return the run's id, waiting up to ``timeout`` seconds for the server to make the run."""
        return self.run_id

    def finish(self, status: str = "FINISHED", timeout: float = 30.0) -> bool:
        """End the run as ``FINISHED``, ``FAILED`` or ``KILLED``; True if MLflow has everything.

        Waits for the thread while it makes progress: until ``timeout`` seconds pass without any (a large
        file may take longer), and never longer than ten times that. After ``FAILED`` and ``KILLED`` the process
        has little time: ``timeout`` seconds in all. What is unsent then stays in the run directory, and the
        command that sends it is logged.
        """
        if self._finished:
            return self._complete
        self._finished = True
        with self._state.lock:
            self._state.status = status
            self._state.end_time = time.time_ns() // 1_000_000
            self._state.save(self.run_dir)
        self._complete = self._drain(timeout, hurried=status != "FINISHED")
        # A thread that is stuck in a request must not write there once the lock is given back.
        self._state.freeze()
        self._journal.close()
        self._lock.release()
        return self._complete

    def _drain(self, timeout: float, hurried: bool) -> bool:
        return True


class NullTracker(Tracker):
    """Tracking is off: metrics go to ``metrics.jsonl`` alone (and ``track sync --tracking-uri`` sends them)."""


class MlflowTracker(Tracker):
    """A tracker whose daemon thread keeps MLflow up to date."""

    def __init__(self, run_dir: Path, state: TrackingState, lock: RunLock, tracking_uri: str) -> None:
        super().__init__(run_dir, state, lock)
        self._stop = threading.Event()
        self._finishing = threading.Event()
        self._attempted = threading.Event()
        self._trouble = ""
        self._sender = Sender(run_dir, state, tracking_uri, stopped=self._stop.is_set)
        self._thread = threading.Thread(target=self._keep_sending, name=SENDING, daemon=True)
        self._thread.start()

    def wait_for_run_id(self, timeout: float = 10.0) -> str | None:
        """Return the run's id, waiting up to ``timeout`` seconds for the first attempt to make the run."""
        deadline = time.monotonic() + timeout
        while self.run_id is None and self._thread.is_alive() and time.monotonic() < deadline:
            if self._attempted.wait(0.05):
                break
        return self.run_id

    def _keep_sending(self) -> None:
        failures, progress = 0, 0
        while not self._stop.is_set():
            last = self._finishing.is_set()
            begin = time.thread_time()
            if self._send_once():
                if last:
                    return
                # The first sending also imports MLflow, which happens once.
                busy = time.thread_time() - begin if progress else 0.0
                failures, pause = 0, max(FLUSH_INTERVAL, busy / LARGEST_SHARE)
            else:
                failures = 1 if self._sender.progress > progress else failures + 1
                if last and failures >= LAST_ATTEMPTS:
                    return
                pause = FLUSH_INTERVAL * 2 ** min(failures - 1, 10)
            progress = self._sender.progress
            if self._finishing.is_set():
                self._stop.wait(0.5 if failures else 0.0)
            else:
                self._finishing.wait(min(pause, LONGEST_INTERVAL))

    def _send_once(self) -> bool:
        try:
            self._sender.send()
        except Exception as error:  # whatever MLflow does, training goes on
            explanation = str(error) if isinstance(error, UserError) else mlflow_client.explain(error)
            if not self._trouble:
                logger.warning(
                    "MLflow at %s: %s. Training goes on; metrics are kept in %s and sent later.",
                    self._state.tracking_uri,
                    explanation.rstrip("."),
                    self.run_dir / METRICS_FILE,
                )
            self._trouble = explanation
            return False
        finally:
            self._attempted.set()
        return True

    def _drain(self, timeout: float, hurried: bool) -> bool:
        self._finishing.set()
        start = last_move = time.monotonic()
        progress = self._sender.progress
        while self._thread.is_alive():
            now = time.monotonic()
            if self._sender.progress != progress:
                progress, last_move = self._sender.progress, now
            extra = 0.0 if hurried else self._sender.allowance
            if now - last_move > timeout + extra or now - start > (timeout if hurried else 10 * timeout + extra):
                break
            self._thread.join(0.05)
        self._stop.set()
        complete = self._sender.complete()
        if not complete:
            logger.warning(
                "MLflow at %s does not have all of this run (missing: %s%s). Nothing is lost; send it with: "
                "wmtp-ds track sync %s",
                self._state.tracking_uri,
                self._sender.unsent() or "its final status",
                f"; last trouble: {self._trouble}" if self._trouble else "",
                self.run_dir,
            )
        return complete


def start_tracking(
    config: MlflowConfig,
    *,
    run_name: str,
    run_dir: Path,
    tags: Mapping[str, object],
    params: Mapping[str, object],
    resume_run_id: str | None = None,
    resume: bool | None = None,
) -> Tracker:
    """Start, or go on with, the tracked run of ``run_dir``. Returns at once; MLflow is met on a thread.

    Parameters
    ----------
    config:
        The config's ``mlflow`` table. ``tracking_uri = ""`` gives a :class:`NullTracker`.
    run_dir:
        Made if it is not there. A run that is started anew in the directory of an earlier one moves that
        one's files to ``run_dir/previous/``, from where it can still be synced.
    tags, params:
        Git commit and dirtiness are added to the tags. Secrets in values are masked, long values cut.
    resume_run_id:
        Continue this MLflow run. Wins over the ``MLFLOW_RUN_ID`` that ``mlflow run`` sets, which is
        otherwise used instead of making a run (together with its ``MLFLOW_TRACKING_URI``).
    resume:
        Whether this continues what is in ``run_dir``; default: whether ``resume_run_id`` is given. True
        without an id continues a run that no server has made yet. :meth:`Tracker.go_back` says from which step.

    Raises
    ------
    UserError
        ``run_dir`` cannot be made or written.
    """
    resume = resume_run_id is not None if resume is None else resume
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = RunLock(run_dir)
        _acquire(lock)
        state = _continued_state(run_dir, resume_run_id) if resume else None
        if state is None:
            _set_aside(run_dir)
            state = TrackingState(experiment="", run_name=run_name, tracking_uri="", run_id=resume_run_id)
    except OSError as error:
        raise UserError(
            f"cannot write to the run directory {run_dir}: {error.strerror or error}.\n"
            "  Mend: set checkpoint.save_dir to a folder that can be written to."
        ) from None
    uri = _tracking_uri(config, state)
    state.status, state.end_time = "RUNNING", None
    state.experiment = config.experiment
    state.tracking_uri = mlflow_client.mask_secrets(uri)
    state.artifact_location = mlflow_client.mask_secrets(config.s3_artifacts or "")
    state.add_params(texts_of(params, MAX_PARAM_VALUE))
    standard = {**_standard_tags(), **git_state(Path.cwd())}
    if config.parent_run_id:
        standard["mlflow.parentRunId"] = config.parent_run_id
    state.add_tags(texts_of({**standard, **tags}, MAX_TAG_VALUE))
    if not uri:
        return NullTracker(run_dir, state, lock)
    return MlflowTracker(run_dir, state, lock, uri)


def _acquire(lock: RunLock) -> None:
    try:
        lock.acquire()
    except RunError as error:
        logger.warning("%s Training goes on beside it.", str(error).splitlines()[0])


def _continued_state(run_dir: Path, run_id: str | None) -> TrackingState | None:
    """The state that a resume goes on with; None if the directory holds another run, or none."""
    try:
        state = TrackingState.load(run_dir)
    except FileNotFoundError:
        return None
    except UserError as error:
        logger.warning("%s", error)
        return None
    if run_id is not None and state.run_id is None:
        state.run_id, state.creating = run_id, False
    return state if run_id in (None, state.run_id) else None


def _set_aside(run_dir: Path) -> None:
    present = [run_dir / name for name in (METRICS_FILE, STATE_FILE) if (run_dir / name).exists()]
    if not present:
        return
    folder = run_dir / "previous"
    folder.mkdir(exist_ok=True)
    number = 1 + sum(1 for _ in folder.iterdir())
    while (folder / f"{number:03d}").exists():
        number += 1
    (folder / f"{number:03d}").mkdir()
    for path in present:
        path.rename(folder / f"{number:03d}" / path.name)


def _tracking_uri(config: MlflowConfig, state: TrackingState) -> str:
    """Where to: the config's URI, or that of the `mlflow run` which started us and whose run we then use."""
    uri = config.tracking_uri
    inherited = os.environ.get("MLFLOW_RUN_ID")
    if uri and inherited and state.run_id is None:
        state.run_id, state.inherited, state.creating = inherited, True, False
    if uri and inherited and state.run_id == inherited:
        uri = mlflow_client.inherited_tracking_uri(uri)
    return mlflow_client.clean_tracking_uri(uri) if uri else ""


def _standard_tags() -> dict[str, str]:
    tags = {"mlflow.source.name": Path(sys.argv[0]).name or "wmtp-ds", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container without a passwd entry
        tags["mlflow.user"] = getpass.getuser()
    return tags


def texts_of(values: Mapping[str, object], longest: int) -> dict[str, str]:
    """As MLflow takes them: valid keys; values as text, without secrets, and not too long."""
    texts = {}
    for key, value in values.items():
        text = "" if value is None else value if isinstance(value, str) else _json(value)
        is_secret = bool(text) and mlflow_client.is_secret_key(key)
        text = mlflow_client.MASK if is_secret else mlflow_client.mask_secrets(text)
        texts[metric_key(key)[:MAX_KEY]] = text[:longest]
    return texts


def _json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def git_state(cwd: Path) -> dict[str, str]:
    """Tags that name the code: ``git.commit``, ``git.dirty`` ("true" if tracked files differ), ``git.branch``.

    Also ``mlflow.source.git.commit``, which MLflow's pages show. Empty if ``cwd`` is in no git repository
    that has a commit, or git is not there.
    """

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, timeout=5, check=True)
        return result.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changes = git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        branch = git("rev-parse", "--abbrev-ref", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {
        "git.commit": commit,
        "git.branch": branch,
        "git.dirty": "true" if changes else "false",
        "mlflow.source.git.commit": commit,
    }
