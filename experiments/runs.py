"""Training runs of an experiment, side by side; what is done already is not done again.

Each is a process of its own on one rank, without the launcher, forked from one that has imported everything.
"""

import hashlib
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sizes import Size

from wmtp_ds.config import load_config
from wmtp_ds.files import sha256_of
from wmtp_ds.launch import Request
from wmtp_ds.meeting import free_port
from wmtp_ds.models.fingerprint import read_trunk_fingerprint
from wmtp_ds.run_summary import FINAL, read_summary
from wmtp_ds.scores.manifest import read_manifest

_SERVER = multiprocessing.get_context("forkserver")
_KEY = "experiment.key"  # in a run's folder, once it is done


@dataclass(frozen=True)
class Run:
    """One run of one stage.

    Attributes:
        name: unique among those of a size.
        size: whose config it begins with.
        stage: which.
        settings: what differs from that config: key -> value.
        needs: runs that must be done before.
    """

    name: str
    size: Size
    stage: str
    settings: dict[str, object]
    needs: tuple["Run", ...] = field(default=())

    @property
    def folder(self) -> Path:
        """Its ``save_dir``."""
        return self.size.folder / "runs" / self.name

    @property
    def model(self) -> Path:
        """What it exports at the end."""
        return self.folder / FINAL

    @property
    def overrides(self) -> tuple[str, ...]:
        """``key=value`` of all that differs from the config."""
        own = {"experiment.name": self.name, "checkpoint.save_dir": self.folder} | self.settings
        return tuple(f"{key}={_toml(value)}" for key, value in own.items())

    @property
    def command(self) -> str:
        """The same run through the launcher."""
        parts = ["wmtp-ds", "train", "--stage", self.stage, "--config", str(self.size.config(self.stage))]
        return shlex.join([*parts, *(part for text in self.overrides for part in ("--override", text))])

    def summary(self) -> dict[str, Any]:
        """What its ``run.json`` says."""
        return read_summary(self.folder)

    def key(self) -> str:
        """A hash of all that decides it: config, data, model, reference scores, and the runs that it needs."""
        resolved = load_config(self.size.config(self.stage), self.overrides, checks=False)
        config = resolved.config
        parts = [resolved.hash(), *(run.key() for run in self.needs)]
        parts += [sha256_of(Path(file)) for file in (config.dataset.train, config.dataset.validation)]
        if not self.needs:
            parts.append(str(read_trunk_fingerprint(Path(config.models.policy.path))))
        if (reference := config.models.reference) is not None and reference.scores is not None:
            parts.append(read_manifest(Path(reference.scores)).checksum())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def is_done(self) -> bool:
        """Whether it has come to its end with just this."""
        try:
            return (self.folder / _KEY).read_text() == self.key()
        except OSError:
            return False


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value)


def do(runs: Sequence[Run], workers: int, tell: Callable[[str], None] = print) -> None:
    """Do runs and what they need, so many at a time; ends the program where one fails."""
    waiting: dict[str, Run] = {}

    def want(run: Run) -> None:
        for needed in run.needs:
            want(needed)
        waiting.setdefault(run.name, run)

    for run in runs:
        want(run)
    _SERVER.set_forkserver_preload(["wmtp_ds.train"])  # of a server that does not run yet
    running: dict[str, _Running] = {}
    done: set[str] = set()
    total = len(waiting)
    while waiting or running:
        for name, one in list(running.items()):
            if one.process.is_alive():
                continue
            one.process.join()
            del running[name]
            if one.process.exitcode:
                _fail(one.run, one.process.exitcode, [other.process for other in running.values()])
            steps, wanted = one.run.summary()["steps"], one.run.settings["training.max_steps"]
            assert steps == wanted, f"{name} took {steps} steps, not {wanted}: too few rows, or n_epochs"
            (one.run.folder / _KEY).write_text(one.run.key())
            done.add(name)
            tell(f"{len(done)} of {total}: {name}, {time.monotonic() - one.began:.0f} s")
        ready = [run for run in waiting.values() if all(needed.name in done for needed in run.needs)]
        for run in ready[: max(0, workers - len(running))]:
            del waiting[run.name]
            if run.is_done():
                done.add(run.name)
                continue
            place = min(set(range(workers)) - {one.place for one in running.values()})
            running[run.name] = _start(run, place, workers)
        time.sleep(0.05 if running else 0)


@dataclass(frozen=True)
class _Running:
    run: Run
    process: BaseProcess
    place: int  # among those that run at a time
    began: float


def _start(run: Run, place: int, workers: int) -> _Running:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    process = _SERVER.Process(target=_train, args=(run, cores[place::workers] or cores, str(Path.cwd())))
    process.start()
    return _Running(run, process, place, time.monotonic())


def _log(run: Run) -> Path:
    return run.folder.with_name(f"{run.name}.log")


def _train(run: Run, cores: Sequence[int], here: str) -> None:
    os.chdir(here)
    os.sched_setaffinity(0, cores)  # torch takes as many threads
    stream = os.open(_log(run), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    from wmtp_ds.errors import UserError
    from wmtp_ds.launch import Place
    from wmtp_ds.rank import train_rank

    place = Place.of(os.environ)
    assert place is not None
    request = Request(run.stage, config=run.size.config(run.stage), override=run.overrides)
    try:
        sys.exit(train_rank(request, place))
    except UserError as error:
        print(f"error: {error}")
        sys.exit(error.exit_code)


def _fail(run: Run, code: int, others: Sequence[BaseProcess]) -> None:
    for process in others:
        process.terminate()
    last = _log(run).read_text(errors="replace").splitlines()[-5:]
    sys.exit("\n".join([f"{run.name} ended with exit code {code}; {_log(run)} says:", *last, f"again: {run.command}"]))
