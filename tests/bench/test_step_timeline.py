"""The timeline of a step: parts nest, and add up to the whole, by a clock that is set by hand."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wmtp_ds.bench import timeline as module
from wmtp_ds.bench.timeline import (
    BACKWARD,
    COMMUNICATION,
    DATA,
    FORWARD,
    OUTSIDE,
    REFERENCE,
    REST,
    TRUNK,
    Place,
    Timeline,
)

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=made))
    return made


def test_parts_nest_and_add_up(clock):
    line = Timeline(CPU)
    line.begin()
    clock.now += 1
    with line.part(DATA):
        clock.now += 2
    with line.part(REST, FORWARD):
        clock.now += 4
        with line.part(TRUNK):
            clock.now += 8
            with line.part(COMMUNICATION):
                clock.now += 16
            clock.now += 32
    clock.now += 64
    assert line.end() == {
        Place(OUTSIDE, REST): 65,
        Place(OUTSIDE, DATA): 2,
        Place(FORWARD, REST): 4,
        Place(FORWARD, TRUNK): 40,
        Place(FORWARD, COMMUNICATION): 16,
    }


@pytest.mark.parametrize("phase", [BACKWARD, REFERENCE])
def test_what_is_recomputed_in_backward_is_backwards(clock, phase):
    """And the reference's own trunk is not the policy's."""
    line = Timeline(CPU)
    line.begin()
    with line.part(REST, phase):
        clock.now += 1
        with line.part(TRUNK):
            clock.now += 2
            with line.part(COMMUNICATION):
                clock.now += 4
    assert line.end() == {Place(phase, REST): 3, Place(phase, COMMUNICATION): 4, Place(OUTSIDE, REST): 0}


def test_a_part_ends_with_an_exception(clock):
    line = Timeline(CPU)
    line.begin()

    def fails() -> None:
        clock.now += 1
        raise RuntimeError

    with pytest.raises(RuntimeError):
        line.timed(fails, TRUNK, FORWARD)()
    clock.now += 2
    assert line.end() == {Place(OUTSIDE, REST): 2, Place(FORWARD, TRUNK): 1}


def test_a_wrapped_method_counts_and_still_works(clock):
    class Adder:
        def add(self, a: int, b: int = 0) -> int:
            clock.now += 1
            return a + b

    line = Timeline(CPU)
    one, other = Adder(), Adder()
    line.wrap(one, "add", TRUNK)
    line.begin()
    assert (one.add(1, b=2), other.add(3)) == (3, 3)
    assert line.end() == {Place(OUTSIDE, TRUNK): 1, Place(OUTSIDE, REST): 1}


def test_what_was_before_is_forgotten(clock):
    line = Timeline(CPU)
    line.begin()
    clock.now += 5
    line.begin()
    clock.now += 1
    assert line.end() == {Place(OUTSIDE, REST): 1}


programs = st.recursive(
    st.integers(1, 9).map(lambda seconds: ("wait", seconds)),
    lambda inner: st.tuples(st.sampled_from("abc"), st.sampled_from([None, FORWARD]), st.lists(inner, max_size=4)),
    max_leaves=20,
)


@given(st.lists(programs, max_size=5))
def test_any_nesting_adds_up(steps):
    passing = Clock()
    line, expected = Timeline(CPU), Counter()

    def run(program: tuple, place: Place) -> None:
        if program[0] == "wait":
            passing.now += program[1]
            expected[place] += program[1]
            return
        part, phase, inner = program
        with line.part(part, phase):
            for one in inner:
                run(one, Place(phase or place.phase, part))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", SimpleNamespace(perf_counter=passing))
        line.begin()
        for program in steps:
            run(program, Place(OUTSIDE, REST))
        found = line.end()
    assert sum(found.values()) == passing.now - 100
    assert {place: seconds for place, seconds in found.items() if seconds} == dict(expected)


def test_on_a_gpu_events_are_recorded_and_read_once(clock, monkeypatch):
    """Stand-ins for events: the device's clock is ours, and nothing is synchronised before the end."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "computing"
            log.append("record")
            self.at = clock.now

        def elapsed_time(self, later: "Event") -> float:
            assert log[-1] == "synchronize"
            return 1e3 * (later.at - self.at)  # milliseconds, as torch has it

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "computing")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: log.append("synchronize"))
    line = Timeline(torch.device("cuda", 0))
    line.begin()
    with line.part(TRUNK, FORWARD):
        clock.now += 3
    clock.now += 1
    found = line.end()
    assert log == ["record"] * 4 + ["synchronize"]
    assert found == pytest.approx({Place(FORWARD, TRUNK): 3, Place(OUTSIDE, REST): 1})
