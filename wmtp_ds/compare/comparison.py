"""Arms of one run or several, side by side: everything that `wmtp-ds compare` says, as one JSON object."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wmtp_ds.compare.passes import compare_passes
from wmtp_ds.compare.run import TRAIN_DATA, VALIDATION_DATA, Run, Series
from wmtp_ds.errors import UserError

# What is shown, and whether the best is the highest; the first ones have panels of their own.
LOWEST, HIGHEST = "lowest", "highest"
EVALUATED = {"val/loss": LOWEST, "val/value_loss": LOWEST, "val/auc": HIGHEST}
TRAINED = ("train/loss", "train/value_loss")
WATCHED = ("weight/mean", "weight/std", "weight/entropy", "rho1/selected_ratio", "optim/grad_norm")
PANELS = 6
_NOT_CURVES = ("perf/", "early_stopping/")


@dataclass(frozen=True)
class Arm:
    """What is compared: one run, or several with other seeds."""

    name: str
    runs: tuple[Run, ...]


def compare(arms: Sequence[Arm]) -> dict[str, Any]:
    """Compare arms; the first one is what the others are held against.

    Returns:
        ``arms``, ``runs``, ``config_differences``, ``metrics``, ``curves``, ``pass_at_k``, and ``warnings`` and
        ``errors``: what may mislead, and what could not be compared. Numbers that are not finite are texts.

    Raises:
        UserError: a run is given twice.
    """
    _refuse_twice(arms)
    runs = [run for arm in arms for run in arm.runs]
    warnings = [f"{run.name}: {remark}" for run in runs for remark in run.remarks]
    left_out = _check_data(runs, warnings) | _check_stages(runs, warnings)
    curves = {name: found for name in _metric_names(runs) if name not in left_out and (found := _curves(name, runs))}
    passes, pass_warnings, errors = compare_passes([(arm.name, arm.runs) for arm in arms])
    told = {
        "command": "compare",
        "arms": {arm.name: [run.name for run in arm.runs] for arm in arms},
        "runs": {run.name: _facts(run) for run in runs},
        "config_differences": config_differences(arms),
        "metrics": {name: {run.name: _ends(run.series.get(name, {})) for run in runs} for name in curves},
        "curves": curves,
        "pass_at_k": passes,
        "warnings": warnings + pass_warnings,
        "errors": errors,
    }
    return dict(finite(told))


def _refuse_twice(arms: Sequence[Arm]) -> None:
    seen: dict[str, str] = {}
    for arm in arms:
        for run in arm.runs:
            if run.identity in seen:
                raise UserError(f"the same run twice: {seen[run.identity]} and {run.name} are one. Give each run once")
            seen[run.identity] = run.name


# --- what must be alike ---


def _check_data(runs: Sequence[Run], warnings: list[str]) -> set[str]:
    """Warn of other data; returns the metrics that then mean nothing beside each other."""
    for tag, key in ((TRAIN_DATA, "dataset.train"), (VALIDATION_DATA, "dataset.validation")):
        known = {run.name: run.tags[tag] for run in runs if tag in run.tags}
        paths = {run.name: run.config[key] for run in runs if key in run.config}
        if len(set(known.values())) > 1:
            told = "; ".join(f"{name}: {paths.get(name, '?')} ({value[:12]})" for name, value in known.items())
            if tag == TRAIN_DATA:
                warnings.append(f"different training data ({told}): what differs may be the data's doing")
            else:
                warnings.append(f"different validation data ({told}): val/* cannot be compared and is left out")
                return {name for run in runs for name in run.series if name.startswith("val/")}
        elif len(set(paths.values())) > 1 and len(known) < len(runs):
            told = "; ".join(f"{name}: {path}" for name, path in paths.items())
            warnings.append(f"{key} differs ({told}), and whether the data do is not known")
    return set()


def _check_stages(runs: Sequence[Run], warnings: list[str]) -> set[str]:
    stages = {run.stage for run in runs if run.stage is not None}
    if len(stages) < 2:
        return set()
    told = ", ".join(sorted(stages))
    warnings.append(f"different stages ({told}): their training losses are weighted differently and are left out")
    return {name for run in runs for name in run.series if name.startswith("train/")}


# --- parts ---


def config_differences(arms: Sequence[Arm]) -> dict[str, dict[str, str | None]]:
    """Dotted keys whose values differ between any two runs: of each arm the value, None where it has none.

    Several values of an arm's runs stand with commas between. Runs whose config is not known are left out.
    """
    known = [(arm.name, [run for run in arm.runs if run.config]) for arm in arms]
    runs = [run for _, own in known for run in own]
    differing = {}
    for key in sorted({key for run in runs for key in run.config}):
        if len({run.config.get(key) for run in runs}) > 1:
            differing[key] = {name: _joined([run.config.get(key) for run in own]) for name, own in known if own}
    return differing


def _joined(values: Sequence[str | None]) -> str | None:
    different = list(dict.fromkeys(values))
    if len(different) == 1:
        return different[0]
    return ", ".join("(not set)" if value is None else value for value in different)


def _facts(run: Run) -> dict[str, Any]:
    return {
        "id": run.identity,
        "stage": run.stage,
        "completed": run.completed,
        "steps": run.steps,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "ranks": run.ranks,
        "sequences_per_step": run.rows_per_step,
        "training_data": run.tags.get(TRAIN_DATA),
        "validation_data": run.tags.get(VALIDATION_DATA),
        "evaluations": [one.place for one in run.evaluations],
    }


def _metric_names(runs: Sequence[Run]) -> list[str]:
    """Of all that any run has logged: what tells the most first."""
    names = {name for run in runs for name in run.series}
    first = [name for name in (*EVALUATED, *TRAINED, *WATCHED) if name in names]
    return first + sorted(names - set(first))


def _curves(name: str, runs: Sequence[Run]) -> dict[str, list[list[float]]]:
    """[step, value] of each run that has the metric."""
    return {run.name: [[step, value] for step, value in run.series[name].items()] for run in runs if name in run.series}


def _ends(values: Series) -> dict[str, float | None]:
    """The last value, the lowest and the highest, with their steps; values that are not numbers are neither."""
    numbers = {step: value for step, value in values.items() if not math.isnan(value)}
    found: dict[str, float | None] = {"final": None, "final_step": None}
    if values:
        found = {"final": values[max(values)], "final_step": max(values)}
    extremes: dict[str, Callable[..., int]] = {LOWEST: min, HIGHEST: max}
    for which, extreme in extremes.items():
        step = extreme(numbers, key=numbers.__getitem__) if numbers else None
        found |= {which: None if step is None else numbers[step], f"{which}_step": step}
    return found


def panels(told: Mapping[str, Any]) -> list[str]:
    """The metrics that curves are drawn of: those that at least two arms have at two steps and more."""
    arm_of = {run: arm for arm, runs in told["arms"].items() for run in runs}
    shown = []
    for name, found in told["curves"].items():
        arms = {arm_of[run] for run, points in found.items() if len(points) > 1}
        if len(arms) > 1 and not name.startswith(_NOT_CURVES):
            shown.append(name)
    chosen = [name for name in shown if name in (*EVALUATED, *TRAINED, *WATCHED)]
    # A critic's loss is its value loss: one panel of the two is enough.
    if {"train/loss", "train/value_loss"} <= set(chosen) and _same(told["curves"], "train/loss", "train/value_loss"):
        chosen.remove("train/value_loss")
    return chosen[:PANELS] or shown[:PANELS]


def _same(curves: Mapping[str, Any], first: str, second: str) -> bool:
    return bool(curves[first] == curves[second])


def finite(value: Any) -> Any:
    """The same for strict JSON: infinities and NaN become the texts that ``float`` reads, as in metrics.jsonl."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
