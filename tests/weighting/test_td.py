"""TD errors, GAE, returns and weights against loops written from their definitions."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wmtp_ds.weighting import build_weights, compute_gae, compute_td_errors
from wmtp_ds.weighting.td import discounted_returns, last_decisions

unit = st.floats(0.0, 1.0, width=32)
Rows = list[list[float]]


def td_oracle(values: Rows, rewards: Sequence[float], gamma: float, decisions: list[list[bool]]) -> Rows:
    """``δ_i = γ·V_{i+1} − V_i`` before the last decision, ``R − V_{i*}`` there, 0 elsewhere."""
    out = []
    for v, r, d in zip(values, rewards, decisions, strict=True):
        chosen = [i for i, yes in enumerate(d) if yes]
        row = [0.0] * len(v)
        for i in chosen:
            row[i] = r - v[i] if i == chosen[-1] else gamma * v[i + 1] - v[i]
        out.append(row)
    return out


def gae_oracle(deltas: Rows, decay: float, decisions: list[list[bool]]) -> Rows:
    """``A_i = Σ_l (γλ)^l δ_{i+l}`` as the double sum that it is."""
    return [
        [sum(decay**ahead * row[i + ahead] for ahead in range(len(row) - i)) if d[i] else 0.0 for i in range(len(row))]
        for row, d in zip(deltas, decisions, strict=True)
    ]


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Rows, list[float], list[list[bool]]]:
    """Values, rewards and decisions (contiguous, as of a solution after a prompt; possibly none)."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rows = st.lists(unit, min_size=length, max_size=length)
    values = draw(st.lists(rows, min_size=batch, max_size=batch))
    rewards = draw(st.lists(unit, min_size=batch, max_size=batch))
    decisions = []
    for _ in range(batch):
        begin, end = sorted((draw(st.integers(0, length)), draw(st.integers(0, length))))
        decisions.append([begin <= i < end for i in range(length)])
    return values, rewards, decisions


def tensors(case: tuple[Rows, list[float], list[list[bool]]]) -> tuple[Tensor, Tensor, Tensor]:
    values, rewards, decisions = case
    return (
        torch.tensor(values, dtype=torch.float64)[..., None],
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(decisions),
    )


def close(found: Tensor, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=tolerance, atol=tolerance)


def test_td_errors_by_hand():
    values = torch.tensor([[0.5, 0.6, 0.8, 0.3, 0.9], [0.2, 0.4, 0.1, 0.7, 0.6]])[..., None]
    decisions = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    found = compute_td_errors(values, torch.tensor([1.0, 0.0]), 0.5, decisions)
    # Row 0: 0.5·0.8 − 0.6, 0.5·0.3 − 0.8, 1 − 0.3. Row 1: 0.5·0.4 − 0.2, 0 − 0.4.
    close(found, [[0.0, -0.2, -0.65, 0.7, 0.0], [0.0, -0.4, 0.0, 0.0, 0.0]], 1e-6)
    assert found.dtype == torch.float32


def test_without_a_mask_the_last_position_earns_the_reward():
    found = compute_td_errors(torch.tensor([[[0.25], [0.5], [0.75]]]), torch.tensor([0.0]))
    close(found, [[0.25, 0.25, -0.75]])


def test_one_token():
    values, rewards = torch.tensor([[[0.25]], [[0.5]]]), torch.tensor([1.0, 1.0])
    mask = torch.tensor([[True], [False]])
    close(compute_td_errors(values, rewards, 1.0, mask), [[0.75], [0.0]])
    close(compute_gae(values, rewards, 1.0, 0.95, mask), [[0.75], [0.0]])
    close(discounted_returns(mask, rewards, 0.5), [[1.0], [0.0]])


def test_a_gap_between_decisions_follows_the_definition():
    """``i + 1`` is the next position, decision or not; only the last decision earns the reward."""
    values = [[0.5, 0.25, 0.75, 0.125, 1.0]]
    decisions = [[True, False, True, False, False]]
    args = torch.tensor(values)[..., None], torch.tensor([1.0])
    close(compute_td_errors(*args, 1.0, torch.tensor(decisions)), [[-0.25, 0.0, 0.25, 0.0, 0.0]])
    # A_0 = δ_0 + 0.5²·δ_2.
    close(compute_gae(*args, 1.0, 0.5, torch.tensor(decisions)), [[-0.1875, 0.0, 0.25, 0.0, 0.0]])


@settings(deadline=None, max_examples=80)
@given(sequences(), unit)
def test_td_errors_match_the_loop_and_stay_within_one(case, gamma):
    values, rewards, decisions = tensors(case)
    found = compute_td_errors(values, rewards, gamma, decisions)
    close(found, td_oracle(case[0], case[1], gamma, case[2]))
    assert found.abs().max() <= 1.0
    assert found.dtype == torch.float64
    # In float32, too, rounding does not leave the interval.
    assert compute_td_errors(values.float(), rewards.float(), gamma, decisions).abs().max() <= 1.0


@settings(deadline=None, max_examples=80)
@given(sequences(), unit, unit)
def test_gae_matches_the_double_sum(case, gamma, lam):
    found = compute_gae(*tensors(case)[:2], gamma, lam, tensors(case)[2])
    deltas = td_oracle(case[0], case[1], gamma, case[2])
    close(found, gae_oracle(deltas, gamma * lam, case[2]), 1e-10)


@settings(deadline=None, max_examples=30)
@given(sequences(), unit)
def test_gae_of_lambda_zero_is_td_and_of_one_telescopes(case, gamma):
    values, rewards, decisions = tensors(case)
    td = compute_td_errors(values, rewards, gamma, decisions)
    assert torch.equal(compute_gae(values, rewards, gamma, 0.0, decisions), td)
    monte_carlo = [[r - x if yes else 0.0 for x, yes in zip(v, d, strict=True)] for v, r, d in zip(*case, strict=True)]
    close(compute_gae(values, rewards, 1.0, 1.0, decisions), monte_carlo, 1e-10)


def test_gae_is_exact_over_a_long_sequence():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(1, 1000, 1, generator=generator, dtype=torch.float64)
    deltas = td_oracle(values.squeeze(-1).tolist(), [1.0], 0.999, [[True] * 1000])[0]
    expected, carried = [0.0] * 1000, 0.0
    for i in reversed(range(1000)):
        carried = deltas[i] + 0.999 * 0.95 * carried
        expected[i] = carried
    close(compute_gae(values, torch.ones(1).double(), 0.999, 0.95), [expected], 1e-11)


@settings(deadline=None, max_examples=50)
@given(sequences(), unit)
def test_returns_are_what_is_left_to_earn(case, gamma):
    _, rewards, decisions = tensors(case)
    expected = []
    for r, d in zip(case[1], case[2], strict=True):
        last = max((i for i, yes in enumerate(d) if yes), default=0)
        expected.append([gamma ** (last - i) * r if yes else 0.0 for i, yes in enumerate(d)])
    close(discounted_returns(decisions, rewards, gamma), expected)


def test_returns_by_hand():
    decisions = torch.tensor([[False, True, True, True, False], [False] * 5])
    close(discounted_returns(decisions, torch.tensor([0.8, 1.0]), 0.5), [[0, 0.2, 0.4, 0.8, 0], [0.0] * 5], 1e-7)
    close(discounted_returns(decisions, torch.tensor([0.8, 1.0]), 0.0), [[0, 0, 0, 0.8, 0], [0.0] * 5], 1e-7)
    close(discounted_returns(decisions, torch.tensor([0.8, 1.0])), [[0, 0.8, 0.8, 0.8, 0], [0.0] * 5], 1e-7)


def test_the_last_decision_of_each_sequence():
    decisions = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()
    assert last_decisions(decisions).tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]


@settings(deadline=None, max_examples=40)
@given(sequences(), unit, unit, st.integers(1, 4), st.sampled_from([math.nan, math.inf, -math.inf, 7.0]))
def test_padding_never_matters(case, gamma, lam, extra, rubbish):
    values, rewards, decisions = tensors(case)
    length = decisions.shape[1]
    dirty = torch.where(decisions[..., None], values, rubbish)
    longer = torch.nn.functional.pad(dirty, (0, 0, 0, extra), value=rubbish).requires_grad_()
    mask = torch.nn.functional.pad(decisions, (0, extra))
    for function, args in ((compute_td_errors, (gamma,)), (compute_gae, (gamma, lam))):
        expected = function(values, rewards, *args, decisions)
        found = function(longer, rewards, *args, mask)
        torch.testing.assert_close(found[:, :length], expected, rtol=1e-12, atol=1e-12)
        assert (found[:, length:] == 0).all()
        (grad,) = torch.autograd.grad(found.sum(), longer)
        assert grad.isfinite().all()
        assert (grad[~mask] == 0).all()


def test_td_and_gae_are_differentiable():
    decisions = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    values = torch.rand(2, 5, 1, dtype=torch.float64).requires_grad_()
    rewards = torch.rand(2, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda v, r: compute_td_errors(v, r, 0.9, decisions), (values, rewards))
    torch.autograd.gradcheck(lambda v, r: compute_gae(v, r, 0.9, 0.8, decisions), (values, rewards))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_values_are_computed_with_in_float32(dtype):
    values = torch.rand(2, 6, 1).to(dtype)
    found = compute_gae(values, torch.ones(2), 0.99, 0.95)
    assert found.dtype == torch.float32
    assert torch.equal(found, compute_gae(values.float(), torch.ones(2), 0.99, 0.95))


def test_wrong_shapes_are_refused():
    values = torch.zeros(2, 3, 1)
    with pytest.raises(ValueError, match=r"\[B, S, 1\], not \[2, 3\]"):
        compute_td_errors(values.squeeze(-1), torch.zeros(2))
    with pytest.raises(ValueError, match=r"rewards must have shape \[2\], not \[2, 1\]"):
        compute_td_errors(values, torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"mask of decisions must have shape \[2, 3\], not \[2, 4\]"):
        compute_gae(values, torch.zeros(2), attention_mask=torch.ones(2, 4))


def test_weights_by_hand():
    deltas = torch.tensor([-9.0, -1.0, -0.45, 0.0, 0.9, 1.0, 9.0], dtype=torch.float64)
    expected = [0.1, 0.32919298780790557, 0.6065306597126334, 1.0, math.e, 3.0377317775174826, 5.0]
    close(build_weights(deltas), expected)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20),
    st.floats(0.01, 10),
    st.floats(0, 1),
    st.floats(1, 20),
)
def test_weights_match_the_formula_and_stay_within_the_clip(deltas, beta, low, high):
    found = build_weights(torch.tensor(deltas, dtype=torch.float64), beta, low, high)
    close(found, [min(max(math.exp(delta / beta), low), high) for delta in deltas])
    assert low <= found.min()
    assert found.max() <= high
    ordered = build_weights(torch.tensor(sorted(deltas), dtype=torch.float64), beta, low, high).tolist()
    assert all(a <= b for a, b in pairwise(ordered))  # a better decision never weighs less


@settings(deadline=None, max_examples=60)
@given(st.floats(-1, 1, width=32), st.lists(st.floats(0.01, 10), min_size=2, max_size=6))
def test_a_smaller_beta_is_more_extreme(delta, betas):
    weights = [build_weights(torch.tensor([delta], dtype=torch.float64), beta).item() for beta in sorted(betas)]
    for smaller, larger in pairwise(weights):
        if delta > 0:
            assert 1.0 <= larger <= smaller
        else:
            assert smaller <= larger <= 1.0


def test_weights_are_differentiable_up_to_the_clip_and_never_overflow():
    smooth = torch.tensor([-1.0, -0.2, 0.3, 1.1], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda d: build_weights(d), (smooth,))
    extreme = torch.tensor([-1e4, -3.0, 3.0, 1e4], requires_grad=True)
    weights = build_weights(extreme, beta=0.01)
    weights.sum().backward()
    close(weights.detach(), [0.1, 0.1, 5.0, 5.0])
    assert extreme.grad is not None
    assert extreme.grad.tolist() == [0.0] * 4
    assert build_weights(torch.tensor([-1e4]), min_weight=0.0).item() == 0.0


def test_bad_betas_and_clips_are_refused():
    with pytest.raises(ValueError, match="beta must be positive, not 0"):
        build_weights(torch.zeros(1), beta=0.0)
    with pytest.raises(ValueError, match="0 <= min <= max"):
        build_weights(torch.zeros(1), min_weight=2.0, max_weight=1.0)
    with pytest.raises(ValueError, match="0 <= min <= max"):
        build_weights(torch.zeros(1), min_weight=-0.1)
