"""The value head against its formula, in every precision."""

import math

import pytest
import torch
from torch import nn

from wmtp_ds.models.value_head import ValueHead
from wmtp_ds.value_head_file import HEADS

D = 24
KINDS = [(kind, activation) for kind in ("linear", "mlp") for activation in ("sigmoid", "none")]


def random_head(kind: str, activation: str) -> ValueHead:
    generator = torch.Generator().manual_seed(3)
    head = ValueHead(D, kind, activation)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return head


def formula(head: ValueHead, kind: str, activation: str, position: list[float]) -> float:
    """One position in double precision, in plain Python."""
    state = {name: value.double().tolist() for name, value in head.state_dict().items()}
    root = math.sqrt(sum(x * x for x in position) / D + 1e-6)
    x = [value / root * gain for value, gain in zip(position, state["norm.weight"], strict=True)]
    if kind == "mlp":
        rows = zip(state["hidden.weight"], state["hidden.bias"], strict=True)
        x = [sum(w * v for w, v in zip(row, x, strict=True)) + bias for row, bias in rows]
        x = [value / (1 + math.exp(-value)) for value in x]
    logit = sum(w * v for w, v in zip(state["output.weight"][0], x, strict=True)) + state["output.bias"][0]
    return 1 / (1 + math.exp(-logit)) if activation == "sigmoid" else logit


@pytest.mark.parametrize(("kind", "activation"), KINDS)
def test_against_the_formula(kind, activation):
    head = random_head(kind, activation)
    trunk = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(4)) * 3
    values = head(trunk)
    assert (values.shape, values.dtype) == ((2, 5, 1), torch.float32)
    expected = [[[formula(head, kind, activation, position)] for position in row] for row in trunk.double().tolist()]
    torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "activation"), KINDS)
def test_an_untrained_head_says_one_half(kind, activation):
    head = ValueHead(D, kind, activation)
    start = head(torch.randn(2, 5, D) * 10)
    assert torch.equal(start, torch.full((2, 5, 1), 0.5 if activation == "sigmoid" else 0.0))
    head(torch.randn(2, 5, D)).sum().backward()
    assert head.output.weight.grad.abs().max() > 0, "it can learn from there"


@pytest.mark.parametrize(("kind", "activation"), KINDS)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_float32(kind, activation, weights, inputs):
    head = random_head(kind, activation).to(weights)
    exact = random_head(kind, activation)
    exact.load_state_dict({name: value.float() for name, value in head.state_dict().items()})
    trunk = torch.randn(2, 5, D).to(inputs)
    values = head(trunk)
    assert values.dtype == torch.float32
    assert torch.equal(values, exact(trunk.float()))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_autocast_is_kept_out(kind):
    head = random_head(kind, "sigmoid")
    trunk = torch.randn(2, 5, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(trunk)
    assert torch.equal(values, head(trunk))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_gradients_reach_weights_and_trunk(weights):
    head = random_head("mlp", "sigmoid").to(weights)
    trunk = torch.randn(2, 5, D, requires_grad=True)
    head(trunk).sum().backward()
    assert trunk.grad.abs().min() > 0
    for name, parameter in head.named_parameters():
        assert parameter.grad.dtype == weights
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("kind", "activation"), KINDS)
def test_names_and_shapes_of_parameters(kind, activation):
    shapes = {name: list(parameter.shape) for name, parameter in ValueHead(D, kind, activation).named_parameters()}
    expected = {"norm.weight": [D], "output.weight": [1, D], "output.bias": [1]}
    if kind == "mlp":
        expected |= {"hidden.weight": [D, D], "hidden.bias": [D]}
    assert shapes == expected
    assert shapes.keys() == set(HEADS[kind]), "what the file of a value head holds"


def test_the_norm_is_its_own_and_starts_at_one():
    head = ValueHead(D)
    assert isinstance(head.norm, nn.RMSNorm)
    assert torch.equal(head.norm.weight, torch.ones(D))
    # Scaling the trunk's output changes nothing.
    head = random_head("linear", "none")
    trunk = torch.randn(2, 5, D) * 10
    torch.testing.assert_close(head(trunk * 7), head(trunk), rtol=1e-4, atol=1e-5)


def test_what_is_no_kind_of_head():
    with pytest.raises(ValueError, match=r"value_head\.type .* not 'deep'"):
        ValueHead(D, "deep")
    with pytest.raises(ValueError, match=r"value_head\.activation .* not 'tanh'"):
        ValueHead(D, "linear", "tanh")
