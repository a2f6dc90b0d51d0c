"""How many elements of its parameters a rank holds gathered, moment by moment: DeepSpeed's coordinator, replayed.

ZeRO-3 gathers a module's parameters before its forward and backward passes and releases them afterwards (Rajbhandari et
al. 2020, section 5.3). DeepSpeed does more (partitioned_param_coordinator.py): once it has seen a step, it keeps what
will be used again soon, and gathers ahead. Both depend on the order in which modules run, so they are replayed on it.

A group that is gathered at once passes through a buffer: until the last of its parameters is used, the buffer is there
beside the parameters themselves. A group of one parameter *is* its buffer.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from wmtp_ds.plan.zero import ZeroSettings


@dataclass(frozen=True)
class Module:
    """What is gathered together.

    Attributes:
        name: tells its parameters from those of other modules; the same module may be visited many times.
        parameters: their elements.
        is_leaf: whether they are those of all modules within, too.
        is_root: whether it is the whole model, visited when its forward and its backward pass begin; no parameter is
            the root's own.
    """

    name: str
    parameters: tuple[int, ...]
    is_leaf: bool = False
    is_root: bool = False


ROOT = Module("root", (), is_root=True)


@dataclass(eq=False)
class _Group:
    """Parameters that one collective gathers; ``waiting`` are those whose module has not asked for them yet."""

    waiting: set[tuple[str, int]]
    elements: int
    is_buffered: bool
    is_copied: bool = False  # out of the buffer, into tensors of their own


@dataclass
class Gathering:
    """A replay of one step's visits.

    Args:
        settings: of the engine.
        visits: modules in the order of their forward and backward passes.
        copies: whether gathering takes memory: not on one rank, where the partition is the parameter.
        buffers: whether several parameters pass through a buffer: not on one rank, either.
        traced: whether DeepSpeed knows the order. It does not where two kinds of passes alternate.
    """

    settings: ZeroSettings
    visits: Sequence[Module]
    copies: bool
    buffers: bool
    traced: bool = True
    _step: int = 0
    _available: set[tuple[str, int]] = field(default_factory=set)
    _elements: int = 0
    _groups: dict[tuple[str, int], _Group] = field(default_factory=dict)
    _buffers: int = 0

    def __post_init__(self) -> None:
        self._size = {(m.name, i): size for m in self.visits for i, size in enumerate(m.parameters)}
        self._persistent = {key for key, size in self._size.items() if size <= self.settings.persistence_threshold}
        for key in self._persistent:
            self._make(key)
        trace = [(key, step) for step, module in enumerate(self.visits) for key in self._keys(module)]
        self._queue: deque[tuple[tuple[str, int], int]] = deque(trace if self.traced else ())
        self._fetched_until: dict[tuple[str, int], int] = {}
        self._live = 0  # what DeepSpeed counts as available

    @staticmethod
    def _keys(module: Module) -> list[tuple[str, int]]:
        return [(module.name, index) for index in range(len(module.parameters))]

    @property
    def persistent(self) -> int:
        """Elements that stay gathered all the time."""
        return sum(self._size[key] for key in self._persistent) if self.copies else 0

    @property
    def held(self) -> int:
        """Elements gathered now, buffers included."""
        return (self._elements + self._buffers) if self.copies else 0

    def fetch(self) -> int:
        """The next visit begins; returns the most elements held on the way."""
        module = self.visits[self._step]
        keys = self._keys(module)
        self._gather([key for key in keys if key not in self._available and key not in self._groups])
        most = self.held
        for key in keys:
            if key in self._groups:
                most = max(most, self._wait(key))
        if self.traced:
            self._prefetch(keys)
        self._step += 1
        return max(most, self.held)

    def _gather(self, keys: list[tuple[str, int]]) -> None:
        if not keys:
            return
        elements = sum(self._size[key] for key in keys)
        self._live += elements
        group = _Group(set(keys), elements, is_buffered=self.buffers and len(keys) > 1)
        if group.is_buffered:
            self._buffers += elements
        for key in keys:
            self._groups[key] = group
            if not group.is_buffered:
                self._make(key)

    def _make(self, key: tuple[str, int]) -> None:
        self._available.add(key)
        self._elements += self._size[key]

    def _wait(self, key: tuple[str, int]) -> int:
        group = self._groups.pop(key)
        group.waiting.discard(key)
        if group.is_buffered and not group.is_copied:
            for other in (key, *group.waiting):
                self._make(other)
            group.is_copied = True
        most = self.held
        if group.is_buffered and not group.waiting:
            self._buffers -= group.elements
        return most

    def _prefetch(self, keys: list[tuple[str, int]]) -> None:
        step = self._step
        needed = {key for key in keys if self._fetched_until.get(key, -1) < step}
        dropped: set[tuple[str, int]] = set()
        while self._queue and len(dropped) < len(needed):
            key, until = self._queue.popleft()
            self._fetched_until[key] = until
            dropped.add(key)
        room = min(self.settings.max_live - self._live, self.settings.prefetch_bucket)
        ahead: list[tuple[str, int]] = []
        elements = 0
        while self._queue and elements < room:
            key, until = self._queue.popleft()
            self._fetched_until[key] = max(self._fetched_until.get(key, -1), until)
            if key not in self._available and key not in self._groups and key not in ahead:
                ahead.append(key)
                elements += self._size[key]
        self._gather(ahead)

    def release(self, module: Module) -> None:
        """A visit ends."""
        keys = [key for key in self._keys(module) if key in self._available and key not in self._groups]
        if self.traced and keys and self._is_used_soon(module):
            return
        for key in keys:
            if self.traced and (key in self._persistent or self._fetched_until.get(key, -1) > self._step):
                continue
            self._available.discard(key)
            self._elements -= self._size[key]
            self._live -= self._size[key]

    def _is_used_soon(self, module: Module) -> bool:
        traversed = 0
        for later in self.visits[self._step :]:
            if traversed >= self.settings.max_reuse:
                return False
            # Seen from a leaf, every module has the parameters of all modules within; seen from another, its own alone.
            if later.is_root and module.is_leaf:
                return True
            if later.is_leaf and not module.is_leaf:
                continue
            if later.name == module.name:
                return True
            traversed += sum(later.parameters)
        return False
