"""Several stages one after another, as children of one tracked run; a critic is handed to what needs one."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wmtp_ds.config import ConfigError, Resolved
from wmtp_ds.config.training import stage_names, training_class
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.launch import Request, launch
from wmtp_ds.run_summary import BEST, read_summary, write_summary

_CRITIC = "experiment.critic_checkpoint"
# Stands for the critic that an earlier stage is going to make.
_COMING = f"runs:/coming/checkpoints/{BEST}"


@dataclass
class Step:
    """A stage of the pipeline: what was typed, and what it resolves to now."""

    request: Request
    resolved: Resolved

    @property
    def folder(self) -> Path:
        """Where the run's checkpoints go."""
        return Path(self.resolved.config.checkpoint.save_dir)

    @property
    def makes_critic(self) -> bool:
        """Whether it trains a value head that others can start from."""
        return _makes_critic(self.request.stage)

    def critic_for(self, other: "Step") -> str:
        """This run's critic as the other stage can find it: an artifact's URI means nothing to another server.

        Raises:
            RunError: if the run exported none.
        """
        critic = critic_of(self.folder)
        same_server = self.resolved.config.mlflow.tracking_uri == other.resolved.config.mlflow.tracking_uri
        return critic if same_server else str(self.folder / BEST)

    def at_hand(self, critic: str, say: Callable[[str], None]) -> str:
        """``critic``, or its folder here where MLflow, which may have failed meanwhile, cannot give it."""
        folder = str(self.folder / BEST)
        if critic == folder:
            return critic
        why = _why_not_in_mlflow(critic, self.resolved.config.mlflow.tracking_uri)
        if not why:
            return critic
        say(f"warning: {critic} cannot be had ({why}); the critic is handed over as {folder}")
        return folder


def plan_pipeline(requests: Sequence[Request]) -> list[Step]:
    """Check every config before the first stage starts.

    A stage that needs a critic takes it from the last stage before it that makes one (trains a value head without
    needing a critic itself); without such a stage, from its own config.

    Raises:
        UserError: all problems of all configs in one message.
    """
    steps: list[Step] = []
    problems: list[str] = []
    maker: Step | None = None
    coming = False
    for request in requests:
        handed_over = coming and _needs_critic(request.stage)
        coming = coming or _makes_critic(request.stage)
        try:
            resolved = _load_before_critic(request) if handed_over else request.load()
            if handed_over and maker is not None and not maker.resolved.config.checkpoint.save_best:
                problems.append(
                    f"{maker.request.config_path}: checkpoint.save_best is false, but {request.config_path} needs "
                    f"the {BEST} of this stage. Set it to true."
                )
        except ConfigError as error:
            problems.append(str(error))
            continue
        steps.append(Step(request, resolved))
        maker = steps[-1] if steps[-1].makes_critic else maker
    if problems:
        raise UserError("\n".join(problems))
    folders = [step.folder for step in steps]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"two stages of the pipeline write to {folder}; give each its own experiment.name.")
    return steps


def _load_before_critic(request: Request) -> Resolved:
    """A config of which all but the critic is checked: that is not there yet."""
    handed = replace(request, critic_checkpoint=_COMING)
    try:
        return handed.load()
    except ConfigError as error:
        others = [problem for problem in error.problems if problem.key != _CRITIC]
        if others:
            raise ConfigError(str(request.config_path), others) from None
        return handed.load(checks=False)


def _needs_critic(stage: str) -> bool:
    return stage in stage_names() and training_class(stage).needs_critic


def _makes_critic(stage: str) -> bool:
    return stage in stage_names() and training_class(stage).has_value_head and not _needs_critic(stage)


def run_pipeline(
    requests: Sequence[Request], *, name: str, reuse: bool, say: Callable[[str], None]
) -> tuple[int, list[Path]]:
    """Train every stage through the launcher, in order, until one fails.

    Args:
        requests: the stages, as ``wmtp-ds train`` takes them.
        name: of the parent run.
        reuse: a stage that was completed before with the same config is not trained again.
        say: takes lines for the user.

    Returns:
        The exit code of the stage that failed, or 0; and the folders of the runs that are complete.

    Raises:
        UserError: if a config is wrong; nothing was started then.
    """
    steps = plan_pipeline(requests)
    maker: Step | None = None
    parent: str | None = None
    complete: list[Path] = []
    for step in steps:
        request = step.request
        hands_over = step.resolved.config.training.needs_critic and maker is not None
        if hands_over and maker is not None:
            request = replace(request, critic_checkpoint=maker.critic_for(step))
        fingerprint = json.dumps({"config": step.resolved.hash(), "critic": request.critic_checkpoint})
        done = read_summary(step.folder)
        if reuse and done.get("completed") and done.get("pipeline") == fingerprint:
            say(f"{request.stage}: {step.folder} is complete and its config has not changed; not trained again")
        else:
            if hands_over and maker is not None and request.critic_checkpoint:
                request = replace(request, critic_checkpoint=maker.at_hand(request.critic_checkpoint, say))
            parent = parent or _start_parent(step.resolved, name, say)
            overrides = (
                [*request.override, f"mlflow.parent_run_id={json.dumps(parent)}"] if parent else request.override
            )
            code = launch(replace(request, override=tuple(overrides)))
            done = read_summary(step.folder)
            if code or not done.get("completed"):
                say(f"{request.stage} ended with exit code {code}; the stages after it were not started")
                return code or 1, complete
            write_summary(step.folder, pipeline=fingerprint)
        complete.append(step.folder)
        maker = step if step.makes_critic else maker
    return 0, complete


def critic_of(folder: Path) -> str:
    """The critic of a completed run: its MLflow artifact, or the path where the run was not tracked.

    Raises:
        RunError: if the run exported none.
    """
    exported = folder / BEST
    if not exported.is_dir():
        raise RunError(f"{folder} has no {BEST}: train the critic with checkpoint.save_best = true.")
    run_id = read_summary(folder).get("mlflow_run_id")
    return f"runs:/{run_id}/checkpoints/{BEST}" if run_id else str(exported)


def _why_not_in_mlflow(critic: str, tracking_uri: str) -> str:
    """Why a value head cannot be had as an artifact of a run; "" if it can."""
    from wmtp_ds import mlflow_client
    from wmtp_ds.handoff import VALUE_HEAD_FILE, parse_critic_uri

    uri = parse_critic_uri(critic)
    try:
        client = mlflow_client.connect(mlflow_client.clean_tracking_uri(tracking_uri))
        found = [file.path for file in client.list_artifacts(uri.run_id, uri.path)]
    except Exception as error:  # tracking never stops training
        return mlflow_client.explain(error)
    return "" if f"{uri.path}/{VALUE_HEAD_FILE}" in found else "MLflow does not have it yet"


def _start_parent(resolved: Resolved, name: str, say: Callable[[str], None]) -> str | None:
    """The run above the stages' own; None where tracking is off or the server does not answer."""
    config = resolved.config.mlflow
    if not config.tracking_uri:
        return None
    # Under `mlflow run` the run that it made is the parent; its stages must not all write to it.
    given = config.parent_run_id or os.environ.pop("MLFLOW_RUN_ID", "")
    if given:
        return given
    from wmtp_ds import mlflow_client

    try:
        client = mlflow_client.connect(mlflow_client.clean_tracking_uri(config.tracking_uri))
        experiment = client.get_experiment_by_name(config.experiment)
        identifier = (
            experiment.experiment_id
            if experiment is not None
            else client.create_experiment(config.experiment, artifact_location=config.s3_artifacts or None)
        )
        run = client.create_run(identifier, run_name=name, tags={"stage": "pipeline"})
        client.set_terminated(run.info.run_id)
        return str(run.info.run_id)
    except Exception as error:  # tracking never stops training
        say(f"warning: MLflow made no parent run ({mlflow_client.explain(error)}); the stages are tracked without one")
        return None
