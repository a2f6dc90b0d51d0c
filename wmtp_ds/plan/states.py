"""Model states under ZeRO-3: what is there between two steps (Rajbhandari et al. 2020, section 3)."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from wmtp_ds.plan.setup import Frozen, Setup
from wmtp_ds.plan.shape import ModelShape

FLOAT = 4


def parameters_of(shape: ModelShape) -> Iterable[int]:
    """Elements of every parameter."""
    yield shape.embedding
    for _ in range(shape.trunk_blocks + shape.n_future_tokens):
        for module in shape.block_modules:
            yield from module
    yield shape.hidden_size
    if not shape.tied:
        yield shape.embedding


def partition(parameters: Iterable[int], ranks: int) -> int:
    """Elements of a rank's part: each parameter is cut on its own, and padded."""
    return sum(-(-size // ranks) for size in parameters)


@dataclass(frozen=True)
class States:
    """Elements of a rank's partition, and where they lie."""

    setup: Setup

    @property
    def _value_parameters(self) -> list[int]:
        return [size for module in self.setup.value_modules for size in module]

    @cached_property
    def trained_parameters(self) -> list[int]:
        """Elements of each trained parameter."""
        policy = parameters_of(self.setup.policy) if self.setup.trains_policy else ()
        return [*policy, *self._value_parameters]

    @cached_property
    def trained(self) -> int:
        """Elements of a rank's part of what is trained."""
        return partition(self.trained_parameters, self.setup.ranks)

    @property
    def frozen(self) -> int:
        """Elements of a rank's part of a policy that is not trained."""
        return 0 if self.setup.trains_policy else partition(parameters_of(self.setup.policy), self.setup.ranks)

    @property
    def gradient_bytes(self) -> int:
        """Of an accumulated gradient."""
        return self.setup.zero.gradient_bytes or self.setup.b

    @property
    def sub_group(self) -> int:
        """Elements of the largest group that the optimizer steps through at once."""
        largest = max((-(-size // self.setup.ranks) for size in self.trained_parameters), default=0)
        if self.trained <= self.setup.zero.sub_group:
            return self.trained
        return min(self.trained, self.setup.zero.sub_group + largest)

    def at_rest(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes on the device, and in host memory for this rank, by what they are."""
        setup, zero = self.setup, self.setup.zero
        shards = {"parameters": (self.trained + self.frozen) * setup.b}
        optimizer = {
            "gradients": self.trained * self.gradient_bytes,
            "masters": self.trained * FLOAT,
            "moments": self.trained * 2 * FLOAT if setup.adam else 0,
        }
        device: dict[str, int] = {}
        host: dict[str, int] = {}
        if zero.offload_optimizer:
            # Of each gradient there is also a float32 copy there, which the optimizer reads.
            optimizer["gradients"] += self.trained * FLOAT
        (host if zero.offload_parameters else device).update(shards)
        (host if zero.offload_optimizer else device).update(optimizer)
        device["reduce bucket"] = zero.reduce_bucket * setup.b if zero.contiguous else 0
        if setup.device == "cpu":  # where all memory is the host's
            return device | host, {}
        return device, host


def frozen_at_rest(model: Frozen, setup: Setup) -> tuple[int, int]:
    """Bytes of a frozen engine's partition: on the device, and in host memory."""
    nbytes = partition(parameters_of(model.shape), setup.ranks) * model.b
    return (0, nbytes) if model.zero.offload_parameters and setup.device != "cpu" else (nbytes, 0)
