"""Time and memory of one call, and of many calls interleaved."""

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Reading:
    """One call: seconds on the wall (a GPU's own clock on a GPU), and of the process on all CPU threads."""

    wall: float
    cpu: float | None = None


@dataclass(frozen=True)
class Spread:
    """Of several numbers."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, least and greatest."""
    return Spread(statistics.median(values), min(values), max(values))


def timed(call: Callable[[], object], device: torch.device, repeats: int = 1) -> Reading:
    """Time one call; of ``repeats`` in a row, the mean.

    On a GPU, between two CUDA events and with nothing else in flight: what the host makes the GPU wait for counts.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return Reading(start.elapsed_time(end) / 1000 / repeats)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    return Reading((time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats)


def interleaved(
    calls: Mapping[str, Callable[[int], object]],
    device: torch.device,
    rounds: int,
    seed: int,
    repeats: int = 1,
    before: Callable[[], object] = lambda: None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, list[Reading]]:
    """Time every call once in each round, in a new random order each time.

    What slows the machine down for a while slows all of them, so ratios of one round mean more than times do.

    Args:
        calls: name -> what to time; it is given the number of the round.
        device: where it runs.
        rounds: how many.
        seed: of the order.
        repeats: calls in a row that make up one reading.
        before: called before each reading, outside of it.
        progress: told after each round.

    Returns:
        name -> a reading of each round, in order of the rounds.
    """
    order = random.Random(seed)
    readings: dict[str, list[Reading]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            before()
            readings[name].append(timed(partial(calls[name], number), device, repeats))
        progress(f"round {number + 1} of {rounds}")
    return readings


def ratios(numerator: Sequence[Reading], denominator: Sequence[Reading], clock: str) -> list[float]:
    """Of each round: one arm's time over another's."""
    return [getattr(a, clock) / getattr(b, clock) for a, b in zip(numerator, denominator, strict=True)]


def _status(key: str) -> int:
    """A figure of ``/proc/self/status`` in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def memory_unmeasurable(device: torch.device) -> str | None:
    """Why peak memory cannot be measured here, or None."""
    if device.type == "cuda":
        return None
    try:
        _RESET.write_text("5")
        _status("VmHWM")
    except (OSError, StopIteration):
        return "peak memory of a CPU process can be measured on Linux alone"
    return None


def extra_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes by which memory in use rises above where it stands, at the worst moment of a call.

    On a GPU, what torch has allocated; on a CPU, the high-water mark of the process's resident pages, which is reset
    before, after all that is free has been given back to the system.
    """
    gc.collect()
    collects = gc.isenabled()
    gc.disable()  # what would be freed in the middle of the call would hide as much of what the call takes
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            call()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        _RESET.write_text("5")
        before = _status("VmHWM")
        call()
        return _status("VmHWM") - before
    finally:
        if collects:
            gc.enable()
