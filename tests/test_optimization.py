"""Learning-rate schedules by hand and by their promises; which parameters are decayed, and at which rate they learn."""

import math
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wmtp_ds.models.value_head import ValueHead
from wmtp_ds.optimization import lr_schedule, param_groups

names = st.sampled_from(["constant", "linear", "cosine"])


def test_schedules_by_hand():
    """10 steps, of which ⌈0.2·10⌉ = 2 warm up."""
    third = 1 / 3
    constant, linear, cosine = (lr_schedule(name, 10, 0.2) for name in ("constant", "linear", "cosine"))
    assert [constant(step) for step in range(4)] == pytest.approx([third, 2 * third, 1.0, 1.0])
    assert [linear(step) for step in (0, 1, 2, 3, 6, 9, 10)] == pytest.approx(
        [third, 2 * third, 1.0, 7 / 8, 0.5, 1 / 8, 0.0]
    )
    assert [cosine(step) for step in (0, 2, 4, 6, 8, 10)] == pytest.approx(
        [third, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0]
    )


@pytest.mark.parametrize(
    ("ratio", "total", "warmup"), [(0.07, 100, 7), (0.55, 100, 55), (0.03, 100, 3), (0.031, 100, 4)]
)
def test_the_warm_up_is_counted_in_decimals(ratio, total, warmup):
    factor = lr_schedule("constant", total, ratio)
    assert factor(warmup - 1) == pytest.approx(warmup / (warmup + 1))
    assert factor(warmup) == 1.0


@settings(deadline=None, max_examples=100)
@given(names, st.integers(1, 300), st.floats(0, 1))
def test_every_schedule_rises_strictly_then_never_again(name, total, ratio):
    factors = [lr_schedule(name, total, ratio)(step) for step in range(total + 1)]
    warmup = math.ceil(Fraction(Decimal(repr(ratio))) * total)
    assert all(0 < x <= 1 for x in factors[:-1])  # no step of the run is wasted
    assert all(a < b for a, b in pairwise(factors[: warmup + 1]))
    assert all(a >= b for a, b in pairwise(factors[warmup:]))
    assert factors[warmup] == 1.0 or warmup == total
    beyond = lr_schedule(name, total, ratio)(total + 50)
    assert 0 <= beyond <= 1


def test_after_the_last_step_the_rate_stays_at_zero():
    for name in ("linear", "cosine"):
        assert lr_schedule(name, 10, 0.0)(10) == pytest.approx(0.0, abs=1e-12)
        assert lr_schedule(name, 10, 0.0)(99) == pytest.approx(0.0, abs=1e-12)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="constant, linear or cosine, not 'polynomial'"):
        lr_schedule("polynomial", 10, 0.0)


class Model(nn.Module):
    """Named as a stage's model names its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.RMSNorm(4))
        self.value_head = ValueHead(4, "mlp")


def group(model: nn.Module) -> list[dict[str, object]]:
    return param_groups(model, learning_rate=1e-3, value_lr=1e-2, weight_decay=0.1)


def test_matrices_decay_and_the_value_head_has_its_own_rate():
    model = Model()
    names = {id(p): name for name, p in model.named_parameters()}
    found = [({names[id(p)] for p in g["params"]}, g["lr"], g["weight_decay"]) for g in group(model)]
    assert found == [
        ({"policy.0.weight", "policy.1.weight"}, 1e-3, 0.1),
        ({"policy.1.bias", "policy.2.weight"}, 1e-3, 0.0),
        ({"value_head.hidden.weight", "value_head.output.weight"}, 1e-2, 0.1),
        ({"value_head.norm.weight", "value_head.hidden.bias", "value_head.output.bias"}, 1e-2, 0.0),
    ]


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = Model()
    model.policy.requires_grad_(False)
    assert [g["lr"] for g in group(model)] == [1e-2, 1e-2]
    model.value_head.norm.requires_grad_(False)
    model.value_head.hidden.bias.requires_grad_(False)
    model.value_head.output.bias.requires_grad_(False)
    assert [g["weight_decay"] for g in group(model)] == [0.1]
    model.requires_grad_(False)
    assert group(model) == []


def test_a_partitioned_matrix_is_still_a_matrix():
    """Under ZeRO-3 every parameter is flat and empty; its shape is kept beside it."""
    model = Model()
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.zeros(0)
    assert [(len(g["params"]), g["weight_decay"]) for g in group(model)] == [(2, 0.1), (2, 0.0), (2, 0.1), (3, 0.0)]


def test_the_groups_fit_a_torch_optimizer():
    optimizer = torch.optim.AdamW(group(Model()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_schedule("linear", 4, 0.5))
    assert scheduler.get_last_lr() == pytest.approx([1e-3 / 3, 1e-3 / 3, 1e-2 / 3, 1e-2 / 3])
