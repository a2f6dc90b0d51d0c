"""The true peak of a training step's tensors, in bytes: what tests and docs/memory.md hold the plan against.

    python tests/plan/measured_step.py --stage rho1 --size 160m --ranks 2 [--set KEY=VALUE ...]

It runs the training loop's own step in ranks, through the launcher, on random weights and made-up data
(``wmtp_ds.bench`` makes both). On a CPU the tensors that are there between two steps are added up, and torch's profiler
counts every allocation and release from then on; on a GPU the allocator's own peak is read. Resident memory is what
``wmtp-ds bench step`` reports.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from wmtp_ds.bench.settings import CONFIG_FILE, RESULT_FILE, StepSettings
from wmtp_ds.bench.workspace import resolve, write_workspace
from wmtp_ds.config import Resolved
from wmtp_ds.launch import Place, launch_environment, ranks_command, run_ranks
from wmtp_ds.plan.reading import Sizes, kernels_on, read_setup
from wmtp_ds.plan.step import Step

WARMUP, STEPS, TRIES = 2, 2, 3
PHASES = ("reference", "forward", "backward", "optimizer")


def measure(
    stage: str, size: str, ranks: int, length: int, overrides: list[str], device: str = "cpu"
) -> dict[str, Any]:
    """Peak bytes of tensors on the rank that needs most, over all of a step and of each of its phases.

    Also "planned": what the plan says of the same config, by moment; and "unseen": bytes of which it is not known when
    they were released, less than 1 % of the peak. A measurement with more is repeated.

    Raises:
        SystemExit: if the ranks failed, or much goes unseen each time.
    """
    settings = StepSettings(stage, size, device, ranks, length, STEPS, WARMUP, "sdpa")
    for _ in range(TRIES):
        found = _measure(settings, overrides)
        if found.get("unseen", 0) < 0.01 * found["peak"]:
            return found
    raise SystemExit(f"{found['unseen'] / 2**20:.0f} MiB were released unseen, {TRIES} times")


def _measure(settings: StepSettings, overrides: list[str]) -> dict[str, Any]:
    device, ranks = settings.device, settings.ranks
    with tempfile.TemporaryDirectory(prefix="wmtp-plan-") as temporary:
        folder = Path(temporary)
        dtypes = _in_float32(settings.stage) if device == "cpu" else []
        resolved = resolve(settings, folder, [], [*dtypes, *overrides])
        write_workspace(folder, resolved, settings)
        environment = launch_environment(device, os.environ)
        environment["PYTHONPATH"] = str(Path(__file__).parent)
        command = ranks_command(list(range(ranks)), Path(__file__).stem, [str(folder)])
        code = run_ranks(command, environment, stdout=sys.__stderr__)
        if code:
            raise SystemExit(code)
        found: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text())
        return found | {"planned": planned(resolved, ranks, device)}


def planned(resolved: Resolved, ranks: int, device: str) -> dict[str, int]:
    """Bytes of tensors at each moment, of a config whose models' config.json are there."""
    reading = read_setup(resolved, ranks=ranks, device=device, sizes=Sizes(), kernels=kernels_on(device))
    return {moment.name: moment.total for moment in Step(reading.setup).moments()}


def _in_float32(stage: str) -> list[str]:
    models = ("policy", "reference") if stage == "rho1" else ("policy",)
    return [f'models.{model}.dtype="float32"' for model in models]


def rank(folder: Path) -> None:
    """One rank's measurement; rank 0 writes the largest of all ranks."""
    from wmtp_ds.rank import enter_rank

    settings, place = StepSettings.read(folder), Place.of(os.environ)
    assert place is not None
    enter_rank(settings.device, place, "warning")
    import torch

    from wmtp_ds import distributed, engine
    from wmtp_ds.bench.measure import random_policy
    from wmtp_ds.config import load_config
    from wmtp_ds.engine import Engine, FrozenEngine
    from wmtp_ds.run_data import open_data, world_size_from_launcher
    from wmtp_ds.run_folder import RunFolder
    from wmtp_ds.train import Training

    resolved = load_config(folder / CONFIG_FILE, checks=False, environ={})
    data = open_data(resolved, world_size_from_launcher())
    device = engine.start(settings.device)
    # Garbage is collected by whichever thread comes by, and what others than this one free goes unseen.
    gc.disable()
    recorder = _OnGPU(device) if settings.device == "cuda" else _OnCPU()
    places = ((FrozenEngine, "__call__"), (Engine, "__call__"), (Engine, "backward"), (Engine, "step"))
    for phase, (owner, method) in zip(PHASES, places, strict=True):
        setattr(owner, method, recorder.wrap(getattr(owner, method), phase))
    run_folder = RunFolder(Path(resolved.config.checkpoint.save_dir), "never")
    if place.rank == 0:
        run_folder.lock()
    training = Training(resolved, data, run_folder, device, None, load=random_policy)
    training.start("measure")
    with closing(training.data.windows(0, distributed.rank(), distributed.world_size())) as windows:
        for number, window in enumerate(islice(windows, WARMUP + STEPS)):
            if number == WARMUP:
                recorder.begin()
            training.take_step(window)
            gc.collect()
        peaks = recorder.end()
    names = sorted(peaks)
    largest = distributed.max_over_ranks(torch.tensor([float(peaks[name]) for name in names]).to(device)).tolist()
    training.close("FINISHED")
    if place.rank == 0:
        (folder / RESULT_FILE).write_text(json.dumps(dict(zip(names, largest, strict=True))))
    distributed.close()


class _OnGPU:
    """The allocator's peak, of which there is one for the whole stretch."""

    def __init__(self, device: Any):
        self._device = device

    def wrap(self, function: Any, phase: str) -> Any:
        return function

    def begin(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats(self._device)
        self._rest = torch.cuda.memory_allocated(self._device)

    def end(self) -> dict[str, float]:
        import torch

        return {"peak": torch.cuda.max_memory_allocated(self._device), "at_rest": self._rest}


class _OnCPU:
    """What is held when the stretch begins, and every allocation and release in it."""

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._held: dict[int, int] = {}

    def wrap(self, function: Any, phase: str) -> Any:
        from torch.profiler import record_function

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"phase:{phase}"):
                return function(*args, **kwargs)

        return wrapper

    def begin(self) -> None:
        self._held = _tensors()
        self._profile.start()

    def end(self) -> dict[str, float]:
        self._profile.stop()
        left = sum(_tensors().values())
        allocations: list[tuple[int, int, int]] = []
        spans: list[tuple[str, int, int]] = []
        pending = list(self._profile.profiler.kineto_results.experimental_event_tree())
        while pending:
            node = pending.pop()
            pending += node.children
            if node.name.startswith("phase:"):
                spans.append((node.name.removeprefix("phase:"), node.start_time_ns, node.end_time_ns))
            elif node.name == "[memory]":  # negative if freed
                allocations.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
        allocations.sort()
        alive = self._held
        held = sum(alive.values())
        peaks = {"at_rest": float(held), "peak": float(held)} | dict.fromkeys(PHASES, 0.0)
        for moment, address, size in allocations:
            held -= alive.pop(address, 0)
            if size > 0:
                alive[address] = size
                held += size
            peaks["peak"] = max(peaks["peak"], held)
            for name, start, end in spans:
                if start <= moment <= end and name in PHASES:
                    peaks[name] = max(peaks[name], held)
        # What a thread of a collective frees, the profiler does not see.
        return peaks | {"unseen": abs(held - left)}


def _tensors() -> dict[int, int]:
    """Address and bytes of every tensor's storage."""
    import torch

    tensors = (found for found in gc.get_objects() if issubclass(type(found), torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def main() -> None:
    """Measure, and print bytes beside the plan's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", required=True)
    parser.add_argument("--size", default="micro")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    typed = parser.parse_args()
    found = measure(typed.stage, typed.size, typed.ranks, typed.length, typed.set, typed.device)
    said = found.pop("planned")
    for name, figures in (("measured", found), ("planned", said)):
        print(f"MiB {name}:", json.dumps({key: round(value / 2**20, 1) for key, value in figures.items()}))
    print(f"planned / measured: {max(said.values()) / found['peak']:.3f}")


if __name__ == "__main__":
    if "RANK" in os.environ:
        rank(Path(sys.argv[-1]))
    else:
        main()
