"""Out of memory, said in the numbers of ``wmtp-ds plan`` and in settings that would help."""

import re
from dataclasses import replace

import torch

from wmtp_ds.config import Resolved
from wmtp_ds.errors import UserError
from wmtp_ds.plan import machine
from wmtp_ds.plan.plan import GIB, Fit, Plan
from wmtp_ds.plan.reading import Sizes, kernels_on, read_setup
from wmtp_ds.plan.setup import Setup

_SETTINGS = 3
_OFFLOAD = {"optimizer and parameter offload": 'deepspeed.config = "ds_configs/zero3_offload.json"'}
_SAID = re.compile(r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None


def explain(error: BaseException, resolved: Resolved, device: str, ranks: int) -> str:
    """What was tried, what the config takes by plan, and single changes that make it smaller.

    Args:
        error: of the allocation.
        resolved: the run's config.
        device: "cuda" or "cpu".
        ranks: of the run.
    """
    said = ". ".join(" ".join(str(error).split()).split(". ")[:2])[:200].rstrip(".") or type(error).__name__
    text = f"out of memory on the {'GPU' if device == 'cuda' else 'CPU'}: {said}."
    try:
        setup = read_setup(resolved, ranks=ranks, device=device, sizes=Sizes(), kernels=kernels_on(device)).setup
    except UserError as unknown:
        return f"{text} What the config takes cannot be planned: {unknown}"
    capacity = _capacity(device, ranks)
    fit = Plan(setup, capacity).configured
    parts = sorted(fit.peak.bytes.items(), key=lambda part: -part[1])[:4]
    lines = [
        text,
        f"wmtp-ds plan: {fit.total / GIB:.1f} GiB on each rank at the peak ({fit.peak.name}) of {capacity / GIB:.1f}; "
        f"most of it {', '.join(f'{name} {size / GIB:.1f}' for name, size in parts)}.",
    ]
    lines.append("Change one of these, or several (GiB on each rank then, at most):")
    lines += [f"  {setting}  ({size / GIB:.1f})" for setting, size in _settings(setup, capacity, fit.total)]
    return "\n".join(lines)


def _settings(setup: Setup, capacity: int, total: int) -> list[tuple[str, int]]:
    """Three settings that make it smaller, and what it takes then."""
    # Whatever the plan says, it does not fit.
    ways = [(way.label, way.fit.total) for way in Plan(setup, min(capacity, total - 1)).advice()]
    # Single settings only; and ranks on one CPU share its memory: more of them need more.
    alone = ("all of these", "the same", "optimizer offload", *(["--num_gpus"] if setup.device == "cpu" else []))
    found = [(_OFFLOAD.get(label, label), size) for label, size in ways if not label.startswith(alone)]
    shorter = max(setup.length // 2, 1)
    found.insert(_SETTINGS - 1, (f"dataset.max_length = {shorter}", Fit(replace(setup, length=shorter)).total))
    return found[:_SETTINGS]


def _capacity(device: str, ranks: int) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    return machine.memory() // ranks
