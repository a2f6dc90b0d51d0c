"""Time, peak memory, and the weight kernel alone."""

import dataclasses
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from wmtp_kernel_benchmarks import arms, bandwidth, measure, run
from wmtp_kernel_benchmarks.arms import Outcome
from wmtp_kernel_benchmarks.inputs import Inputs, Sizes, make_inputs

CPU = torch.device("cpu")
TINY = Sizes(heads=3, sequences=2, length=12, dim=32, vocabulary=50)
BRIEF = ("--quick", "--no-sweep", "--device=cpu", "--rounds=1")
arm_named = {arm.name: arm for arm in arms.all_arms()}.__getitem__


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, sizes: Sizes = TINY, k_percent: float = 0.6) -> Inputs:
    return make_inputs(sizes, dtype, CPU, seed, k_percent)


def test_rounds_are_interleaved_in_changing_order():
    seen: list[tuple[str, int]] = []
    before: list[int] = []
    calls = {name: (lambda number, name=name: seen.append((name, number))) for name in "abc"}
    readings = measure.interleaved(calls, CPU, 20, seed=1, repeats=2, before=lambda: before.append(len(seen)))
    assert {name: len(found) for name, found in readings.items()} == {"a": 20, "b": 20, "c": 20}
    assert before == list(range(0, 120, 2))
    orders = set()
    for number in range(20):
        of_round = seen[6 * number : 6 * number + 6]
        assert [place for _, place in of_round] == [number] * 6
        assert of_round[::2] == of_round[1::2]
        orders.add("".join(name for name, _ in of_round[::2]))
    assert orders == {"abc", "acb", "bac", "bca", "cab", "cba"}
    again = []
    repeated = {name: (lambda number, name=name: again.append((name, number))) for name in "abc"}
    measure.interleaved(repeated, CPU, 20, seed=1, repeats=2)
    assert again == seen


def test_a_reading_is_the_mean_of_its_repeats(monkeypatch):
    wall, cpu = iter([10.0, 16.0]), iter([1.0, 4.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(measure.time, "process_time", lambda: next(cpu))
    calls: list[int] = []
    assert measure.timed(lambda: calls.append(1), CPU, repeats=3) == measure.Reading(2.0, 1.0)
    assert len(calls) == 3


def test_a_gpu_is_timed_by_its_own_events_with_nothing_else_in_flight(monkeypatch):
    seen: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            seen.append("record")

        def elapsed_time(self, end: "Event") -> float:
            seen.append("elapsed")
            return 30.0 if end is not self else 0.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append("wait"))
    found = measure.timed(lambda: seen.append("call"), torch.device("cuda"), repeats=2)
    assert seen == ["wait", "record", "call", "call", "record", "wait", "elapsed"]
    assert found == measure.Reading(0.015, None)


def peak_memory_is_what_one_call_takes_at_its_worst():
    mib = 2**20

    def takes(size: int, times: int = 1) -> Callable[[], object]:
        return lambda: [torch.ones(size * mib // 4).sum() for _ in range(times)]

    takes(1)()  # the code's own pages come into memory
    for expected in (64, 16, 64):  # a higher peak before does not hide a lower one after
        assert measure.extra_memory(takes(expected), CPU) / mib == pytest.approx(expected, abs=4)
    assert measure.extra_memory(takes(32, times=3), CPU) / mib == pytest.approx(32, abs=4)  # freed before the next
    kept: list[torch.Tensor] = []
    assert measure.extra_memory(lambda: kept.append(torch.ones(8 * mib)), CPU) / mib == pytest.approx(32, abs=4)


def gradients_are_no_extra_memory():
    sizes = Sizes(heads=4, sequences=2, length=64, dim=64, vocabulary=16_384)
    sets = [tiny(sizes=sizes), tiny(1, sizes=sizes)]
    logits = sizes.rows * sizes.vocabulary * 4
    plain = run._warm_up(arm_named("torch"), arm_named("torch").make(CPU, torch.float32), sets, CPU)
    assert 2 * logits * 0.9 < plain < 4 * logits  # logits, their softmax, and their gradient in place of one

    def step(inputs: Inputs) -> Outcome:
        inputs.hidden_nBSD.grad = torch.ones_like(inputs.hidden_nBSD)
        inputs.weight_VD.grad = torch.ones_like(inputs.weight_VD)
        return Outcome()

    bare = run._warm_up(dataclasses.replace(arm_named("torch"), name="bare"), step, sets, CPU)
    assert bare < sets[0].gradient_bytes / 4
    assert sets[0].weight_VD.grad is None

    def takes(inputs: Inputs) -> Outcome:
        torch.ones(16 * 2**20).sum()
        return Outcome()

    trains, forward = (run._warm_up(arm_named(name), takes, sets, CPU) for name in ("torch", "reference"))
    assert forward == pytest.approx(64 * 2**20, abs=2**20)  # has no gradients, so nothing is taken off
    assert forward - trains == pytest.approx(sets[0].gradient_bytes, abs=2**20)


def what_a_call_frees_does_not_hide_what_it_takes():
    class Cycle:
        def __init__(self) -> None:
            self.itself, self.big = self, torch.ones(16 * 2**20)

    def call() -> None:
        Cycle()
        kept = [[] for _ in range(5000)]  # enough new objects for the collector to run, and less than a mebibyte
        torch.ones(16 * 2**20).sum()
        del kept

    torch.ones(1).sum()  # the code's own pages come into memory
    assert measure.extra_memory(call, CPU) == pytest.approx(128 * 2**20, abs=8 * 2**20)
    assert gc.isenabled()
    gc.disable()
    try:
        measure.extra_memory(lambda: None, CPU)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.skipif(measure.memory_unmeasurable(CPU) is not None, reason="peak memory needs Linux")
@pytest.mark.parametrize(
    "body",
    [
        peak_memory_is_what_one_call_takes_at_its_worst,
        gradients_are_no_extra_memory,
        what_a_call_frees_does_not_hide_what_it_takes,
    ],
    ids=lambda body: body.__name__,
)
def test_memory(body: Callable[[], None]) -> None:
    """In a process that does nothing else: other threads of a test runner take and free memory meanwhile, and its heap
    has holes that fill up again."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])[sys.argv[2]]()"
    done = subprocess.run([sys.executable, "-c", code, __file__, body.__name__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_where_memory_cannot_be_measured_it_says_so(monkeypatch, tmp_path, call):
    monkeypatch.setattr(measure, "_RESET", tmp_path / "nowhere" / "clear_refs")
    code, out, _ = call(*BRIEF, "--arms=weighted", f"--output={tmp_path}")
    assert code == 0
    assert re.search(r"^weighted .* not measured +\S+ +ours, ready weights$", out, re.M)
    assert json.loads((tmp_path / "results.json").read_text())["sizes"][0]["results"]["weighted"]["extra_bytes"] is None


def test_bandwidth_is_the_copys_time_over_the_kernels(ran, middle):
    found = ran.document["bandwidth"]
    assert found["status"] == "measured"
    assert found["bytes"] == 4096 * 13 + 2 * 4  # values, errors and weights in float32, the mask, rewards of 2 x 2048
    rounds = found["rounds"]
    assert rounds.keys() == {"copy", "td-weights", "gae-weights"}
    for kernel in ("td-weights", "gae-weights"):
        shares = [one["wall"] / two["wall"] for one, two in zip(rounds["copy"], rounds[kernel], strict=True)]
        assert list(found["share_of_copy"][kernel].values()) == pytest.approx(middle(shares))
    assert found["share_of_copy"].keys() == {"td-weights", "gae-weights"}
    table = (ran.folder / "table.txt").read_text()
    rate = found["bytes"] / found["wall"]["copy"]["median"] / 1e9
    assert re.search(rf"^copy +\S+ \[\S+ \S+ +{rate:.3g} ", table, re.M)


def test_the_copy_reads_half_of_the_bytes_and_writes_half():
    copied = bandwidth._copy_call(1000, CPU)
    targets = [copied(number) for number in range(4)]
    assert all(isinstance(target, torch.Tensor) and target.nbytes == 500 for target in targets)
    assert len({target.data_ptr() for target in targets}) == 3


def test_the_weight_kernel_takes_the_next_set_at_every_call(monkeypatch):
    seen: list[int] = []
    right = bandwidth.decision_weights
    monkeypatch.setattr(bandwidth, "_REPEATS", {"cpu": 4})
    monkeypatch.setattr(bandwidth, "KERNELS", {"td-weights": 0.0})
    monkeypatch.setattr(bandwidth, "decision_weights", lambda td: seen.append(td.values_BS.data_ptr()) or right(td))
    found = bandwidth.measure_bandwidth(64, CPU, rounds=2, seed=0)
    assert len(found.readings["td-weights"]) == 2
    timed = seen[-8:]
    assert len(set(timed)) == 3
    assert all(timed[i] == timed[i + 3] for i in range(5))


@pytest.mark.parametrize("wrong_at", [0.0, 0.95])
def test_a_wrong_weight_kernel_is_not_timed(monkeypatch, wrong_at):
    right = bandwidth.decision_weights

    def wrong(td: Any) -> tuple[torch.Tensor, torch.Tensor]:
        td_BS, weights_BS = right(td)
        return td_BS, weights_BS * (1.01 if td.td_lambda == wrong_at else 1.0)

    monkeypatch.setattr(bandwidth, "decision_weights", wrong)
    found = bandwidth.measure_bandwidth(64, CPU, rounds=1, seed=0)
    assert (found.status, found.readings) == ("wrong", {})
    assert found.reason == f"wrong result of {'gae-weights' if wrong_at else 'td-weights'}"
