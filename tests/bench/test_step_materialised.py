"""The arm with materialised logits is the same model: the kernels' losses and gradients, and their logits in memory."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp_ds.bench import materialised
from wmtp_ds.stages import base, rho1
from wmtp_kernels import (
    IGNORE_INDEX,
    TDWeights,
    reference_cross_entropy,
    rho1_linear_cross_entropy,
    td_weighted_linear_cross_entropy,
)

N_HEADS, BATCH, LENGTH, DIM, VOCABULARY = 3, 2, 7, 8, 29


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N_HEADS, BATCH, LENGTH, DIM, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, DIM, generator=generator).requires_grad_()
    targets = torch.randint(VOCABULARY, (N_HEADS, BATCH, LENGTH), generator=generator)
    targets[:, 0, 5:] = IGNORE_INDEX
    targets[2, 1, 4:] = IGNORE_INDEX
    return hidden, weight, targets


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ready", [True, False])
def test_td_weighted(inputs, ready):
    hidden, weight, targets = inputs
    decisions = targets[0] != IGNORE_INDEX
    weights = torch.rand(BATCH, LENGTH) * decisions
    if not ready:
        weights = TDWeights(torch.rand(BATCH, LENGTH), torch.tensor([1.0, 0.0]), decisions)
    scales = torch.tensor([0.5, 0.2, 0.1])
    arguments = (hidden, weight, targets, weights)
    expected = td_weighted_linear_cross_entropy(*arguments, scales_n=scales)
    found = materialised.td_weighted_linear_cross_entropy(*arguments, scales_n=scales, counts_nB=None)
    same(found.loss, expected.loss)
    same(found.losses_n, expected.losses_n)
    same(found.weights_BS, expected.weights_BS)
    same(found.statistics.weights, expected.statistics.weights)
    same(gradients(found.loss, hidden, weight), gradients(expected.loss, hidden, weight))


@pytest.mark.parametrize(
    "options", [{"k_percent": 0.6}, {"k_percent": 0.5, "scope": "sequence"}, {"weighting": "softmax"}]
)
def test_rho1(inputs, options):
    hidden, weight, targets = inputs
    reference, scales = 3 * torch.rand(N_HEADS, BATCH, LENGTH), torch.tensor([0.5, 0.2, 0.1])
    arguments = (hidden, weight, targets, reference)
    expected = rho1_linear_cross_entropy(*arguments, scales_n=scales, **options)
    found = materialised.rho1_linear_cross_entropy(*arguments, scales_n=scales, **options)
    same(found, expected)
    same(gradients(found[0], hidden, weight), gradients(expected[0], hidden, weight))


def test_reference(inputs):
    hidden, weight, targets = inputs
    arguments = (hidden[0].flatten(0, 1), weight, targets[0].flatten())
    same(materialised.reference_cross_entropy(*arguments, count=3), reference_cross_entropy(*arguments))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_all_logits_of_all_heads_are_there_at_once(inputs):
    hidden, weight, targets = inputs
    with Largest() as seen:
        materialised.td_weighted_linear_cross_entropy(hidden, weight, targets, torch.ones(BATCH, LENGTH))
    assert seen.elements == N_HEADS * BATCH * LENGTH * VOCABULARY


class Model:
    """As much of a StageModel as is looked at."""

    def __init__(self, trains_policy: bool):
        self.stage = type("Stage", (), {"trains_policy": trains_policy})
        self.hooks: list = []
        self.logits: list = []

        def unembed(hidden):
            logits = hidden.sum(-1)
            self.logits.append(weakref.ref(logits))
            return logits

        self.policy = type("Policy", (), {"lm_head": staticmethod(unembed), "head_states": staticmethod(lambda x: x)})

    def trunk(self, batch):
        return batch

    def register_forward_hook(self, hook):
        self.hooks.append(hook)


@pytest.fixture
def restored(monkeypatch):
    for module in (base, rho1):
        for name in materialised._REPLACEMENTS:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name))


def test_it_takes_the_kernels_places(restored):
    model = Model(trains_policy=True)
    materialised.install(model)
    assert base.td_weighted_linear_cross_entropy is materialised.td_weighted_linear_cross_entropy
    assert rho1.rho1_linear_cross_entropy is materialised.rho1_linear_cross_entropy
    assert not model.hooks
    kernels = [name for name in vars(base) if name.endswith("linear_cross_entropy")]
    assert set(kernels) <= set(materialised._REPLACEMENTS), "a loss that has no materialised form"


def test_a_stage_that_has_no_use_for_logits_holds_them_all_the_same(restored):
    model = Model(trains_policy=False)
    materialised.install(model)
    batch = torch.ones(2, 3)
    assert model.trunk(batch) is batch
    [logits] = model.logits
    assert logits() is not None
    model.hooks[0]()  # after the forward pass they are let go
    assert logits() is None
