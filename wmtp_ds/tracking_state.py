"""What a run directory remembers: ``metrics.jsonl``, and in ``tracking.json`` how much of it MLflow has.

``metrics.jsonl`` is the queue: the training process appends, the sender reads from a byte position that it
moves only after MLflow has taken the points. Nothing waits in memory, so a server may be away for days and
a killed process loses nothing.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

from pydantic import TypeAdapter

from wmtp_ds.errors import RunError, UserError
from wmtp_ds.files import open_file, read_json, try_lock

METRICS_FILE = "metrics.jsonl"
STATE_FILE = "tracking.json"
LOCK_FILE = ".tracking.lock"

logger = logging.getLogger("wmtp_ds.tracking")

_Record = TypeVar("_Record")


class MetricLine(NamedTuple):
    """One line of ``metrics.jsonl``.

    A run that goes back, to a checkpoint before steps that it has taken, begins another ``attempt``: with a line
    that has the checkpoint's step and no metrics. ``replayed`` names the metrics whose value an earlier attempt
    has written for this step already.
    """

    step: int
    time_ms: int
    metrics: dict[str, float]
    replayed: frozenset[str] = frozenset()
    attempt: int = 1


def encode_line(line: MetricLine) -> bytes:
    """One line of strict JSON, with its newline; NaN and infinities become strings that ``float`` reads."""
    values = {name: value if math.isfinite(value) else str(value) for name, value in line.metrics.items()}
    record: dict[str, Any] = {"step": line.step, "time": line.time_ms, "metrics": values}
    if line.attempt > 1:
        record["attempt"] = line.attempt
    if line.replayed:
        record["replayed"] = sorted(line.replayed)
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def decode_line(line: bytes) -> MetricLine | None:
    """The inverse of :func:`encode_line`; None for a line that is damaged."""
    try:
        record = json.loads(line)
        metrics = {str(name): float(value) for name, value in record["metrics"].items()}
        replayed = frozenset(map(str, record.get("replayed", ())))
        return MetricLine(int(record["step"]), int(record["time"]), metrics, replayed, int(record.get("attempt", 1)))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Read ``metrics.jsonl`` into {step: {name: value}}, in order of step: the steps that made the run what it is.

    Where the run went back, what it had logged after that step is left out, and what it logged then counts. Of
    several values for a step the last one counts. Damaged lines are left out.
    """
    steps: dict[int, dict[str, float]] = {}
    attempt = 1
    for line in _read_lines(path):
        if line.attempt > attempt:
            attempt = line.attempt
            steps = {step: metrics for step, metrics in steps.items() if step <= line.step}
        if line.metrics:
            steps.setdefault(line.step, {}).update(line.metrics)
    return dict(sorted(steps.items()))


def _read_lines(path: Path) -> Iterator[MetricLine]:
    with open_file(path) as file:
        for raw in file:
            line = decode_line(raw)
            if line is not None:
                yield line


class Journal:
    """Appends to ``metrics.jsonl``, one write a line, so that a kill at any moment costs no earlier line.

    A full disk does not stop training: lines that could not be written wait (up to 100,000 of them) and are
    written with the next one that can be.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque(maxlen=100_000)
        self._warned = False
        self._attempt = 1
        self._earliest = 0  # in milliseconds: no line may seem older than those of an earlier attempt
        self._earlier: dict[int, dict[str, float]] = {}
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            self._waiting.append(b"\n")  # a kill cut the last line short: end it

    def go_back(self, step: int) -> int:
        """The run goes on after ``step``; what the file has of later steps is from now on an earlier attempt's.

        Returns the number of the attempt that begins now: 1 more than before if the file has later steps.
        """
        lines = self._written()
        last = step  # the last step of the attempt that has ended
        for line in lines:
            if line.attempt > self._attempt:
                self._attempt, last = line.attempt, step
            last = max(last, line.step)
        # The last value of each, whatever the attempt: that is the one that MLflow gets last.
        self._earlier = {}
        for line in lines:
            if line.step >= step:
                self._earlier.setdefault(line.step, {}).update(line.metrics)
        self._earliest = max((line.time_ms + 1 for line in lines), default=0)
        if last > step:
            self._attempt += 1
            self.append(step, {})
        return self._attempt

    def _written(self) -> list[MetricLine]:
        try:
            lines = list(_read_lines(self._path))
        except OSError:
            lines = []
        return lines + [line for line in map(decode_line, self._waiting) if line is not None]

    def append(self, step: int, metrics: Mapping[str, float], time_ms: int | None = None) -> None:
        """Write one line, now. Never raises for a full or broken disk: warns once."""
        time_ms = max(time.time_ns() // 1_000_000, self._earliest) if time_ms is None else time_ms
        replayed = self._replayed(step, metrics)
        self._waiting.append(encode_line(MetricLine(step, time_ms, dict(metrics), replayed, self._attempt)))
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning("cannot write %s (%s): training goes on, metrics wait", self._path, error)

    def _write(self, data: bytes) -> None:
        written = os.write(self._descriptor, data)
        if written != len(data):  # the disk filled up within the line: take the piece back
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(errno.ENOSPC, "no space left for a whole line")

    def _replayed(self, step: int, metrics: Mapping[str, float]) -> frozenset[str]:
        """Metrics of this step that an earlier attempt has written already, with the same value.

        A run that was killed at step 14 and resumes from a checkpoint of step 10 computes 11 to 14 again.
        Their points are in the file, so they need not be sent a second time.
        """
        earlier = self._earlier.get(step)
        if not earlier:
            return frozenset()
        same = frozenset(name for name, value in metrics.items() if _same(earlier.get(name), value))
        earlier.update(metrics)
        return same

    def close(self) -> None:
        """Close the file; later appends are an error."""
        os.close(self._descriptor)


def _same(a: float | None, b: float) -> bool:
    return a is not None and (a == b or (math.isnan(a) and math.isnan(b)))


class Chunk(NamedTuple):
    """Some whole lines of the journal, and the byte position after them."""

    lines: list[MetricLine]
    end: int
    n_lines: int
    n_damaged: int


def read_chunk(path: Path, start: int, max_points: int) -> Chunk:
    """Read whole lines from byte ``start`` until about ``max_points`` metric values are gathered.

    A last line without its newline is still being written and is left for the next time. A file that is
    shorter than ``start`` was replaced: it is read from its beginning (MLflow drops points that it has).
    """
    lines: list[MetricLine] = []
    points = damaged = count = 0
    try:
        file = open_file(path)
    except FileNotFoundError:
        return Chunk([], start, 0, 0)
    with file:
        end = start if start <= os.fstat(file.fileno()).st_size else 0
        file.seek(end)
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            end += len(raw)
            count += 1
            line = decode_line(raw)
            if line is None:
                damaged += bool(raw.strip())
                continue
            lines.append(line)
            points += len(line.metrics)
            if points >= max_points:
                break
    return Chunk(lines, end, count, damaged)


def unread_bytes(path: Path, start: int) -> int:
    """How many bytes lie behind position ``start`` (all of a file that was replaced by a shorter one)."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return 0
    return size - start if size >= start else size


@dataclass
class TrackedArtifact:
    """A file or folder that MLflow is to get; ``done`` maps its files to the [size, mtime_ns] sent."""

    path: str  # absolute, or relative to the run directory
    artifact_path: str
    sent: bool = False
    done: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class TrackingState:
    """``tracking.json``: which run this is, what belongs to it, and what MLflow does not have yet.

    Holds no secret. ``lock`` guards every field: the training thread adds, the sender ticks off.
    """

    experiment: str
    run_name: str
    tracking_uri: str  # secrets masked
    artifact_location: str = ""
    local_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    experiment_id: str | None = None
    run_id: str | None = None
    inherited: bool = False  # `mlflow run` made the run, and it does not have our name yet
    creating: bool = False  # a run was asked for, and the answer may have been lost
    start_time: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    end_time: int | None = None
    status: str = "RUNNING"
    status_sent: str = ""
    sent_bytes: int = 0
    sent_lines: int = 0
    sent_step: int | None = None
    damaged_lines: int = 0
    rejected: list[str] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    unsent_params: list[str] = field(default_factory=list)
    unsent_tags: list[str] = field(default_factory=list)
    artifacts: list[TrackedArtifact] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self._save_failed = False
        self._frozen = False

    def add_params(self, params: Mapping[str, str]) -> None:
        """Take parameters in, to be sent."""
        with self.lock:
            self.params.update(params)
            self.unsent_params = list(dict.fromkeys([*self.unsent_params, *params]))

    def add_tags(self, tags: Mapping[str, str]) -> None:
        """Take tags in; those that are new or have another value are to be sent."""
        with self.lock:
            changed = [key for key, value in tags.items() if self.tags.get(key) != value]
            self.tags.update(tags)
            self.unsent_tags = list(dict.fromkeys([*self.unsent_tags, *changed]))

    def add_artifact(self, path: str, artifact_path: str) -> None:
        """Take an artifact in; the same one again is sent again where its files have changed."""
        with self.lock:
            same = [a for a in self.artifacts if (a.path, a.artifact_path) == (path, artifact_path)]
            done = dict(same[0].done) if same else {}
            self.artifacts = [a for a in self.artifacts if a not in same]
            self.artifacts.append(TrackedArtifact(path, artifact_path, done=done))

    def start_over(self) -> None:
        """Forget what was sent: everything goes to a run that is yet to be made."""
        with self.lock:
            self.local_id = uuid.uuid4().hex
            self.run_id = self.experiment_id = self.sent_step = None
            self.sent_bytes = self.sent_lines = self.damaged_lines = 0
            self.status_sent = ""
            self.creating = self.inherited = False
            self.unsent_params, self.unsent_tags = list(self.params), list(self.tags)
            self.rejected = []
            for artifact in self.artifacts:
                artifact.sent, artifact.done = False, {}

    def freeze(self) -> None:
        """Never write ``tracking.json`` again: from now on it belongs to somebody else."""
        with self.lock:
            self._frozen = True

    def save(self, run_dir: Path) -> None:
        """Write ``tracking.json`` atomically. A full disk is warned about once and does not raise."""
        with self.lock:
            if self._frozen:
                return
            target = run_dir / STATE_FILE
            temporary = run_dir / f".{STATE_FILE}.tmp"
            try:
                temporary.write_text(json.dumps({"version": 1, **dataclasses.asdict(self)}, indent=1) + "\n")
                temporary.replace(target)
            except OSError as error:
                if not self._save_failed:
                    self._save_failed = True
                    logger.warning("cannot write %s (%s): training goes on", target, error)

    @classmethod
    def load(cls, run_dir: Path) -> TrackingState:
        """Read ``tracking.json``. Raises FileNotFoundError, or UserError if it is damaged."""
        path = run_dir / STATE_FILE
        try:
            record = read_json(path)
            if record.pop("version") != 1:
                raise ValueError("an unknown version")
            artifacts = [_checked(TrackedArtifact, artifact) for artifact in record.pop("artifacts")]
            return dataclasses.replace(_checked(cls, record), artifacts=artifacts)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path} is damaged ({why}).\n  Mend: move it away and resume the run, which writes it "
                f"anew; {run_dir / METRICS_FILE} holds every metric."
            ) from None


def _checked(kind: type[_Record], record: dict[str, Any]) -> _Record:
    """An instance of a dataclass, of values that are what it says they are.

    Raises:
        ValueError, KeyError, TypeError: they are not, or some are missing or unknown.
    """
    hints = get_type_hints(kind)
    return kind(
        **{name: TypeAdapter(hints[name]).validate_python(value, strict=True) for name, value in record.items()}
    )


class RunLock:
    """One process at a time sends from a run directory. The lock ends with the process, however it ends."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK_FILE
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, or raise RunError if another process has it."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        if not try_lock(descriptor):
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise RunError(
                f"{self._path.parent} is in use: the run is still going on (process {owner}), and sends its "
                "metrics itself.\n  Mend: wait until it has ended."
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back; harmless if it was not taken."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def files_below(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield (relative name, file) of a file or of every file in a folder, sorted.

    Symbolic links that lead out of the folder are left out: an artifact holds what lies in its folder.
    """
    if path.is_file():
        yield path.name, path
        return
    root = path.resolve()
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = Path(folder) / name
            if file.is_file() and file.resolve().is_relative_to(root):
                yield file.relative_to(path).as_posix(), file
