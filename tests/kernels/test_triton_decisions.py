"""TD errors, GAE, weights and their statistics on each arm, against loops over tokens."""

import math

import pytest
import torch
from kernel_cases import Arm, Decisions, advantages_loop, decide, relative_largest, weights_loop
from torch import Tensor

from wmtp_kernels import Standardisation, TDWeights, decision_weights
from wmtp_kernels.statistics import Statistics, decision_statistics

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NaN and infinities are asked for

BETA, LOW, HIGH = 0.7, 0.8, 1.3


@pytest.fixture(params=["one block", "three blocks"])
def places(request: pytest.FixtureRequest, arm: Arm, monkeypatch: pytest.MonkeyPatch) -> Decisions:
    """Sequences that fit one block of the scan, or need three, the last of them ragged."""
    if arm.backend == "triton":
        from wmtp_kernels import td_triton

        monkeypatch.setattr(td_triton, "_BLOCK", arm.size(16, 1024))
    lengths = arm.size((11, 37), (800, 2500))
    return decide(arm, arm.size(4, 70), lengths[request.param == "three blocks"], seed=4)


@pytest.mark.parametrize(("gamma", "td_lambda"), [(1.0, 0.0), (0.9, 0.0), (0.9, 0.8), (1.0, 1.0), (0.0, 0.5)])
def test_advantages(arm, places, gamma, td_lambda):
    expected = advantages_loop(*places.loops(), gamma, td_lambda)
    found = TDWeights(*places, gamma=gamma, td_lambda=td_lambda).advantages()
    assert found.dtype == torch.float32
    assert relative_largest(found.cpu(), expected) < 1e-6
    assert not found[~places.decisions].any()


@pytest.mark.parametrize("td_lambda", [0.0, 0.8])
@pytest.mark.parametrize("standardisation", [(0.0, 1.0, 0.0), (0.11, 0.4, -0.15)])
@pytest.mark.parametrize("on_device", [False, True])
def test_decision_weights(arm, places, td_lambda, standardisation, on_device):
    """Constants of the standardisation come as numbers, or in float64 from the device that summed them up."""
    advantages = advantages_loop(*places.loops(), 0.9, td_lambda)
    expected = weights_loop(advantages, places.decisions.tolist(), BETA, LOW, HIGH, standardisation)
    assert {LOW, HIGH, 0.0} <= set(expected.flatten().tolist())
    constants = Standardisation(
        *(torch.tensor(x, dtype=torch.float64, device=arm.device) if on_device else x for x in standardisation)
    )
    td_BS, weights_BS = decision_weights(
        TDWeights(
            *places, beta=BETA, min_weight=LOW, max_weight=HIGH, gamma=0.9, td_lambda=td_lambda,
            standardisation=constants,
        )
    )  # fmt: skip
    assert relative_largest(td_BS.cpu(), advantages) < 1e-6
    assert relative_largest(weights_BS.cpu(), expected) < 3e-6
    assert not weights_BS[~places.decisions].any()
    assert not td_BS.requires_grad
    assert weights_BS[places.decisions].min() >= torch.tensor(LOW)
    assert weights_BS[places.decisions].max() <= torch.tensor(HIGH)


def test_weights_that_are_not_clipped(arm, places):
    """From e^-20 to e^20: what the exponential itself makes of float32."""
    shifted = Decisions(places.values * 40 - 20, places.rewards, places.decisions)
    expected = weights_loop(advantages_loop(*shifted.loops(), 1.0, 0.0), places.decisions.tolist(), 1.0, 0.0, math.inf)
    _, found = decision_weights(TDWeights(*shifted, beta=1.0, min_weight=0.0, max_weight=math.inf))
    torch.testing.assert_close(found.cpu().double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("td_lambda", [0.0, 0.9])
def test_what_stands_beside_decisions_counts_for_nothing(arm, places, td_lambda):
    """Only a decision's value and that of the token it emits are read."""
    expected = decision_weights(TDWeights(*places, td_lambda=td_lambda))
    last = torch.where(places.decisions, torch.arange(places.values.shape[1], device=arm.device), -1).amax(-1)
    emitted = torch.zeros_like(places.decisions)
    emitted[:, 1:] = places.decisions[:, :-1]
    emitted[torch.arange(len(last)), (last + 1).clamp(max=emitted.shape[1] - 1)] = False
    for rubbish in (math.nan, math.inf):
        values = places.values.masked_fill(~(places.decisions | emitted), rubbish)
        rewards = places.rewards.masked_fill(~places.decisions.any(-1), rubbish)
        found = decision_weights(TDWeights(values, rewards, places.decisions, td_lambda=td_lambda))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("td_lambda", [0.0, 0.9])
def test_a_value_head_gone_wrong_is_seen(arm, places, td_lambda):
    row, at = 1, int(places.decisions[1].nonzero()[2])
    values = places.values.clone()
    values[row, at] = math.nan
    td_BS, weights_BS = decision_weights(TDWeights(values, *places[1:], td_lambda=td_lambda))
    assert td_BS[row, at].isnan()
    assert weights_BS[row, at].isnan()
    assert weights_BS[places.decisions].isnan().sum() >= 1 + places.decisions[row, at - 1].int()
    others = [b for b in range(len(values)) if b != row]
    assert not weights_BS[others].isnan().any()
    found = decision_statistics(weights_BS, places.decisions, td_BS)
    for moments in (found.weights, found.td):
        assert moments[0] == places.decisions.sum()
        assert moments[1:].isnan().all()  # a maximum of numbers and NaN would be a number


def test_infinite_values_are_clipped(arm):
    values = torch.tensor([[0.5, math.inf, 0.5]], device=arm.device)
    decisions = torch.tensor([[True, True, False]], device=arm.device)
    td_BS, weights_BS = decision_weights(TDWeights(values, torch.ones(1, device=arm.device), decisions))
    assert td_BS.tolist() == [[math.inf, -math.inf, 0.0]]
    assert weights_BS.tolist() == [[5.0, torch.tensor(0.1).item(), 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_of_any_dtype_and_layout(arm, dtype):
    """Values cut out of a wider tensor, rewards that are booleans' floats, decisions of every second column."""
    places = decide(arm, 4, 12)
    values = torch.stack([places.values, -places.values], -1).to(dtype)[..., 0]
    decisions = torch.stack([places.decisions, ~places.decisions], -1)[..., 0]
    rewards = torch.stack([places.rewards, -places.rewards], -1)[..., 0]
    assert not any(x.is_contiguous() for x in (values, decisions, rewards))
    expected = advantages_loop(values.double().tolist(), rewards.tolist(), decisions.tolist(), 0.9, 0.5)
    found, _ = decision_weights(TDWeights(values, rewards, decisions, gamma=0.9, td_lambda=0.5))
    assert found.dtype == torch.float32
    assert relative_largest(found.cpu(), expected) < 1e-6


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (2, 1), (3, 2)])
def test_the_smallest_batches(arm, shape):
    values = torch.full(shape, 0.25, device=arm.device)
    decisions = torch.ones(shape, dtype=torch.bool, device=arm.device)
    td_BS, weights_BS = decision_weights(TDWeights(values, torch.ones(shape[0], device=arm.device), decisions))
    expected = torch.zeros(shape)
    expected[:, -1:] = 0.75
    torch.testing.assert_close(td_BS.cpu(), expected)
    torch.testing.assert_close(weights_BS.cpu(), (expected / 0.9).exp())


# --- Statistics ---


def statistics_loop(weights: Tensor, decisions: Tensor, td: Tensor | None) -> Statistics:
    """Sums over decisions, one after the other."""

    def of(x: Tensor) -> Tensor:
        kept = [v for row, known in zip(x.double().tolist(), decisions.tolist(), strict=True)
                for v, k in zip(row, known, strict=True) if k]  # fmt: skip
        return torch.tensor([
            len(kept), math.fsum(kept), math.fsum(v * v for v in kept),
            max((-v for v in kept), default=-math.inf), max(kept, default=-math.inf),
        ], dtype=torch.float64)  # fmt: skip

    entropies = []
    for row, known in zip(weights.double().tolist(), decisions.tolist(), strict=True):
        kept = [v for v, k in zip(row, known, strict=True) if k]
        if kept:
            total = math.fsum(kept)
            entropies.append(math.fsum(-v / total * math.log(v / total) for v in kept if v > 0))
    entropy = torch.tensor([math.fsum(entropies), len(entropies)], dtype=torch.float64)
    return Statistics(of(weights), None if td is None else of(td), entropy)


def assert_same(found: Statistics, expected: Statistics) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == torch.float64
            torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_td", [True, False])
def test_statistics(arm, places, with_td):
    td_BS, weights_BS = decision_weights(TDWeights(*places, td_lambda=0.5))
    weights_BS = torch.where(places.decisions, weights_BS, math.nan)  # elsewhere nothing counts
    td_BS = torch.where(places.decisions, td_BS, math.inf)
    td = td_BS if with_td else None
    assert_same(
        decision_statistics(weights_BS, places.decisions, td), statistics_loop(weights_BS, places.decisions, td)
    )


def test_entropy_lies_between_one_decision_and_all_alike(arm):
    weights = torch.tensor([[2.0, 0, 0], [0.3, 0.3, 0.3], [0, 0, 0], [1, 1, 9], [0.1, 5.0, 0]], device=arm.device)
    decisions = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 0]], device=arm.device).bool()
    found = decision_statistics(weights, decisions)
    # One decision: 0; three alike: log 3; weights that are all 0: 0; no decision: not counted.
    shares = (0.1 / 5.1, 5.0 / 5.1)
    expected = math.log(3) - sum(p * math.log(p) for p in shares)
    torch.testing.assert_close(
        found.entropy.cpu(), torch.tensor([expected, 4.0], dtype=torch.float64), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0), (2, 3)])
def test_statistics_of_nothing(arm, shape):
    nothing = torch.ones(shape, device=arm.device)
    found = decision_statistics(nothing, torch.zeros(shape, dtype=torch.bool, device=arm.device), nothing)
    empty = torch.tensor([0.0, 0.0, 0.0, -math.inf, -math.inf], dtype=torch.float64)
    assert_same(found, Statistics(empty, empty, torch.zeros(2, dtype=torch.float64)))


def test_statistics_of_any_layout(arm):
    places = decide(arm, 4, 9)
    wide = torch.stack([places.values, -places.values], -1)
    decisions = torch.stack([places.decisions, ~places.decisions], -1)[..., 0]
    found = decision_statistics(wide[..., 0], decisions, wide[..., 1])
    assert_same(found, statistics_loop(places.values, places.decisions, -places.values))


def test_statistics_of_other_floats(arm):
    places = decide(arm, 4, 9)
    for dtype in (torch.float64, torch.bfloat16):
        weights = places.values.to(dtype)
        assert_same(decision_statistics(weights, places.decisions), statistics_loop(weights, places.decisions, None))
