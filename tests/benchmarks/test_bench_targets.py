"""The targets are those promised, and judged where they apply."""

import json
import re
from typing import Any

import pytest
import torch
from wmtp_kernel_benchmarks import targets
from wmtp_kernel_benchmarks.inputs import Sizes

CPU = torch.device("cpu")
TINY = Sizes(heads=3, sequences=2, length=12, dim=32, vocabulary=50)
BRIEF = ("--quick", "--no-sweep", "--device=cpu", "--rounds=1")


# The table of the issue: (arm, what it is held against) -> limit at k.
PROMISED = {
    ("cuda", "td", "time", "floor"): lambda k: 1.10,
    ("cuda", "td", "speedup", "liger-none"): lambda k: 1.5,
    ("cuda", "td", "speedup", "liger-none-float32"): lambda k: 1.35,
    ("cuda", "td", "speedup", "liger-mean"): lambda k: 1.15,
    ("cuda", "td", "speedup", "liger-mean-float32"): lambda k: 1.05,
    ("cuda", "td", "speedup", "cut"): lambda k: 2.0,
    ("cuda", "td", "speedup", "cut-exact"): lambda k: 2.5,
    ("cuda", "td", "speedup", "torch-chunked-mean"): lambda k: 1.25,
    ("cuda", "td", "speedup", "torch-chunked-none"): lambda k: 1.6,
    ("cuda", "rho1-sequence", "time", "floor"): lambda k: 1.12 * (2 + 4 * k) / 6,
    ("cuda", "rho1-batch", "time", "floor"): lambda k: 1.12 * (2 + 6 * k) / 6,
    ("cuda", "weighted", "memory", ""): lambda k: 1.1e9,
    ("cuda", "td", "memory", ""): lambda k: 1.1e9,
    ("cuda", "rho1-sequence", "memory", ""): lambda k: 1.1e9,
    ("cuda", "rho1-batch", "memory", ""): lambda k: 1.1e9,
    ("cuda", "td-weights", "bandwidth", ""): lambda k: 0.8,
    ("cuda", "gae-weights", "bandwidth", ""): lambda k: 0.8,
    ("cpu", "weighted", "time", "torch"): lambda k: 0.95,
    ("cpu", "td", "time", "torch"): lambda k: 0.95,
    ("cpu", "weighted", "memory ratio", "torch"): lambda k: 0.2,
    ("cpu", "td", "memory ratio", "torch"): lambda k: 0.2,
    ("cpu", "rho1-sequence", "time", "torch"): lambda k: 0.85,
    ("cpu", "rho1-batch", "time", "torch"): lambda k: 0.85,
}


@pytest.mark.parametrize("k", [0.05, 0.6, 1.0])
def test_the_targets_are_those_promised(k):
    found = {(one.device, one.arm, one.quantity, one.against): one.limit for one in targets.all_targets(k)}
    assert len(found) == len(targets.all_targets(k))
    assert found == pytest.approx({key: limit(k) for key, limit in PROMISED.items()})


def test_operations_of_rho1():
    assert targets.rho1_operations(1.0, logits_kept=True) == 1.0
    assert targets.rho1_operations(1.0, logits_kept=False) == pytest.approx(8 / 6)
    assert targets.rho1_operations(0.6, logits_kept=True) == pytest.approx(4.4 / 6)
    assert targets.rho1_operations(0.6, logits_kept=False) == pytest.approx(5.6 / 6)


def judged(device: str, better: bool, k: float = 0.6, **changes: Any) -> dict[tuple[str, ...], targets.Verdict]:
    """The verdicts on made-up results that keep every target of a device by a hair, or miss them by a hair."""
    wanted = targets.all_targets(k)
    names = {name for one in wanted for name in (one.arm, one.against) if name}
    results: dict[str, dict[str, Any]] = {
        name: {"status": "measured", "reason": "", "ratios": {}, "extra_bytes": 10**10} for name in names
    }
    shares: dict[str, dict[str, float]] = {}
    for one in wanted:
        if one.device != device:
            continue
        value = one.limit * (1.001 if better == one.at_least else 0.999)
        ratio = {"median": value, "low": 0.0, "high": 99.0}
        if one.quantity == "time":
            results[one.arm]["ratios"][one.against] = ratio
        elif one.quantity == "speedup":
            results[one.against]["ratios"][one.arm] = ratio
        elif one.quantity == "bandwidth":
            shares[one.arm] = ratio
        else:
            results[one.arm]["extra_bytes"] = int(value * (10**10 if one.quantity == "memory ratio" else 1))
    sizes = targets.GPU_SIZES if device == "cuda" else targets.CPU_SIZES
    asked = {"device": device, **sizes, "k_percent": k, "bandwidth_positions": 2**26} | changes.pop("run", {})
    results |= changes.pop("results", {})
    around = {"status": "measured", "reason": "", "share_of_copy": shares} | changes.pop("bandwidth", {})
    assert not changes
    verdicts = targets.judge(wanted, asked, results, around)
    return {(each.target.device, each.target.arm, each.target.quantity, each.target.against): each for each in verdicts}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("better", [True, False])
def test_targets_of_this_device_are_judged_and_no_others(device, better):
    verdicts = judged(device, better)
    assert verdicts.keys() == PROMISED.keys()
    for key, verdict in verdicts.items():
        if key[0] == device:
            assert verdict.verdict == ("met" if better else "missed"), key
            assert verdict.value == pytest.approx(PROMISED[key](0.6), rel=0.0011) or key[2] == "memory ratio"
        else:
            assert (verdict.verdict, verdict.value) == ("not measured", None)
            assert verdict.reason == f"it is for a {'GPU' if key[0] == 'cuda' else 'CPU'}"


@pytest.mark.parametrize(
    "change", [{"positions": 512}, {"heads": 1}, {"dim": 1024}, {"vocabulary": 128_256}, {"dtype": "float16"}]
)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_at_other_sizes_nothing_is_claimed(device, change):
    for key, verdict in judged(device, True, run=change).items():
        if key[0] == device and key[2] != "bandwidth":
            assert (verdict.verdict, verdict.value) == ("not measured", None)
            assert "4 heads x" in verdict.reason


def test_bandwidth_is_judged_where_no_cache_helps():
    verdicts = judged("cuda", True, run={"bandwidth_positions": 4096})
    assert verdicts["cuda", "td-weights", "bandwidth", ""].verdict == "not measured"
    assert verdicts["cuda", "td", "time", "floor"].verdict == "met"
    wrong = judged("cuda", True, bandwidth={"status": "wrong", "reason": "wrong result", "share_of_copy": {}})
    assert wrong["cuda", "gae-weights", "bandwidth", ""].verdict == "missed"


def test_the_share_of_rho1_matters_on_a_cpu_alone():
    verdicts = judged("cpu", True, k=0.5)
    assert verdicts["cpu", "rho1-batch", "time", "torch"].verdict == "not measured"
    assert verdicts["cpu", "rho1-batch", "time", "torch"].reason == "it is for k = 0.6"
    assert verdicts["cpu", "td", "time", "torch"].verdict == "met"
    assert judged("cuda", True, k=0.5)["cuda", "rho1-batch", "time", "floor"].verdict == "met"


def test_what_was_not_timed_is_not_judged():
    skipped = {"liger-mean": {"status": "skipped", "reason": "Liger is not installed"}}
    verdict = judged("cuda", True, results=skipped)["cuda", "td", "speedup", "liger-mean"]
    assert (verdict.verdict, verdict.value) == ("not measured", None)
    assert verdict.reason == "liger-mean: Liger is not installed"
    wrong = {"td": {"status": "wrong", "reason": "wrong result"}, "cut": {"status": "wrong", "reason": "wrong"}}
    assert judged("cuda", True, results=wrong)["cuda", "td", "time", "floor"].verdict == "missed"
    del wrong["td"]
    assert judged("cuda", True, results=wrong)["cuda", "td", "speedup", "cut"].verdict == "not measured"
    unknown = {"weighted": {"status": "measured", "ratios": {"torch": {"median": 0.5}}, "extra_bytes": None}}
    verdict = judged("cpu", True, results=unknown)["cpu", "weighted", "memory ratio", "torch"]
    assert (verdict.verdict, verdict.reason) == ("not measured", "peak memory could not be measured")


def test_the_targets_stand_beside_the_ratios(ran):
    table = (ran.folder / "table.txt").read_text()
    for target in ran.document["targets"]:
        assert target["verdict"] == "not measured"  # of sizes as small as these nothing is claimed
        line = next(line for line in table.splitlines() if line.startswith(target["text"] + " "))
        assert target["limit_text"] in line
        assert line.endswith(target["reason"])
    assert {target["limit_text"] for target in ran.document["targets"]} >= {"<= 1.10 GB", ">= 1.35", "<= 0.95"}


@pytest.mark.parametrize(("limit", "check", "code"), [(1e-6, True, 1), (1e-6, False, 0), (1e6, True, 0)])
def test_check_fails_on_a_missed_target(monkeypatch, tmp_path, limit, check, code, call):
    held = [targets.Target("cpu", "a case", "td", "time", limit, "torch")]
    monkeypatch.setattr(targets, "all_targets", lambda k: held)
    monkeypatch.setattr(targets, "CPU_SIZES", {"positions": 64})
    arguments = [*BRIEF, "--arms=td", f"--output={tmp_path}"]
    found, out, _ = call(*arguments, *(["--check"] if check else []))
    assert found == code
    verdict = "missed" if limit < 1 else "met"
    ratio = json.loads((tmp_path / "results.json").read_text())["sizes"][0]["results"]["td"]["ratios"]["torch"][
        "median"
    ]
    assert re.search(rf"^a case +<= \S+ +{ratio:.3f} +{verdict}$", out, re.M)
