"""What one rank measures: the training loop's own step, first as it is, then with its parts timed."""

import importlib.metadata
import os
import statistics
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmtp_ds import distributed, engine
from wmtp_ds.bench import materialised
from wmtp_ds.bench.memory import PeakMemory
from wmtp_ds.bench.operations import Trains, Work, mfu, needed, nominal, peak_of
from wmtp_ds.bench.scores import Scores, made_up_losses
from wmtp_ds.bench.settings import CONFIG_FILE, MATERIALISED, StepSettings
from wmtp_ds.bench.sizes import REFERENCES, SIZES
from wmtp_ds.bench.timeline import (
    BACKWARD,
    COMMUNICATION,
    COUNTS,
    DATA,
    FORWARD,
    HEADS,
    LOSS,
    OPTIMIZER,
    PARTS,
    PHASES,
    REFERENCE,
    REST,
    TRACKING,
    TRUNK,
    VALUE_HEAD,
    Place,
    Timeline,
)
from wmtp_ds.config import RunConfig, load_config
from wmtp_ds.data.batches import Batch
from wmtp_ds.engine import Engine, FrozenEngine
from wmtp_ds.metrics import WindowMetrics
from wmtp_ds.models.loading import Sharding, Whole, build_policy, check_architecture
from wmtp_ds.models.mtp import MTPLlamaForCausalLM
from wmtp_ds.run_data import open_data, world_size_from_launcher
from wmtp_ds.run_folder import RunFolder, is_main_process
from wmtp_ds.stages.base import StageModel, make_stage
from wmtp_ds.train import Training

# Side of the matrices whose product tells a CPU's peak: large enough to be at it, small enough for a second.
_PEAK_SIDE = 2048


def random_policy(
    folder: Path, *, sharding: Sharding | None = None, n_future_tokens: int | None = None
) -> MTPLlamaForCausalLM:
    """A policy of a folder's config.json with random weights: matrices of deviation 0.02, vectors 1.

    Args: as ``models.loading.load_policy``.
    """
    sharding = sharding or Whole()
    model = build_policy(check_architecture(folder, n_future_tokens), sharding=sharding)
    for parameter in model.parameters():
        with sharding.gathered(parameter, modify=True), torch.no_grad():
            if sharding.is_main:
                _ = parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


def measure(workspace: Path) -> dict[str, Any]:
    """Measure the step that a workspace describes; every rank calls this, and gets the same figures.

    Raises:
        UserError: if the config is wrong. RunError: if the ranks cannot meet.
    """
    settings = StepSettings.read(workspace)
    resolved = load_config(workspace / CONFIG_FILE, checks=False, environ={})
    data = open_data(resolved, world_size_from_launcher())
    if settings.only_scores:
        data.collator.reference = made_up_losses
    folder = RunFolder(Path(resolved.config.checkpoint.save_dir), "never")
    if is_main_process():
        folder.lock()
    device = engine.start(settings.device)
    peak, origin = _peak(settings, resolved.config.models.policy.dtype, device)
    training = Training(resolved, data, folder, device, None, load=random_policy)
    if settings.logits == MATERIALISED:
        materialised.install(training.engine.module)
    training.start("bench")
    try:
        figures = _Measurement(settings, training, device).run()
    finally:
        training.close("FINISHED")
        folder.close()
    rates = _rates(settings, resolved.config, figures, peak)
    surroundings = _surroundings(settings, resolved.config, device)
    return asdict(settings) | figures | rates | {"peak_tflops_origin": origin} | surroundings


class _Measurement:
    """The passes over the same steps: with a clock around them, and with the parts timed."""

    def __init__(self, settings: StepSettings, training: Training, device: torch.device):
        self._settings, self._training, self._device = settings, training, device
        self._memory = PeakMemory(device)

    def run(self) -> dict[str, Any]:
        settings = self._settings
        with closing(self._windows(0)) as windows:
            for window in islice(windows, settings.warmup):
                self._training.take_step(window)
            self._memory.start()
            seconds, work = self._time(islice(windows, settings.steps))
            held = self._memory.stop()
        # Of several ranks the slowest counts, and the one that needs the most memory; parts are means over ranks.
        largest = distributed.max_over_ranks(self._vector([statistics.median(seconds), *held.values()])).tolist()
        step, memory = largest[0], dict(zip(held, largest[1:], strict=True))
        figures = {"step_seconds": step, "step_seconds_each": seconds, "work": asdict(work), "memory": memory}
        compared = Scores(self._training) if settings.compare_scores else None
        if compared is not None:
            compared.interleave(settings.warmup, settings.steps)
        if settings.divide:
            figures |= self._parts(step)
        return figures if compared is None else figures | {"scores": compared.figures()}

    def _parts(self, step: float) -> dict[str, Any]:
        """The second pass: each part's share, applied to a step's seconds of the first."""
        places = self._divide()
        instrumented = sum(places.values())
        shares = self._means({place: took / instrumented for place, took in places.items()})
        return {
            "instrumented_step_seconds": instrumented / self._settings.steps,
            "parts": [
                {"phase": place.phase, "part": place.part, "share": share, "seconds": share * step}
                for place, share in shares.items()
            ],
        }

    def _windows(self, start: int) -> Generator[list[Batch], None, None]:
        return self._training.data.windows(start, distributed.rank(), distributed.world_size())

    def _time(self, windows: Iterator[list[Batch]]) -> tuple[list[float], Work]:
        """Seconds of each step from its wait for data to its log line, and the work of a mean step's global batch."""
        settings, seconds = self._settings, []
        work = torch.zeros(len(Work.__dataclass_fields__), dtype=torch.float64)
        self._synchronize()
        while True:
            began = time.perf_counter()
            window = next(windows, None)
            if window is None:
                break
            self._training.take_step(window)
            self._synchronize()
            seconds.append(time.perf_counter() - began)
            work += sum(self._work(batch) for batch in window)
        return seconds, Work(*(distributed.sum_over_ranks(work.to(self._device)) / settings.steps).tolist())

    def _work(self, batch: Batch) -> Tensor:
        """What a micro-batch adds to a step's :class:`Work`."""
        module: StageModel = self._training.engine.module
        counts = module.stage.counts(batch, module.n)
        lengths = batch.by_sequence(batch.segment_ids > 0).sum(1).double()
        rows, width = batch.input_ids.shape
        return torch.stack(
            [
                lengths.sum(),
                (lengths * (lengths + 1) / 2).sum(),
                torch.tensor(float(batch.input_ids.numel())),
                torch.tensor(float(rows * width**2)),
                counts.supervised_n.sum(),
                counts.targets_n.sum(),
                counts.supervised_n[0],
            ]
        ).double()

    def _divide(self) -> dict[Place, float]:
        """Seconds of each part of the same steps."""
        settings = self._settings
        timeline = Timeline(self._device)
        _instrument(self._training, timeline)
        with closing(self._windows(settings.warmup - 1)) as windows:
            self._training.take_step(next(windows))  # meanwhile the data that follow are read
            timeline.begin()
            for _ in range(settings.steps):
                with timeline.part(DATA):
                    window = next(windows)
                self._training.take_step(window)
            return timeline.end()

    def _vector(self, values: Sequence[float]) -> Tensor:
        """On the device, where ranks exchange it."""
        return torch.tensor(values, dtype=torch.float64).to(self._device)

    def _means(self, shares: dict[Place, float]) -> dict[Place, float]:
        """Each place's mean share over the ranks, of which one may know places that another does not."""
        places = [Place(phase, part) for phase in PHASES for part in PARTS]
        sums = distributed.sum_over_ranks(self._vector([shares.get(place, 0.0) for place in places]))
        means = (sums / distributed.world_size()).tolist()
        return {place: share for place, share in zip(places, means, strict=True) if share}

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _instrument(training: Training, timeline: Timeline) -> None:
    """Let the parts of the step be timed, from now on and for the rest of this process."""
    timeline.wrap(Batch, "to", DATA)
    timeline.wrap(training, "count", COUNTS)
    timeline.wrap(WindowMetrics, "add", COUNTS)
    timeline.wrap(WindowMetrics, "reduce", COUNTS)
    timeline.wrap(training.display, "step", TRACKING)
    if training.tracker is not None:
        timeline.wrap(training.tracker, "log", TRACKING)
    timeline.wrap(Engine, "__call__", REST, FORWARD)
    timeline.wrap(Engine, "backward", REST, BACKWARD)
    timeline.wrap(Engine, "step", REST, OPTIMIZER)
    timeline.wrap(FrozenEngine, "__call__", REST, REFERENCE)
    model: StageModel = training.engine.module
    timeline.wrap(model.policy, "trunk", TRUNK)
    timeline.wrap(model.policy, "head_states", HEADS)
    timeline.wrap(model.policy.lm_head, "forward", LOSS)
    if model.value_head is not None:
        timeline.wrap(model.value_head, "forward", VALUE_HEAD)
    reference = [] if training.reference is None else training.reference.communication()
    for owner, method in (*training.engine.communication(), *reference):
        timeline.wrap(owner, method, COMMUNICATION)


def _peak(settings: StepSettings, dtype: str, device: torch.device) -> tuple[float | None, str]:
    """TFLOP/s of one rank's device, and where the figure is from; None if it is not known."""
    if settings.peak_tflops is not None:
        return settings.peak_tflops, "--peak-tflops"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = peak_of(name, dtype)
        return peak, f"data sheet of {name}" if peak else f"{name} is not in the table: give --peak-tflops"
    # Ranks on one CPU share its cores, so they measure together.
    distributed.barrier()
    measured = torch.tensor(_matmul_tflops(getattr(torch, dtype)))
    mean = distributed.sum_over_ranks(measured).item() / distributed.world_size()
    return mean, f"measured: a product of two {_PEAK_SIDE} x {_PEAK_SIDE} {dtype} matrices in the same process"


def _matmul_tflops(dtype: torch.dtype) -> float:
    first = torch.randn(_PEAK_SIDE, _PEAK_SIDE).to(dtype)
    second = torch.randn(_PEAK_SIDE, _PEAK_SIDE).to(dtype)
    result = first @ second
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(first, second, out=result)
        best = min(best, time.perf_counter() - began)
    return 2 * _PEAK_SIDE**3 / best / 1e12


def _surroundings(settings: StepSettings, config: RunConfig, device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the settings."""
    training = config.training
    return {
        "dtype": config.models.policy.dtype,
        "batch_size": training.batch_size,
        "accumulation": training.gradient_accumulation_steps,
        "gradient_checkpointing": training.gradient_checkpointing,
        "parameters": SIZES[settings.size].parameters,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")},
    }


def _rates(settings: StepSettings, config: RunConfig, figures: dict[str, Any], peak: float | None) -> dict[str, Any]:
    """Tokens per second, operations and MFU."""
    work, seconds = Work(**figures["work"]), figures["step_seconds"]
    training = config.training
    trains = Trains(
        policy=make_stage(settings.stage, training).trains_policy,
        value_head=config.value_head.type if training.has_value_head else None,
        reference=REFERENCES[settings.size] if training.needs_reference else None,
    )
    shape = SIZES[settings.size]
    counts = {"needed": needed(shape, trains, work), "nominal": nominal(shape, trains, work)}
    rates: dict[str, Any] = {
        "tokens_per_second": work.tokens / seconds,
        "operations": {kind: asdict(count) | {"total": count.total} for kind, count in counts.items()},
        "peak_tflops": peak,
    }
    for kind, name in (("needed", "mfu"), ("nominal", "nominal_mfu")):
        rates[name] = None if peak is None else mfu(counts[kind].total, seconds, settings.ranks, peak)
    return rates
