"""All that a plan depends on."""

from dataclasses import dataclass, replace

from wmtp_ds.plan.shape import ModelShape
from wmtp_ds.plan.workspace import Kernels
from wmtp_ds.plan.zero import ZeroSettings


@dataclass(frozen=True)
class Frozen:
    """A model that is only read, in an engine of its own: its shape, bytes of its dtype, its DeepSpeed settings."""

    shape: ModelShape
    b: int
    zero: ZeroSettings


@dataclass(frozen=True)
class Setup:
    """One stage on one machine.

    Attributes:
        policy: the model to train.
        b: bytes of its compute dtype: 2, or 4 where masters are copies of the same type.
        zero: DeepSpeed's settings.
        ranks: over which states are sharded.
        device: "cuda" or "cpu".
        kernels: which loss kernels run there.
        batch: sequences of a micro-batch; ``length``: tokens of each, without padding.
        accumulation: micro-batches of a step.
        packed: whether several solutions share a row, which takes a mask of its own for each row.
        checkpointing: whether blocks keep their inputs alone.
        adam: whether the optimizer keeps two moments (else it is SGD, which keeps none).
        decays: whether weights decay, which costs SGD a copy.
        trains_policy: or the value head alone.
        value_head: "linear", "mlp" or "".
        needs_window: whether values of the whole window are needed before the first loss.
        selects: whether losses select their targets (rho1's top-k).
        reference: the frozen reference model; None without one.
        reward: the model that scores rows before training; None without one.
    """

    policy: ModelShape
    b: int
    zero: ZeroSettings
    ranks: int
    device: str
    kernels: Kernels
    batch: int
    length: int
    accumulation: int = 1
    packed: bool = False
    checkpointing: bool = False
    adam: bool = True
    decays: bool = True
    trains_policy: bool = True
    value_head: str = ""
    needs_window: bool = False
    selects: bool = False
    reference: Frozen | None = None
    reward: Frozen | None = None

    @property
    def tokens(self) -> int:
        """Positions of a micro-batch."""
        return self.batch * self.length

    @property
    def mask(self) -> int:
        """Bytes of the mask of packed rows, in the compute dtype."""
        return self.b * self.batch * self.length**2 if self.packed else 0

    @property
    def value_modules(self) -> tuple[tuple[int, ...], ...]:
        """Elements of the parameters of each module of the value head."""
        d = self.policy.hidden_size
        if not self.value_head:
            return ()
        return ((d,), (d * d, d), (d, 1)) if self.value_head == "mlp" else ((d,), (d, 1))

    def offloaded(self, *, optimizer: bool, parameters: bool) -> "Setup":
        """The same with other offloading of what is trained."""
        return replace(self, zero=self.zero.offloaded(optimizer=optimizer, parameters=parameters))
