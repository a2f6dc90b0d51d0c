"""A plan: what a setup takes on each device with and without offload, whether it fits, and what to change if not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from wmtp_ds.plan.setup import Setup
from wmtp_ds.plan.step import Moment, Step

GIB = 2**30

# Beside the tensors. Of a GPU none of it is measured by this project: the context with its kernels (0.5 to 0.6 GiB on
# an H100), the buffers of one NCCL communicator, cuBLAS's workspaces, and what the caching allocator cannot use of what
# it holds, as a share of the tensors.
CUDA_CONTEXT, NCCL, CUBLAS, FRAGMENTATION = 600 * 2**20, 600 * 2**20, 64 * 2**20, 0.05
# Of a CPU rank: the resident memory of Python, torch, DeepSpeed and transformers with an engine of no size.
CPU_RANK = 700 * 2**20
_MOST_RANKS = 1024


@dataclass(frozen=True)
class Fit:
    """One setup and what it takes on each of ``setup.ranks`` devices."""

    setup: Setup

    @cached_property
    def _step(self) -> Step:
        return Step(self.setup)

    @cached_property
    def moments(self) -> list[Moment]:
        """What is held at each moment."""
        return self._step.moments()

    @property
    def peak(self) -> Moment:
        """The moment at which most is held."""
        return max(self.moments, key=lambda moment: moment.total)

    def overhead(self, moment: Moment) -> int:
        """Bytes beside the tensors at a moment."""
        if self.setup.device == "cpu":
            return CPU_RANK
        return CUDA_CONTEXT + CUBLAS + (NCCL if self.setup.ranks > 1 else 0) + round(FRAGMENTATION * moment.total)

    @property
    def total(self) -> int:
        """Bytes on a device, at most."""
        return self.peak.total + self.overhead(self.peak)

    @property
    def host(self) -> int:
        """Bytes of offloaded states in the machine's memory, of all ranks together."""
        return sum(self._step.host.values()) * self.setup.ranks

    @property
    def host_parts(self) -> dict[str, int]:
        """The same by what it is."""
        return {name: nbytes * self.setup.ranks for name, nbytes in self._step.host.items() if nbytes}

    def fits(self, capacity: int) -> bool:
        """Whether a device of so many bytes is enough."""
        return self.total <= capacity


@dataclass(frozen=True)
class Variant:
    """A way to run, in words, and what it takes."""

    label: str
    fit: Fit
    is_configured: bool = False


@dataclass(frozen=True)
class Plan:
    """What a config takes, on devices of ``capacity`` bytes."""

    setup: Setup
    capacity: int

    @cached_property
    def configured(self) -> Fit:
        """The setup as it is."""
        return Fit(self.setup)

    @property
    def fits(self) -> bool:
        """Whether it does as it is."""
        return self.configured.fits(self.capacity)

    @cached_property
    def variants(self) -> list[Variant]:
        """Without offload, with the optimizer's states in host memory, and with the parameters there as well.

        On a CPU there is one memory, and nothing to offload to.
        """
        zero = self.setup.zero
        now = (zero.offload_optimizer, zero.offload_parameters)
        if self.setup.device == "cpu":
            return [Variant("as configured", self.configured, is_configured=True)]
        ways = {
            (False, False): "no offload",
            (True, False): "optimizer offload",
            (True, True): "optimizer and parameter offload",
        }
        ways.setdefault(now, "parameter offload")
        return [
            Variant(label, Fit(self.setup.offloaded(optimizer=way[0], parameters=way[1])), is_configured=way == now)
            for way, label in ways.items()
        ]

    def advice(self) -> list[Variant]:
        """Single changes that make it smaller, each with what it takes, and all of them together; none if it fits."""
        return [] if self.fits else list(self._advice())

    def _advice(self) -> Iterator[Variant]:
        setup, zero = self.setup, self.setup.zero
        if not setup.checkpointing:
            yield Variant("training.gradient_checkpointing = true", Fit(replace(setup, checkpointing=True)))
        if setup.batch > 1:
            batch = self._smaller_batch()
            accumulation = -(-setup.accumulation * setup.batch // batch)
            label = f"training.batch_size = {batch}, training.gradient_accumulation_steps = {accumulation}"
            yield Variant(label, Fit(replace(setup, batch=batch, accumulation=accumulation)))
        if not zero.offload_optimizer and setup.device != "cpu":
            yield Variant("optimizer offload", Fit(setup.offloaded(optimizer=True, parameters=zero.offload_parameters)))
        if not zero.offload_parameters and setup.device != "cpu":
            yield Variant("optimizer and parameter offload", Fit(setup.offloaded(optimizer=True, parameters=True)))
        ranks = self._more_ranks(setup)
        yield Variant(f"--num_gpus {ranks}", Fit(replace(setup, ranks=ranks)))
        least = replace(setup, checkpointing=True, batch=1, accumulation=setup.accumulation * setup.batch)
        if setup.device != "cpu":
            least = least.offloaded(optimizer=True, parameters=True)
        yield Variant("all of these but the ranks, with training.batch_size = 1", Fit(least))
        if not Fit(least).fits(self.capacity):
            ranks = self._more_ranks(least)
            yield Variant(f"the same with --num_gpus {ranks}", Fit(replace(least, ranks=ranks)))

    def _smaller_batch(self) -> int:
        """The largest of the halves that fits, or 1."""
        batch = self.setup.batch // 2
        while batch > 1 and not Fit(replace(self.setup, batch=batch)).fits(self.capacity):
            batch //= 2
        return batch

    def _more_ranks(self, setup: Setup) -> int:
        """The smallest of the doubles that fits; where none does, eight times as many: nothing is gained beyond."""
        ranks = setup.ranks * 2
        while ranks < _MOST_RANKS and not Fit(replace(setup, ranks=ranks)).fits(self.capacity):
            ranks *= 2
        return ranks if ranks < _MOST_RANKS else setup.ranks * 8
