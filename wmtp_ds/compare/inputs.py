"""What was typed -> arms."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from wmtp_ds.compare.comparison import Arm
from wmtp_ds.compare.folders import read_folder
from wmtp_ds.compare.mlflow_runs import RUN_ID, MlflowRuns
from wmtp_ds.compare.run import Run
from wmtp_ds.config.schema import MlflowConfig
from wmtp_ds.errors import UserError

_VARIABLES = ("WMTP_MLFLOW__TRACKING_URI", "MLFLOW_TRACKING_URI")


def configured_uri(environ: Mapping[str, str] | None = None) -> str:
    """Where runs are tracked if nothing else is said: the environment's words, or the config's default."""
    environ = os.environ if environ is None else environ
    named = [environ[name] for name in _VARIABLES if name in environ]
    return named[0] if named else str(MlflowConfig.model_fields["tracking_uri"].default)


class Reader:
    """Reads runs by folder or by MLflow id.

    Args:
        tracking_uri: for ids; MLflow is not asked unless there are any.
        evaluations: the folder below which evaluations are looked for.
    """

    def __init__(self, tracking_uri: str, evaluations: Path):
        self._tracking_uri, self._evaluations = tracking_uri, evaluations
        self._mlflow: MlflowRuns | None = None

    def read(self, typed: str) -> Run:
        """One run.

        Raises:
            UserError: there is none of that name.
            RunError: MLflow cannot be reached.
        """
        path = Path(typed)
        if path.is_dir():
            return read_folder(path, self._evaluations)
        run_id = typed.removeprefix("runs:/")
        if path.exists():
            raise UserError(f"{typed} is a file: give the run's folder")
        if not RUN_ID.fullmatch(run_id):
            raise UserError(
                f"{typed} is neither a folder here nor the id of an MLflow run (32 hexadecimal digits): give a run's "
                "folder (checkpoints/NAME), one of its checkpoints, or an id"
            )
        if self._mlflow is None:
            self._mlflow = MlflowRuns(self._tracking_uri)
        return self._mlflow.read(run_id)


def make_arms(runs: Sequence[str], groups: Sequence[tuple[str, Sequence[str]]], reader: Reader) -> list[Arm]:
    """Arms in the order in which they were typed: runs, each an arm of its own, and then groups.

    Raises:
        UserError: a run cannot be read, or two arms have one name.
    """
    single = [reader.read(typed) for typed in runs]
    grouped = [(name, [reader.read(typed) for typed in members]) for name, members in groups]
    everything = [*single, *(run for _, members in grouped for run in members)]
    typed = [*runs, *(one for _, members in groups for one in members)]
    named = iter(_unique(everything, typed))
    arms = [Arm(run.name, (run,)) for run in (next(named) for _ in single)]
    arms += [Arm(name, tuple(next(named) for _ in members)) for name, members in grouped]
    names = [arm.name for arm in arms]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"two arms are called {twice[0]}: give the group another name")
    return arms


def _unique(runs: Sequence[Run], typed: Sequence[str]) -> list[Run]:
    """Runs of one name are called what was typed."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else dataclasses.replace(run, name=text)
        for run, text in zip(runs, typed, strict=True)
    ]
