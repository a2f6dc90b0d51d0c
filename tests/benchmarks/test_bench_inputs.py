"""Inputs with peaked logits, and the oracle in float64."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from wmtp_kernel_benchmarks import arms, oracle, run
from wmtp_kernel_benchmarks.inputs import Inputs, Sizes, make_inputs
from wmtp_kernel_benchmarks.options import Settings, plan

CPU = torch.device("cpu")
TINY = Sizes(heads=3, sequences=2, length=12, dim=32, vocabulary=50)
arm_named = {arm.name: arm for arm in arms.all_arms()}.__getitem__


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, sizes: Sizes = TINY, k_percent: float = 0.6) -> Inputs:
    return make_inputs(sizes, dtype, CPU, seed, k_percent)


@pytest.mark.parametrize("vocabulary", [512, 32_000])
def test_logits_are_peaked_and_spread(vocabulary):
    inputs = tiny(sizes=Sizes(heads=2, sequences=2, length=48, dim=128, vocabulary=vocabulary))
    losses = F.cross_entropy(
        inputs.hidden_rows.double() @ inputs.weight_VD.double().T, inputs.target_rows, reduction="none"
    )
    losses = losses.detach()[inputs.target_rows != -100]
    assert losses.mean().item() == pytest.approx(inputs.mean_cross_entropy, rel=1e-4)
    assert 2.0 < losses.mean() < 3.0
    assert (losses < 0.7).float().mean() > 0.1  # some tokens are all but certain
    assert (losses > 4.0).float().mean() > 0.1


def test_inputs_are_random_and_those_of_the_seed():
    one, same, other = tiny(1), tiny(1), tiny(2)
    for name in ("hidden_nBSD", "weight_VD", "values_BS", "reference_nBS"):
        assert torch.equal(getattr(one, name), getattr(same, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).count_nonzero() > 0.8 * getattr(one, name).numel()


def test_the_sets_of_a_run_are_taken_in_turn(monkeypatch, tmp_path):
    seen: list[int] = []
    right = arm_named("torch")
    watched = dataclasses.replace(
        right,
        make=lambda device, dtype: lambda inputs: seen.append(id(inputs.weight_VD)) or right.make(CPU, dtype)(inputs),
    )
    monkeypatch.setattr(run, "choose", lambda names: (arms.TORCH_ARMS[0], watched))
    run.measure(plan(Settings(quick=True, sweep=False, rounds=4, output=tmp_path), "cpu"), "", CPU)
    timed = seen[-4:]
    assert timed[0] == timed[2]
    assert timed[1] == timed[3]
    assert timed[0] != timed[1]


def test_targets_and_weights_of_the_heads_are_aligned():
    inputs = tiny()
    heads, batch, length = inputs.targets_nBS.shape
    weights_BS = torch.empty(batch, length)
    for b in range(batch):
        for i in range(length):
            following = inputs.values_BS[b, i + 1] if i + 1 < length else inputs.rewards_B[b]
            weights_BS[b, i] = min(max(torch.exp((following - inputs.values_BS[b, i]) / 0.9).item(), 0.1), 5.0)
    for k in range(heads):
        for i in range(length):
            if i + k < length:  # head k (of 0, 1, ..) at i is taught what head 0 is taught at i + k, and as much
                assert torch.equal(inputs.targets_nBS[k, :, i], inputs.targets_nBS[0, :, i + k])
                torch.testing.assert_close(inputs.weights_nBS[k, :, i], weights_BS[:, i + k])
            else:
                assert (inputs.targets_nBS[k, :, i] == -100).all()
                assert (inputs.weights_nBS[k, :, i] == 0).all()
    assert (inputs.targets_nBS[0] >= 0).all()
    expected = torch.tensor([1 / (heads * batch * (length - k)) for k in range(heads)])
    torch.testing.assert_close(inputs.scales_n, expected)
    # 60 % of 24, 22 and 20 targets of a batch, and of 12, 11 and 10 of a sequence
    for scope, counts in {"batch": [15, 14, 12], "sequence": [16, 14, 12]}.items():
        torch.testing.assert_close(inputs.selected_scales(scope), torch.tensor([1 / (3 * count) for count in counts]))


def test_the_oracle_agrees_with_autograd():
    inputs = tiny(dtype=torch.float64)
    hidden, weight = (x.detach().clone().requires_grad_() for x in (inputs.hidden_rows, inputs.weight_VD))
    losses_N = F.cross_entropy(hidden @ weight.T, inputs.target_rows, reduction="none")
    coefficients_N = inputs.coefficient_rows.double()
    (losses_N * coefficients_N).sum().backward()
    truth = oracle.weighted_loss(hidden.detach(), weight.detach(), inputs.target_rows, coefficients_N)
    torch.testing.assert_close(truth.loss, (losses_N * coefficients_N).sum().detach())
    torch.testing.assert_close(truth.grad_hidden_ND, hidden.grad)
    torch.testing.assert_close(truth.grad_weight_VD, weight.grad)
    torch.testing.assert_close(oracle.cross_entropy(hidden, weight, inputs.target_rows), losses_N.detach())


@pytest.mark.parametrize("rows", [1, 7, 48])
def test_the_oracle_does_not_depend_on_its_chunks(monkeypatch, rows):
    inputs = tiny(dtype=torch.float64)
    arguments = (inputs.hidden_rows.detach(), inputs.weight_VD.detach(), inputs.target_rows, inputs.coefficient_rows)
    whole = oracle.weighted_loss(*arguments)
    monkeypatch.setattr(oracle, "_CHUNK_ROWS", rows)
    cut = oracle.weighted_loss(*arguments)
    for one, other in zip(dataclasses.astuple(whole), dataclasses.astuple(cut), strict=True):
        torch.testing.assert_close(one, other)


def test_gae_of_the_oracle_is_the_sum_that_defines_it():
    values_BS, rewards_B = torch.rand(2, 6, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    deltas_BS = torch.cat([values_BS[:, 1:], rewards_B[:, None]], 1) - values_BS
    expected = torch.stack([sum(0.95**j * deltas_BS[:, i + j] for j in range(6 - i)) for i in range(6)], dim=1)
    found = oracle.td_weights(values_BS, rewards_B, 0.9, 0.0, 99.0, td_lambda=0.95)
    torch.testing.assert_close(found.log() * 0.9, expected)
