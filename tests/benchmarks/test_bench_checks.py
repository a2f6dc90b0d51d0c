"""Only arms that compute the right thing are timed, and what cannot run is named with the reason."""

import dataclasses
import json
import re
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from wmtp_kernel_benchmarks import arms, checks, ours, report, run, targets
from wmtp_kernel_benchmarks.arms import Arm, Outcome
from wmtp_kernel_benchmarks.inputs import Inputs, Sizes, make_inputs
from wmtp_kernel_benchmarks.options import Settings, plan

CPU = torch.device("cpu")
TINY = Sizes(heads=3, sequences=2, length=12, dim=32, vocabulary=50)
BRIEF = ("--quick", "--no-sweep", "--device=cpu", "--rounds=1")
arm_named = {arm.name: arm for arm in arms.all_arms()}.__getitem__


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, sizes: Sizes = TINY, k_percent: float = 0.6) -> Inputs:
    return make_inputs(sizes, dtype, CPU, seed, k_percent)


def broken(name: str) -> Callable[[Inputs], Outcome]:
    """The weighted arm with one mistake."""
    right = arm_named("weighted").make(CPU, torch.float32)

    def step(inputs: Inputs) -> Outcome:
        if name == "weights forgotten":
            inputs = dataclasses.replace(inputs, weights_nBS=(inputs.weights_nBS > 0).float())
            return right(inputs)
        if name == "a target lost":
            targets_nBS = inputs.targets_nBS.clone()
            targets_nBS[0, 0, 3] = -100
            return right(dataclasses.replace(inputs, targets_nBS=targets_nBS))
        outcome = right(inputs)
        hidden, weight = inputs.hidden_nBSD, inputs.weight_VD
        if name == "loss off":
            return Outcome(outcome.loss * 1.01)
        if name == "row losses off":
            return Outcome(outcome.loss, outcome.losses_N.roll(1))
        if name == "hidden gradient halved":
            hidden.grad = hidden.grad / 2
        if name == "no hidden gradient":
            hidden.grad = None
        if name == "unembedding gradient of one row off":
            weight.grad[inputs.targets_nBS[0, 0, 0]] *= 1.1
        if name == "NaN":
            weight.grad[0, 0] = torch.nan
        return outcome

    return step


@pytest.mark.parametrize(
    "mistake",
    [
        "weights forgotten",
        "a target lost",
        "loss off",
        "row losses off",
        "hidden gradient halved",
        "no hidden gradient",
        "unembedding gradient of one row off",
        "NaN",
    ],
)
def test_a_wrong_arm_is_found(mistake):
    inputs = tiny()
    errors, problem = checks.check(arm_named("weighted"), broken(mistake), inputs)
    assert problem is not None, errors
    assert problem.startswith("wrong result: relative error")
    assert inputs.hidden_nBSD.grad is None
    assert inputs.weight_VD.grad is None
    assert checks.check(arm_named("weighted"), broken("nothing"), inputs)[1] is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [arm.name for arm in (*arms.TORCH_ARMS, *ours.OUR_ARMS)])
def test_every_arm_of_torch_and_ours_is_right(name, dtype):
    arm = arm_named(name)
    try:
        step = arm.make(CPU, dtype)
    except arms.UnavailableError as error:
        pytest.skip(str(error))
    errors, problem = checks.check(arm, step, tiny(dtype=dtype))
    assert problem is None
    bound = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    assert errors.largest() < bound
    if arm.trains:
        assert 0 < errors.grad_hidden < bound
        assert 0 < errors.grad_weight < bound


@pytest.mark.parametrize("name", ["deepspeed-none", "deepspeed-mean", "deepspeed-tiled"])
def test_deepspeeds_losses_are_called_rightly(name, capsys):
    arm = arm_named(name)
    assert checks.check(arm, arm.make(CPU, torch.float32), tiny())[1] is None
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
def test_a_mean_is_not_taken_for_a_weighted_loss():
    inputs, step = tiny(), arm_named("torch-chunked-mean").make(CPU, torch.float32)
    assert checks.check(arm_named("torch-chunked-mean"), step, inputs)[1] is None
    assert checks.check(arm_named("torch-chunked-none"), step, inputs)[1] is not None


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("", None),
        ("one more", r"it selects (\d+) targets of a group instead of (\d+)"),
        ("a lower one", "it selects targets that are not the highest"),
        ("halves", "its weights are not 0 or 1"),
        ("an ignored one", "it selects what has no target"),
        ("none", "it returns no weights"),
        ("other gradients", "wrong result: relative error"),
    ],
)
def test_a_wrong_selection_is_found(scope, mistake, said):
    arm, inputs = arm_named(f"rho1-{scope}"), tiny(k_percent=0.55)
    right = arm.make(CPU, torch.float32)
    assert inputs.targets_nBS[2, 0, 11] == -100

    def step(inputs: Inputs) -> Outcome:
        outcome = right(inputs)
        weights_nBS = outcome.weights_nBS.clone()
        of_sequence = weights_nBS[2, 0]  # within one group, whatever the scope
        chosen = of_sequence.nonzero()[0]
        left = ((of_sequence == 0) & (inputs.targets_nBS[2, 0] != -100)).nonzero()[0]
        if mistake in ("one more", "a lower one"):
            of_sequence[left] = 1.0
        if mistake == "an ignored one":
            of_sequence[11] = 1.0
        if mistake in ("a lower one", "an ignored one"):
            of_sequence[chosen] = 0.0
        if mistake == "halves":
            weights_nBS /= 2
        if mistake == "other gradients":
            inputs.weight_VD.grad = inputs.weight_VD.grad * 1.01
        return dataclasses.replace(outcome, weights_nBS=None if mistake == "none" else weights_nBS)

    problem = checks.check(arm, step, inputs)[1]
    if said is None:
        assert problem is None
    else:
        assert problem is not None
        found = re.match(said, problem)
        assert found, problem
        if found.groups():
            assert int(found[1]) == int(found[2]) + 1


def test_one_scope_is_not_taken_for_the_other():
    inputs = tiny(k_percent=0.55)
    step = arm_named("rho1-batch").make(CPU, torch.float32)
    assert checks.check(arm_named("rho1-sequence"), step, inputs)[1] is not None


def test_a_wrong_arm_is_reported_and_not_timed(monkeypatch, tmp_path, call):
    timed = []
    wrong_step = broken("weights forgotten")
    wrong = dataclasses.replace(
        arm_named("td"), make=lambda device, dtype: lambda inputs: timed.append(1) or wrong_step(inputs)
    )
    monkeypatch.setattr(ours, "OUR_ARMS", (wrong, *(arm for arm in ours.OUR_ARMS if arm.name != "td")))
    monkeypatch.setattr(targets, "CPU_SIZES", {"positions": 64})
    arguments = [*BRIEF, "--arms=td,weighted", f"--output={tmp_path}"]
    code, out, err = call(*arguments, "--check")
    document = json.loads((tmp_path / "results.json").read_text())
    assert timed == [1]  # the check alone
    told = next(arm for arm in document["arms"] if arm["name"] == "td")
    assert told["status"] == "wrong"
    assert told["errors"]["grad_hidden"] > 0.1
    assert "td" not in document["sizes"][0]["results"]
    assert re.search(r"^td +WRONG ", out, re.M)
    assert re.search(r"^ +td +wrong +wrong result: relative error", out, re.M)
    assert "wrong: td" in err
    verdicts = {target["text"]: target for target in document["targets"] if target["arm"] == "td"}
    assert verdicts["td: time over plain torch"]["verdict"] == "missed"
    assert "wrong result" in verdicts["td: time over plain torch"]["reason"]
    assert code == 1


def raising(arm: Arm, error: Exception, after: int = 0) -> Arm:
    """The arm, failing at the step after that many."""
    seen = []

    def make(device: torch.device, dtype: torch.dtype) -> Callable[[Inputs], Outcome]:
        right = arm.make(device, dtype)

        def step(inputs: Inputs) -> Outcome:
            seen.append(1)
            if len(seen) > after:
                raise error
            return right(inputs)

        return step

    return dataclasses.replace(arm, make=make)


@pytest.mark.parametrize(
    ("name", "error", "after", "reason"),
    [
        ("torch-chunked-none", ValueError("it broke\nhere"), 0, "failed: ValueError: it broke"),
        ("torch-chunked-none", ValueError("it broke"), 1, "failed: ValueError: it broke"),
        ("torch-chunked-none", torch.OutOfMemoryError("much too much"), 1, "out of memory"),
        ("weighted", torch.OutOfMemoryError("much too much"), 1, "out of memory"),
    ],
)
def test_an_arm_that_fails_is_skipped_with_the_reason(monkeypatch, tmp_path, name, error, after, reason):
    fails = raising(arm_named(name), error, after)
    monkeypatch.setattr(run, "choose", lambda names: (*arms.TORCH_ARMS[:2], fails))
    document = run.measure(plan(Settings(quick=True, sweep=False, rounds=1, output=tmp_path), "cpu"), "command", CPU)
    told = next(arm for arm in document["arms"] if arm["name"] == name)
    result = document["sizes"][0]["results"].get(name, told)
    assert (result["status"], result["reason"]) == ("skipped", reason)
    assert document["sizes"][0]["results"]["torch"]["status"] == "measured"
    table = report.table(document)
    assert re.search(rf"^ +{name} +skipped +{reason}", table, re.M)
    assert re.search(rf"^{name} +not measured", table, re.M)


@pytest.mark.parametrize("name", ["weighted", "torch", "floor"])
def test_a_bug_of_ours_is_not_hidden(monkeypatch, tmp_path, name):
    fails = raising(arm_named(name), ZeroDivisionError("bug"))
    others = [arm for arm in arms.TORCH_ARMS[:2] if arm.name != name]
    monkeypatch.setattr(run, "choose", lambda names: (*others, fails))
    with pytest.raises(ZeroDivisionError):
        run.measure(plan(Settings(quick=True, sweep=False, rounds=1, output=tmp_path), "cpu"), "command", CPU)
