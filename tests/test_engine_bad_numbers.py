"""What the engine does around DeepSpeed's step where numbers are bad; the step itself is tested in tests/launch."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wmtp_ds import distributed, rank
from wmtp_ds.engine import Engine
from wmtp_ds.errors import RunError


class Scaler:
    """As DeepSpeed's scaler of float16: halves at an overflow, down to its minimum, at which it would raise."""

    def __init__(self, dynamic: bool = True, scale: float = 4.0):
        self.dynamic, self.cur_scale, self.min_scale = dynamic, scale, 1.0
        self.raise_error_at_min_scale = True


class Inner:
    """An engine of DeepSpeed, as far as a step goes."""

    def __init__(self, scaler: Scaler):
        self.optimizer = SimpleNamespace(loss_scaler=scaler, overflow=False)
        self.overflows = False
        self.losses: list[Tensor] = []

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        self.losses.append(loss)
        loss.backward()

    def step(self) -> None:
        scaler = self.optimizer.loss_scaler
        self.optimizer.overflow = self.overflows
        if self.overflows and scaler.dynamic:
            if scaler.cur_scale == scaler.min_scale and scaler.raise_error_at_min_scale:
                raise Exception("Current loss scale already at minimum")
            scaler.cur_scale = max(scaler.cur_scale / 2, scaler.min_scale)


def engine(scaler: Scaler, world_size: int = 1) -> Any:
    made: Any = Engine.__new__(Engine)
    made._engine, made.world_size, made.rescaled = Inner(scaler), world_size, False
    made._never_raise_for_loss_scale()
    return made


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_makes_the_gradient_nan(loss):
    weight = torch.ones(3, requires_grad=True)
    # The gradient of a sum of the weights is finite, whatever is added to it.
    engine(Scaler(dynamic=False), world_size=4).backward(weight.sum() + loss)
    assert weight.grad is not None
    assert weight.grad.isnan().all()


@pytest.mark.parametrize("loss", [0.0, 1e-30, 0.3, 1e30])
def test_a_finite_loss_is_multiplied_by_the_ranks_to_the_bit(loss):
    weight = torch.tensor([0.1, 0.7, loss], requires_grad=True)
    made = engine(Scaler(dynamic=False), world_size=3)
    made.backward(weight.prod())
    assert torch.equal(made._engine.losses[0], weight.prod() * 3)
    plain = weight.detach().clone().requires_grad_()
    (plain.prod() * 3).backward()
    assert torch.equal(weight.grad, plain.grad)


def test_an_overflow_counts_as_the_loss_scales_until_that_is_at_its_smallest():
    made = engine(Scaler(scale=4.0))
    seen = []
    for overflows in (False, True, False, True, True, True, False):
        made._engine.overflows = overflows
        made.step()
        seen.append(made.rescaled)
    # 4 -> 2 -> 1, and then the gradient is not finite for another reason, which is no exception of DeepSpeed's.
    assert seen == [False, True, False, True, False, False, False]


def test_without_a_loss_scale_no_overflow_is_its():
    made = engine(Scaler(dynamic=False))
    made._engine.overflows = True
    made.step()
    assert not made.rescaled


@pytest.mark.parametrize("error", [RunError("all of us", everywhere=True), RunError("this rank")])
@pytest.mark.parametrize("main", [True, False])
def test_what_all_ranks_raise_one_says_before_any_leaves(monkeypatch, capsys, error, main):
    order: list[str] = []

    def leave(code: int) -> None:
        order.append(f"left with {code}")
        raise SystemExit(code)

    def work() -> int:
        raise error

    monkeypatch.setattr(distributed, "initialized", lambda: True)
    monkeypatch.setattr(distributed, "is_main", lambda: main)
    monkeypatch.setattr(distributed, "barrier", lambda: order.append(f"waited after {capsys.readouterr().err!r}"))
    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(SystemExit):
        rank.run_rank(work)
    if error.everywhere:
        said = "error: all of us\n" if main else ""
        assert order == [f"waited after {said!r}", "left with 1"]
    else:
        assert order == ["left with 1"]
        assert capsys.readouterr().err == "error: this rank\n"
