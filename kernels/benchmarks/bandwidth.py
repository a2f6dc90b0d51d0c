"""The kernel of the TD weights alone, against a copy of as many bytes: memory alone should bound it."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wmtp_kernels import TDWeights, decision_weights

from . import oracle
from .inputs import BETA, WEIGHT_MAX, WEIGHT_MIN
from .measure import Reading, interleaved

COPY = "copy"
# name -> λ: δ alone, and GAE, which needs every later position of the sequence.
KERNELS = {"td-weights": 0.0, "gae-weights": 0.95}

# A call takes a fraction of a millisecond on a GPU: several in a row keep it busy while the host issues the next.
_REPEATS = {"cuda": 20, "cpu": 1}
_SETS = 3  # rotated: none is still in a cache when its turn comes
_LENGTH = 2048
# Values in, δ and weights out, in float32, and the mask.
_BYTES_PER_POSITION = 4 + 4 + 4 + 1


@dataclass(frozen=True)
class Bandwidth:
    """What was measured.

    Attributes:
        bytes: moved by one call.
        status: "measured" or "wrong".
        reason: why nothing was measured.
        readings: of each kernel and of the copy.
    """

    bytes: int
    status: str
    reason: str = ""
    readings: dict[str, list[Reading]] = field(default_factory=dict)


def _kernel_calls(sets: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Callable[[int], object]]:
    def of(td_lambda: float) -> Callable[[int], object]:
        made = [
            TDWeights(*tensors, beta=BETA, min_weight=WEIGHT_MIN, max_weight=WEIGHT_MAX, td_lambda=td_lambda)
            for tensors in sets
        ]
        return lambda number: decision_weights(made[number % len(made)])

    return {name: of(td_lambda) for name, td_lambda in KERNELS.items()}


def _copy_call(bytes_moved: int, device: torch.device) -> Callable[[int], object]:
    """Half of the bytes are read and half are written."""
    half = bytes_moved // 2
    pairs = [torch.randint(0, 256, (2, half), dtype=torch.uint8, device=device).unbind() for _ in range(_SETS)]
    return lambda number: pairs[number % _SETS][0].copy_(pairs[number % _SETS][1])


def _wrong(kernels: dict[str, Callable[[int], object]], values_BS: Tensor, rewards_B: Tensor) -> str:
    """What is wrong with the weights of the first set, or ""."""
    for name, td_lambda in KERNELS.items():
        found = kernels[name](0)
        assert isinstance(found, tuple)
        truth_BS = oracle.td_weights(values_BS.double(), rewards_B.double(), BETA, WEIGHT_MIN, WEIGHT_MAX, td_lambda)
        if not torch.allclose(found[1].double(), truth_BS, rtol=1e-3, atol=1e-6):
            return f"wrong result of {name}"
    return ""


def measure_bandwidth(positions: int, device: torch.device, rounds: int, seed: int) -> Bandwidth:
    """Time the kernels and a copy that moves as many bytes, interleaved."""
    length = min(_LENGTH, positions)
    random = torch.Generator(device).manual_seed(seed)
    shape = (positions // length, length)
    sets = []
    for _ in range(_SETS):
        values_BS = torch.randn(shape, generator=random, device=device).sigmoid_()
        rewards_B = (torch.randn(shape[0], generator=random, device=device) > 0).float()
        sets.append((values_BS, rewards_B, torch.ones(shape, dtype=torch.bool, device=device)))
    bytes_moved = values_BS.numel() * _BYTES_PER_POSITION + rewards_B.numel() * 4
    kernels = _kernel_calls(sets)
    wrong = _wrong(kernels, *sets[0][:2])
    if wrong:
        return Bandwidth(bytes_moved, "wrong", wrong)
    calls = {COPY: _copy_call(bytes_moved, device), **kernels}
    for call in calls.values():
        for number in range(_SETS):
            call(number)
    counted = {name: _count_up(call) for name, call in calls.items()}
    readings = interleaved(counted, device, rounds, seed, _REPEATS[device.type])
    return Bandwidth(bytes_moved, "measured", readings=readings)


def _count_up(call: Callable[[int], object]) -> Callable[[int], object]:
    """The same call, with the next number each time: repeats take the next set, too."""
    numbers = itertools.count()
    return lambda _: call(next(numbers))
