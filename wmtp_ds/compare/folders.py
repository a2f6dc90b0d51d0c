"""Runs from what training leaves in a folder, and from what `wmtp-ds evaluate` leaves of them."""

import dataclasses
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wmtp_ds.checkpoint_files import PARTIAL, export_there, is_complete, step_of, verify_manifest
from wmtp_ds.compare.run import Run, Series, last, without_others_losses
from wmtp_ds.config.resolved import leaves
from wmtp_ds.errors import UserError
from wmtp_ds.evaluate.files import SUMMARY, Finished, is_finished, read_finished
from wmtp_ds.files import read_json, read_text
from wmtp_ds.models.config_file import model_key
from wmtp_ds.run_summary import BEST, FINAL, read_summary
from wmtp_ds.tracking import texts_of
from wmtp_ds.tracking_sender import MAX_PARAM_VALUE
from wmtp_ds.tracking_state import METRICS_FILE, TrackingState, read_metrics

CONFIG = "config.toml"


def read_folder(path: Path, evaluations: Path) -> Run:
    """A run's folder, a checkpoint or an export in one, an export elsewhere, or an evaluation's folder.

    Args:
        path: of it; it exists.
        evaluations: below it evaluations of the run are looked for, besides the run's folder.

    Raises:
        UserError: it is none of these, or not whole.
    """
    if is_finished(path):
        return _of_evaluation(read_finished(path), evaluations)
    _refuse_what_is_cut_short(path)
    if is_complete(path):  # a checkpoint to resume from
        return _of_checkpoint(path, evaluations)
    if (path / "metrics.json").is_file():
        return _of_export(path, evaluations)
    if not (path / CONFIG).is_file():
        raise UserError(
            f"{path} holds no run: give a run's folder (it has {CONFIG} and {METRICS_FILE}), an export ({BEST}), a "
            "checkpoint (step_…), or the folder of an evaluation"
        )
    run = _read_run(path)
    # The best export stands for the run, as for `wmtp-ds evaluate`.
    exports = [path / name for name in (BEST, FINAL) if (path / name / "config.json").is_file()][:1]
    return _with_evaluations(run, exports, [path, evaluations])


def _refuse_what_is_cut_short(path: Path) -> None:
    if path.name.startswith(PARTIAL) or (step_of(path.name) is not None and not is_complete(path)):
        raise UserError(
            f"{path} is half-written: its saving was cut short. Compare the run ({path.parent}) or another checkpoint"
        )
    if is_complete(path) and (problem := verify_manifest(path, contents=False)) is not None:
        raise UserError(f"{path} is no whole checkpoint: {problem}. Compare the run ({path.parent}) or another one")
    if path.name in (BEST, FINAL) and not ((path / "metrics.json").is_file() and (path / CONFIG).is_file()):
        raise UserError(f"{path} is half-written: metrics.json or {CONFIG} is missing. Compare the run ({path.parent})")


def _of_checkpoint(path: Path, evaluations: Path) -> Run:
    run = _read_run(path.parent, config=path / CONFIG, until=step_of(path.name))
    export = export_there(path)
    return _with_evaluations(_as_part(run, path), [export] if export else [], [path.parent, evaluations], path)


def _of_export(path: Path, evaluations: Path) -> Run:
    facts = _read_object(path / "metrics.json")
    step = facts.get("step") if type(facts.get("step")) is int else None
    if (path.parent / METRICS_FILE).is_file():
        run = _as_part(_read_run(path.parent, config=path / CONFIG, until=step), path)
        places = [path.parent, evaluations]
    else:
        numbers = {name: float(value) for name, value in facts.items() if "/" in name and _is_number(value)}
        config = _read_config(path / CONFIG)
        series = {name: {step or 0: value} for name, value in numbers.items()}
        run = Run(
            name=path.resolve().name,
            identity=str(path.resolve()),
            config=config,
            series=without_others_losses(series, config.get("experiment.stage")),
            steps=step,
            remarks=(f"an export without its run's {METRICS_FILE}: no learning curves, tokens and time",),
        )
        places = [path, evaluations]
    return _with_evaluations(run, [path], places)


def _of_evaluation(found: Finished, evaluations: Path) -> Run:
    """The run that was evaluated, if it is still there, with this evaluation alone."""
    model = Path(found.model)
    place = Path(found.place).resolve()
    if (
        not model.is_dir()
        or is_finished(model)
        or not ((model / "metrics.json").is_file() and (model / CONFIG).is_file())
    ):
        why = f"its model {found.model} is no run's export, or not here"
    elif model_key(model) != found.model_key:
        why = f"{found.model} holds another model since"
    else:
        run = _of_export(model, evaluations)
        return dataclasses.replace(
            run,
            identity=f"{run.identity}#{place}",
            evaluations=(found,),
            remarks=tuple(remark for remark in run.remarks if not remark.startswith(_NO_EVALUATION)),
        )
    remarks = (f"an evaluation alone: {why}",)
    return Run(name=place.name, identity=str(place), evaluations=(found,), remarks=remarks)


def _as_part(run: Run, path: Path) -> Run:
    here = path.resolve()
    name = f"{here.parent.name}/{here.name}"
    return dataclasses.replace(run, name=name, identity=f"{run.identity}/{here.name}")


def _read_run(folder: Path, *, config: Path | None = None, until: int | None = None) -> Run:
    """What a run's folder says, up to a step."""
    remarks: list[str] = []
    state = _tracking_state(folder)
    tags = dict(state.tags) if state is not None else {}
    summary = read_summary(folder)
    if "world_size" in summary:
        tags.setdefault("world_size", str(summary["world_size"]))
    texts = _read_config(config or folder / CONFIG)
    series: dict[str, Series] = {}
    if (folder / METRICS_FILE).is_file():
        for step, metrics in read_metrics(folder / METRICS_FILE).items():
            if until is None or step <= until:
                for name, value in metrics.items():
                    series.setdefault(name, {})[step] = value
    else:
        remarks.append(f"has no {METRICS_FILE}: no learning curves")
    steps = max((max(values) for values in series.values()), default=None) if until is None else until
    completed = bool(summary.get("completed")) if until is None else None
    if completed is False:
        remarks.append(f"has not come to its end: {steps or 0} steps so far")
    if "attempts" in tags:
        remarks.append("went back to a checkpoint: steps that were taken twice count once, the last time")
    whole = summary if completed else {}
    seconds = last(series.get("perf/seconds", {})) or _number(whole.get("seconds"))
    tokens = last(series.get("perf/tokens_seen", {}))
    if tokens is None and (rate := _number(whole.get("tokens_per_s"))) is not None and seconds is not None:
        tokens = rate * seconds
    run_id = (state.run_id if state is not None else None) or summary.get("mlflow_run_id")
    return Run(
        name=folder.resolve().name,
        identity=str(run_id or folder.resolve()),
        config=texts,
        series=without_others_losses(series, texts.get("experiment.stage")),
        tags=tags,
        completed=completed,
        steps=steps,
        tokens=tokens,
        seconds=seconds,
        remarks=tuple(remarks),
    )


def _tracking_state(folder: Path) -> TrackingState | None:
    try:
        return TrackingState.load(folder)
    except (OSError, UserError):  # a run by hand, or a damaged file: the metrics are elsewhere
        return None


def _read_config(file: Path) -> dict[str, str]:
    """A resolved config as the texts that MLflow gets of it."""
    try:
        tree = tomllib.loads(read_text(file, most=2**20))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from None
    return texts_of({".".join(map(str, path)): value for path, value in leaves(tree)}, MAX_PARAM_VALUE)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = read_json(file)
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from None
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None


# --- evaluations ---

_NO_EVALUATION = "has no evaluation"


def _with_evaluations(run: Run, models: Iterable[Path], places: Iterable[Path], unevaluated: Path | None = None) -> Run:
    """The run with the finished evaluations of its models in these places.

    Args:
        run: without any.
        models: whose evaluations count.
        places: in and below which they are looked for.
        unevaluated: what could be evaluated; None: the first of the models.
    """
    keys = {model_key(model): model for model in models}
    resolved = {model.resolve() for model in keys.values()}
    found: dict[Path, Finished] = {}
    remarks: list[str] = []
    for place in places:
        for folder in _evaluation_folders(place):
            here = folder.resolve()
            if here in found:
                continue
            try:
                one = read_finished(folder)
            except UserError as error:
                remarks.append(f"an evaluation is left out: {error}")
                continue
            if one.model_key in keys:
                found[here] = one
            elif Path(one.model).resolve() in resolved:
                since = f"{one.model} holds another model since. Evaluate it again"
                remarks.append(f"the evaluation {folder} is left out: {since}")
    if not found and run.stage != "critic":
        which = unevaluated or next(iter(keys.values()), None)
        hint = f": wmtp-ds evaluate {which} --problems …" if which else ", and no export to evaluate"
        remarks.append(f"{_NO_EVALUATION}{hint}")
    newest = sorted(found.values(), key=lambda one: os.stat(Path(one.place) / SUMMARY).st_mtime_ns, reverse=True)
    return dataclasses.replace(run, evaluations=tuple(newest), remarks=(*run.remarks, *remarks))


def _evaluation_folders(place: Path) -> list[Path]:
    """Folders with an evaluation in or below a place; shards of checkpoints are not searched."""
    found = []
    for folder, names, files in os.walk(place):
        names[:] = sorted(name for name in names if step_of(name) is None and not name.startswith("."))
        if SUMMARY in files and is_finished(Path(folder)):
            found.append(Path(folder))
    return found
