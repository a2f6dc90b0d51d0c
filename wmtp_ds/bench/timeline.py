"""Where a step's time goes: one sequence of marks, so that the parts add up to the whole.

A mark is the moment at which another part of the step begins. On a GPU it is an event on the computing stream: what
lies between two events is the time that the stream took for what was asked of it, and the time it waited (for data, for
a gather, for the host). Nothing is synchronised until the marks are read. On a CPU it is the clock.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

FORWARD, REFERENCE, BACKWARD, OPTIMIZER, OUTSIDE = "forward", "reference", "backward", "optimizer", "outside"
PHASES = (FORWARD, REFERENCE, BACKWARD, OPTIMIZER, OUTSIDE)
TRUNK, HEADS, LOSS, VALUE_HEAD = "trunk", "heads", "loss", "value head"
COMMUNICATION, DATA, COUNTS, TRACKING, REST = "communication", "data", "counts and metrics", "tracking", "rest"
PARTS = (TRUNK, HEADS, LOSS, VALUE_HEAD, COMMUNICATION, DATA, COUNTS, TRACKING, REST)


class Place(NamedTuple):
    """What a moment of the step belongs to."""

    phase: str
    part: str


class Timeline:
    """Marks of one rank's steps. Parts nest: time within an inner one is not the outer one's."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        # Named, because a hook may run while another stream is the current one.
        self._stream = torch.cuda.current_stream(device) if self._on_gpu else None
        self._marks: list[tuple[Any, Place]] = []
        self._open: list[Place] = [Place(OUTSIDE, REST)]

    def _mark(self, place: Place) -> None:
        stamp: Any
        if self._on_gpu:
            stamp = torch.cuda.Event(enable_timing=True)
            stamp.record(self._stream)
        else:
            stamp = time.perf_counter()
        self._marks.append((stamp, place))

    @contextmanager
    def part(self, part: str, phase: str | None = None) -> Iterator[None]:
        """Time inside belongs to ``part``; ``phase`` begins a phase, None is within the current one.

        A backward pass is not divided but for communication: what a checkpoint computes again there is backward's cost.
        Nor is the reference's forward pass.
        """
        outer = self._open[-1]
        place = Place(phase or outer.phase, part)
        if outer.phase in (BACKWARD, REFERENCE) and part != COMMUNICATION:
            place = outer
        self._open.append(place)
        self._mark(place)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1])

    def timed(self, function: Callable[..., Any], part: str, phase: str | None = None) -> Callable[..., Any]:
        """The function, with its time counted as that part's."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.part(part, phase):
                return function(*args, **kwargs)

        return wrapper

    def wrap(self, owner: Any, method: str, part: str, phase: str | None = None) -> None:
        """Count calls of one object's method as that part; for as long as the object lives."""
        setattr(owner, method, self.timed(getattr(owner, method), part, phase))

    def begin(self) -> None:
        """The first moment; what was marked before is forgotten."""
        self._marks.clear()
        self._mark(self._open[-1])

    def end(self) -> dict[Place, float]:
        """The last moment; returns the seconds of each place since :meth:`begin`. They add up to all of the time."""
        self._mark(self._open[-1])
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds: dict[Place, float] = {}
        for (stamp, place), (following, _) in zip(self._marks[:-1], self._marks[1:], strict=True):
            passed = stamp.elapsed_time(following) / 1e3 if self._on_gpu else following - stamp
            seconds[place] = seconds.get(place, 0.0) + passed
        return seconds
