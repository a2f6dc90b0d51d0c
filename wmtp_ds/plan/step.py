"""A training step, walked through: what a rank holds at each moment, and so at the most.

The moments are those where memory peaks: a block's turn in forward and backward, the loss at the end of forward, the
first use of its gradients, the optimizer. States that are always there are in :mod:`wmtp_ds.plan.states`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from wmtp_ds.plan.activations import Activations
from wmtp_ds.plan.gathering import ROOT, Gathering, Module
from wmtp_ds.plan.setup import Frozen, Setup
from wmtp_ds.plan.shape import ModelShape
from wmtp_ds.plan.states import FLOAT, States, frozen_at_rest
from wmtp_ds.plan.workspace import Workspace
from wmtp_ds.plan.zero import ZeroSettings

# What a rank holds, in the order of the report; see docs/memory.md.
COMPONENTS = (
    "parameters",
    "gathered",
    "gradients",
    "masters",
    "moments",
    "reduce bucket",
    "unreduced gradients",
    "optimizer copies",
    "activations",
    "loss workspace",
    "reference",
    "reward model",
)
MOMENTS = ("scoring", "reference", "value pass", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class Moment:
    """Bytes on the device by component, at one moment of a step."""

    name: str
    bytes: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """In all."""
        return sum(self.bytes.values())


def block_visits(name: str, shape: ModelShape, zero: ZeroSettings) -> list[Module]:
    """What a block gathers in forward: all of it, if it is a leaf, or module by module."""
    if zero.block_is_leaf:
        return [Module(name, tuple(size for module in shape.block_modules for size in module), is_leaf=True)]
    return [Module(f"{name}.{index}", module) for index, module in enumerate(shape.block_modules)]


class Step:
    """One step of a setup."""

    def __init__(self, setup: Setup):
        self.setup, self.shape, self.zero = setup, setup.policy, setup.zero
        self.states = States(setup)
        self.activations = Activations(setup.policy, setup.b, setup.packed)
        self.device, self.host = self.states.at_rest()
        if setup.reference:
            self.device["reference"], self.host["reference"] = frozen_at_rest(setup.reference, setup)
        rows = setup.tokens * setup.policy.n_future_tokens
        self.workspace = Workspace(setup.policy, rows, setup.b, setup.device, setup.kernels, setup.selects)

    def moments(self) -> list[Moment]:
        """The largest of each kind, in the order of :data:`MOMENTS`; those that the stage has."""
        largest: dict[str, Moment] = {}
        for moment in self._walk():
            if moment.name not in largest or moment.total > largest[moment.name].total:
                largest[moment.name] = moment
        return [largest[name] for name in MOMENTS if name in largest]

    def _walk(self) -> Iterator[Moment]:
        if self.setup.reward:
            yield Moment("scoring", {"reward model": self._reading(self.setup.reward, learns_logits=False)})
        if self.setup.reference:
            reading = self._reading(self.setup.reference, learns_logits=True)
            at_rest = self.device["reference"]
            yield self._moment("reference", reference=reading - at_rest, gathered=self._persistent())
        if self.setup.needs_window:
            yield from self._value_pass()
        yield from self._policy_pass() if self.setup.trains_policy else self._value_head_pass()
        yield from self._optimizer()

    def _moment(self, name: str, **more: int) -> Moment:
        """What is there at rest and, by component, more."""
        found = dict(self.device)
        for component, nbytes in more.items():
            component = component.replace("_", " ")
            found[component] = found.get(component, 0) + nbytes
        return Moment(name, {component: found[component] for component in COMPONENTS if found.get(component)})

    # --- frozen models ---

    def _reading(self, model: Frozen, *, learns_logits: bool) -> int:
        """A frozen model's partition and its forward pass, at most."""
        setup, shape = self.setup, model.shape
        activations = Activations(shape, model.b, setup.packed)
        last = [Module("norm", (shape.hidden_size,)), Module("unembedding", (shape.embedding,))]
        visits = [ROOT, Module("embedding", (shape.embedding,))]
        for block in range(shape.num_hidden_layers):
            visits += block_visits(f"block {block}", shape, model.zero)
        gathering = self._gathering([*visits, *last], model.zero)
        inside = setup.mask + setup.tokens * (activations.residual + activations.forward_transient)
        most = 0
        for visit in [*visits, *last]:
            most = max(most, gathering.fetch() * model.b + inside)
            if visit.name == "unembedding" and learns_logits:
                work = Workspace(shape, setup.tokens, model.b, setup.device, setup.kernels)
                held = gathering.held * model.b + setup.tokens * activations.residual
                most = max(most, held + work.hidden + work.chunk(learns=False))
            gathering.release(visit)
        return frozen_at_rest(model, setup)[0] + most

    def _gathering(self, visits: list[Module], zero: ZeroSettings) -> Gathering:
        several = self.setup.ranks > 1
        moves = zero.offload_parameters and self.setup.device != "cpu"
        # Where values are computed before every loss, the order of modules changes with each pass.
        traced = not (self.setup.needs_window and self.setup.accumulation == 1)
        return Gathering(zero, visits, copies=several or moves, buffers=several, traced=traced)

    def _persistent(self) -> int:
        return self._gathering(self._forward, self.zero).persistent * self.setup.b

    # --- the policy ---

    @cached_property
    def _trunk(self) -> list[list[Module]]:
        names = [f"trunk {number}" for number in range(self.shape.trunk_blocks)]
        return [block_visits(name, self.shape, self.zero) for name in names]

    @cached_property
    def _heads(self) -> list[list[Module]]:
        names = [f"head {number}" for number in range(self.shape.n_future_tokens)]
        return [block_visits(name, self.shape, self.zero) for name in names]

    @cached_property
    def _values(self) -> list[Module]:
        return [Module(f"value {index}", sizes) for index, sizes in enumerate(self.setup.value_modules)]

    @property
    def _embedding(self) -> Module:
        return Module("embedding", (self.shape.embedding,))

    @property
    def _unembedding(self) -> Module:
        return Module("embedding" if self.shape.tied else "unembedding", (self.shape.embedding,))

    @property
    def _norm(self) -> Module:
        return Module("norm", (self.shape.hidden_size,))

    @cached_property
    def _forward(self) -> list[Module]:
        visits = [ROOT, self._embedding, *(visit for block in self._trunk for visit in block), *self._values]
        for head in self._heads:
            visits += [*head, self._norm]
        return [*visits, self._unembedding]

    def _backward_of(self, block: list[Module]) -> list[Module]:
        """A block's visits in backward; one that is checkpointed runs forward again, module by module."""
        again = block if self.setup.checkpointing and not self.zero.block_is_leaf else []
        return [*again, *reversed(block)]

    def _backward(self) -> list[list[Module]]:
        """Visits of each of: the loss, the heads from the last, the value head, the trunk, the embedding."""
        heads = [[self._norm, *self._backward_of(head)] for head in reversed(self._heads)]
        trunk = [self._backward_of(block) for block in reversed(self._trunk)]
        return [[ROOT, self._unembedding], *heads, list(reversed(self._values)), *trunk, [self._embedding]]

    @cached_property
    def _visits(self) -> list[Module]:
        """Of a step's forward and backward passes."""
        if self.setup.trains_policy:
            return [*self._forward, *(visit for part in self._backward() for visit in part)]
        return [*self._reading_visits, ROOT, *reversed(self._values)]

    @property
    def _reading_visits(self) -> list[Module]:
        """Of the trunk and the value head, forward."""
        return self._forward[: 2 + sum(map(len, self._trunk)) + len(self._values)]

    def _kept(self) -> tuple[int, int, int]:
        """Bytes that a trunk block, a head (with its norm) and the trunk's output keep for backward."""
        a, tokens = self.activations, self.setup.tokens
        norm = a.norm + a.norm_input
        if self.setup.checkpointing:
            return tokens * a.residual, tokens * norm, tokens * a.residual
        # The input of all heads is one tensor, which in float32 each of them keeps.
        return tokens * a.block, tokens * (a.block - a.norm_input + norm), tokens * a.residual

    def _policy_pass(self) -> Iterator[Moment]:
        setup, a, tokens = self.setup, self.activations, self.setup.tokens
        backward = self._backward()
        gathering = self._gathering(self._visits, self.zero)
        trunk_block, head, output = self._kept()
        values = tokens * a.value_head(setup.value_head) if setup.value_head else 0
        if setup.value_head and setup.b != FLOAT:
            values += FLOAT * sum(map(sum, setup.value_modules))  # its weights in float32
        n = self.shape.n_future_tokens
        # Trunk and heads make a mask each.
        kept = 2 * setup.mask + self.shape.trunk_blocks * trunk_block + output + values + n * head

        # Forward. Inside, nothing is larger than what its end holds; but gathering ahead may be.
        inside = tokens * a.forward_transient
        for done in range(len(self._forward)):
            if done:
                gathering.release(self._forward[done - 1])
            so_far = kept * done // len(self._forward)
            yield self._moment("loss", gathered=gathering.fetch() * setup.b, activations=so_far + inside)
        work = self.workspace
        gathered = gathering.held * setup.b
        formed = work.hidden + work.weight_gradient
        yield self._moment(
            "loss", gathered=gathered, activations=kept, loss_workspace=work.hidden + formed + work.chunk(learns=True)
        )
        gathering.release(self._unembedding)

        # Backward.
        unembedding = self.shape.embedding * setup.b
        cast = unembedding if setup.b != FLOAT else 0
        gathering.fetch()  # the root
        most = gathering.fetch() * setup.b
        yield self._moment("backward", gathered=most, activations=kept, loss_workspace=formed + cast)
        gathering.release(self._unembedding)
        pending = unembedding  # gradients that no bucket has taken yet
        trunk_gradient = tokens * a.residual
        heads, rest = backward[1 : 1 + n], backward[1 + n :]
        for part in heads:
            yield from self._block_backward(gathering, part, kept, pending, 2 * trunk_gradient + work.hidden)
            pending, kept = 0, kept - head
        for part, keeps in zip(rest, [values, *[trunk_block] * self.shape.trunk_blocks, output], strict=True):
            if not part:  # there is no value head
                continue
            is_embedding = part == [self._embedding]
            more = unembedding if is_embedding else 0
            yield from self._block_backward(gathering, part, kept, more, 2 * trunk_gradient)
            kept -= keeps
        yield self._moment("optimizer", gathered=gathering.held * setup.b)  # before it releases everything

    def _block_backward(
        self, gathering: Gathering, part: list[Module], kept: int, pending: int, gradients: int
    ) -> Iterator[Moment]:
        """A block's backward pass: its activations (computed again, if checkpointed) and gradients of its weights."""
        setup, a = self.setup, self.activations
        most = 0
        for visit in part:
            most = max(most, gathering.fetch())
            gathering.release(visit)
        is_block = any(visit.name.startswith(("trunk", "head")) for visit in part)
        inside = setup.tokens * a.backward_transient if is_block else 0
        if is_block and setup.checkpointing:
            inside += setup.tokens * a.block
        sizes = {visit.name: sum(visit.parameters) for visit in part}
        weights = (sum(sizes.values()) if self.zero.block_is_leaf else max(sizes.values())) * setup.b
        yield self._moment(
            "backward",
            gathered=most * setup.b,
            activations=kept + inside + gradients,
            unreduced_gradients=weights + pending + self._reduction,
        )

    @cached_property
    def _reduction(self) -> int:
        """Copies that reducing a bucket makes."""
        bucket = min(self.zero.reduce_bucket, sum(self.states.trained_parameters)) * self.setup.b
        return bucket * (2 if self.zero.overlap and self.setup.device == "cuda" and self.setup.ranks > 1 else 1)

    # --- stages that train the value head alone; values before the loss ---

    def _value_pass(self) -> Iterator[Moment]:
        yield from self._reading_trunk("value pass", 0, self._gathering(self._visits, self.zero))

    def _value_head_pass(self) -> Iterator[Moment]:
        setup, a = self.setup, self.activations
        kept = setup.tokens * (a.residual + a.value_head(setup.value_head))
        gathering = self._gathering(self._visits, self.zero)
        yield from self._reading_trunk("loss", kept, gathering)
        weights = sum(map(sum, setup.value_modules)) * setup.b
        # What the frozen trunk has kept for a backward pass that never reaches it.
        gathered = gathering.held * setup.b
        gradient = setup.tokens * FLOAT * self.shape.hidden_size * 2
        yield self._moment(
            "backward", gathered=gathered, activations=kept + gradient, unreduced_gradients=weights + self._reduction
        )
        yield self._moment("optimizer", gathered=gathered)  # before it releases everything

    def _reading_trunk(self, name: str, at_end: int, gathering: Gathering) -> Iterator[Moment]:
        """The trunk without gradient; at its end the value head, and what it keeps."""
        setup, a = self.setup, self.activations
        inside = setup.mask + setup.tokens * (a.residual + a.forward_transient)
        for visit in self._reading_visits:
            activations = at_end if visit in self._values else inside
            yield self._moment(name, gathered=gathering.fetch() * setup.b, activations=activations)
            gathering.release(visit)

    # --- the optimizer ---

    def _optimizer(self) -> Iterator[Moment]:
        setup, states = self.setup, self.states
        if self.zero.offload_optimizer:
            return
        parameters = states.trained_parameters
        largest = max((-(-size // setup.ranks) for size in parameters), default=0)
        norm = 8 * largest  # of one gradient at a time, in float64
        group = states.sub_group
        step = group * FLOAT + (group * states.gradient_bytes if states.gradient_bytes != FLOAT else 0)
        if not setup.adam and setup.decays:
            step = group * FLOAT * 2
        yield self._moment("optimizer", optimizer_copies=max(norm, step))
