"""One run of the benchmark: check every arm, time them interleaved at each size, judge, and report."""

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch

from . import report, targets
from .arms import FLOOR, PLAIN, Arm, Step, UnavailableError, all_arms, choose
from .bandwidth import COPY, measure_bandwidth
from .checks import check
from .environment import environment
from .inputs import Inputs, Sizes, make_inputs
from .measure import Reading, extra_memory, interleaved, memory_unmeasurable, ratios, spread
from .options import Plan, Settings, UsageError, plan

_SETS = 2  # of inputs, taken in turn, so that none is in a cache when its turn comes
_OURS = "td"  # what other libraries are compared to

T = TypeVar("T")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _device(asked: str | None) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device. Leave the option out, or say --device cpu")
    return torch.device(asked if asked in ("cpu", "cuda") else "cuda" if torch.cuda.is_available() else "cpu")


def _chosen(names: Sequence[str] | None) -> tuple[Arm, ...]:
    try:
        return choose(names)
    except KeyError as error:
        known = [arm.name for arm in all_arms()]
        close = difflib.get_close_matches(error.args[0], known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(known)}"
        raise UsageError(f"--arms {error.args[0]}: there is no such arm. {hint}") from None


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _attempt(arm: Arm, action: Callable[[], T]) -> tuple[T | None, str]:
    """What the action returns and "", or None and why it could not.

    Other libraries may fail as they like; an error of ours, or of a yardstick, is a bug and is raised, unless there
    is too little memory.
    """
    try:
        return action(), ""
    except UnavailableError as error:
        return None, str(error)
    except (torch.OutOfMemoryError, MemoryError):
        return None, "out of memory"  # what it had taken is free again once this exception is gone
    except Exception as error:
        if arm.ours or arm.name in (FLOOR, PLAIN):
            raise
        first = str(error).strip().partition("\n")[0]
        return None, f"failed: {type(error).__name__}: {first}"[:200]


def _inputs(plan: Plan, sizes: Sizes, seed: int, device: torch.device) -> Inputs:
    return make_inputs(sizes, getattr(torch, plan.dtype), device, seed, plan.k_percent)


def _sizes(plan: Plan, positions: int) -> Sizes:
    length = plan.length_at(positions)
    return Sizes(plan.heads, positions // length, length, plan.dim, plan.vocabulary)


def _check_arms(
    plan: Plan, arms: Sequence[Arm], device: torch.device
) -> tuple[dict[str, Step], dict[str, dict[str, Any]]]:
    """The steps of the arms that can run and compute the right thing; and of every arm its status and errors."""
    dtype = getattr(torch, plan.dtype)
    inputs = _inputs(plan, Sizes(plan.heads, 2, plan.check_length, plan.dim, plan.vocabulary), plan.seed, device)
    steps: dict[str, Step] = {}
    found: dict[str, dict[str, Any]] = {}
    for arm in arms:
        told: dict[str, Any] = {"status": "measured", "reason": "", "errors": None}
        step, reason = _attempt(arm, partial(arm.make, device, dtype))
        if step is not None:
            checked, reason = _attempt(arm, partial(check, arm, step, inputs))
            if checked is not None:
                told["errors"], problem = asdict(checked[0]), checked[1]
                steps[arm.name] = step
                if problem is not None:
                    told |= {"status": "wrong", "reason": problem}
                    del steps[arm.name]
        if reason:
            told |= {"status": "skipped", "reason": reason}
        found[arm.name] = told
        inputs.drop_gradients()
    return steps, found


def _warm_up(arm: Arm, step: Step, sets: Sequence[Inputs], device: torch.device) -> int | None:
    """Run an arm until nothing is done for the first time any more; bytes that it takes beyond its results."""
    for inputs in sets:
        inputs.drop_gradients()
        if arm.prepare is not None:
            arm.prepare(inputs)
    if device.type == "cuda":
        for inputs in sets:  # compiles, and picks the fastest variants
            step(inputs)
            inputs.drop_gradients()
    if memory_unmeasurable(device) is not None:
        step(sets[0])
        return None
    extra = extra_memory(lambda: step(sets[0]), device)
    sets[0].drop_gradients()
    return max(0, extra - (sets[0].gradient_bytes if arm.trains else 0))


def _measured(readings: Mapping[str, list[Reading]], name: str, extra_bytes: int | None, clock: str) -> dict[str, Any]:
    """An arm's part of the results at one size."""
    own = readings[name]
    cpu = [reading.cpu for reading in own if reading.cpu is not None]
    return {
        "status": "measured",
        "reason": "",
        "wall": asdict(spread([reading.wall for reading in own])),
        "cpu": asdict(spread(cpu)) if cpu else None,
        "ratios": {
            other: asdict(spread(ratios(own, readings[other], clock)))
            for other in (FLOOR, PLAIN, _OURS)
            if other in readings
        },
        "extra_bytes": extra_bytes,
        "rounds": [asdict(reading) for reading in own],
    }


def _measure_size(
    plan: Plan, arms: Sequence[Arm], steps: Mapping[str, Step], device: torch.device, positions: int
) -> dict[str, Any]:
    """All arms at one number of positions, interleaved."""
    sizes, main = _sizes(plan, positions), positions == plan.positions
    sets = [_inputs(plan, sizes, plan.seed + 1 + number, device) for number in range(_SETS)]
    extra: dict[str, int | None] = {}
    results: dict[str, dict[str, Any]] = {}
    for arm in arms:
        if arm.name in steps:
            warmed, reason = _attempt(arm, partial(_warm_up, arm, steps[arm.name], sets, device))
            if reason:
                results[arm.name] = {"status": "skipped", "reason": reason}
            else:
                extra[arm.name] = warmed

    def call(name: str) -> Callable[[int], object]:
        return lambda number: steps[name](sets[number % _SETS])

    def drop() -> None:
        for inputs in sets:
            inputs.drop_gradients()

    readings = interleaved(
        {name: call(name) for name in extra},
        device,
        plan.rounds if main else plan.sweep_rounds,
        plan.seed,
        before=drop,
        progress=lambda line: _tell(f"{positions} positions: {line}"),
    )
    results |= {name: _measured(readings, name, extra[name], plan.clock) for name in extra}
    return {
        "positions": positions,
        "length": sizes.length,
        "rows": sizes.rows,
        "main": main,
        "mean_cross_entropy": sum(inputs.mean_cross_entropy for inputs in sets) / _SETS,
        "results": {arm.name: results[arm.name] for arm in arms if arm.name in results},
    }


def _bandwidth(plan: Plan, device: torch.device) -> dict[str, Any]:
    found = measure_bandwidth(plan.bandwidth_positions, device, plan.rounds, plan.seed)
    names = found.readings
    return {
        "status": found.status,
        "reason": found.reason,
        "positions": plan.bandwidth_positions,
        "bytes": found.bytes,
        "wall": {name: asdict(spread([reading.wall for reading in names[name]])) for name in names},
        "share_of_copy": {
            name: asdict(spread(ratios(names[COPY], names[name], "wall"))) for name in names if name != COPY
        },
        "rounds": {name: [asdict(reading) for reading in names[name]] for name in names},
    }


def measure(plan: Plan, command: str, device: torch.device) -> dict[str, Any]:
    """Everything that is measured, as one document that JSON can hold."""
    arms = _chosen(plan.arms)
    environment_before = environment(device)
    steps, checked = _check_arms(plan, arms, device)
    for status in ("skipped", "wrong"):
        names = [name for name, told in checked.items() if told["status"] == status]
        if names:
            _tell(f"{status}: {', '.join(names)}")
    sizes = [_measure_size(plan, arms, steps, device, positions) for positions in (plan.positions, *plan.sweep)]
    bandwidth = _bandwidth(plan, device)
    run = {name: value for name, value in asdict(plan).items() if name not in ("arms", "output")}
    results = {arm.name: {**checked[arm.name], **sizes[0]["results"].get(arm.name, {})} for arm in arms}
    verdicts = targets.judge(targets.all_targets(plan.k_percent), run, results, bandwidth)
    return {
        "command": command,
        "run": run,
        "environment": environment_before,
        "arms": [
            {"name": arm.name, "title": arm.title, "task": arm.task, "ours": arm.ours, **checked[arm.name]}
            for arm in arms
        ],
        "sizes": sorted(sizes, key=lambda size: size["positions"]),
        "bandwidth": bandwidth,
        "targets": [
            {
                **asdict(verdict.target),
                "limit_text": verdict.target.limit_text(),
                "value": verdict.value,
                "verdict": verdict.verdict,
                "reason": verdict.reason,
            }
            for verdict in verdicts
        ],
    }


def run(settings: Settings, program: str) -> int:
    """Measure what was asked, write the files and print.

    Args:
        settings: the request.
        program: how it was started, for the record.

    Returns:
        The exit code: 1 if targets are to be checked and one is missed, else 0.

    Raises:
        UsageError: if what was asked cannot be done.
    """
    device = _device(settings.device)
    planned = plan(settings, device.type)
    _chosen(planned.arms)  # a wrong name is said before anything is written
    report.make_folder(planned.output)
    with _threads(planned.threads):
        document = measure(planned, f"{program} {settings.arguments()}".strip(), device)
    report.write(document, planned.output)
    report.tell(document, planned.output, as_json=settings.json)
    missed = any(target["verdict"] == "missed" for target in document["targets"])
    return 1 if settings.check and missed else 0
