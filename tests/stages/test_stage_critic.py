"""The critic's loss against loops, and that nothing but the value head learns."""

import pytest
import torch
from torch import Tensor

from wmtp_ds.data.batches import Batch
from wmtp_ds.stages.base import StageModel

ERRORS = {
    "mse": lambda e: e**2,
    "mae": lambda e: abs(e),
    "huber": lambda e: e**2 / 2 if abs(e) <= 1 else abs(e) - 0.5,
}


def value_targets(values: list[list[float]], batch: Batch, target: str, gamma: float, lam: float) -> list[list[float]]:
    """``γ^(i*−i)·R``, or ``V_i + A_i``; on decisions, anything elsewhere."""
    out = []
    for v, d, r in zip(values, batch.decisions.tolist(), batch.rewards.tolist(), strict=True):
        chosen = [i for i, yes in enumerate(d) if yes]
        row = [0.0] * len(v)
        for i in chosen:
            if target == "return":
                row[i] = gamma ** (chosen[-1] - i) * r
            else:
                deltas = [r - v[j] if j == chosen[-1] else gamma * v[j + 1] - v[j] for j in chosen if j >= i]
                row[i] = v[i] + sum((gamma * lam) ** ahead * delta for ahead, delta in enumerate(deltas))
        out.append(row)
    return out


def value_loss(model: StageModel, batch: Batch, gamma: float, lam: float) -> Tensor:
    values = model.value_head(model.policy.trunk(batch.input_ids)).squeeze(-1)
    cfg = model.stage.training
    targets = value_targets(values.tolist(), batch, cfg.value_target, gamma, lam)
    errors = [ERRORS[cfg.loss_type](values[b, i] - targets[b][i]) for b, i in batch.decisions.nonzero().tolist()]
    return torch.stack(errors).mean()


@pytest.mark.parametrize("loss_type", ["mse", "huber", "mae"])
@pytest.mark.parametrize("value_target", ["return", "gae"])
@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_the_mean_error_of_decisions(
    loss_type, value_target, activation, make_model, batch, run, gradients, assert_same
):
    model = make_model(
        "critic",
        activation=activation,
        loss_type=loss_type,
        value_target=value_target,
        gamma=0.9,
        gae_lambda=0.7,
    )
    if activation == "none":
        model.value_head.output.weight.data.mul_(5)  # far errors too, where huber is straight
    output, grads = run(model, [batch])
    expected = value_loss(model, batch, 0.9, 0.7)
    torch.testing.assert_close(output.loss, expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same(grads, gradients(model, expected))
    assert output.shares == {"train/value_loss": output.loss}
    assert all(grads[f"value_head.{name}"].any() for name in ("norm.weight", "output.weight", "output.bias"))


def test_only_the_value_head_learns(make_model, batch, run):
    model = make_model("critic")
    run(model, [batch])
    assert all(p.grad is None for p in model.policy.parameters())
    assert all(p.grad is not None for p in model.value_head.parameters())


def test_the_trunk_runs_without_gradient_whatever_its_parameters_say(make_model, batch, run):
    model = make_model("critic")
    model.policy.requires_grad_(True)
    run(model, [batch])
    assert all(p.grad is None for p in model.policy.parameters())
    assert not model.trunk(batch).requires_grad


def test_statistics_of_values_are_over_decisions(make_model, batch, run):
    model = make_model("critic")
    output, _ = run(model, [batch])
    values = model(batch, mode="values").squeeze(-1)[batch.decisions].double()
    count, total, squares, negative_low, high = output.moments["value"].tolist()
    assert count == 16
    assert total == pytest.approx(values.sum().item())
    assert squares == pytest.approx((values**2).sum().item())
    assert (-negative_low, high) == (values.min().item(), values.max().item())


def test_an_untrained_head_is_undecided(make_model, batch, run):
    model = make_model("critic")
    model.value_head.output.weight.data.zero_()
    output, _ = run(model, [batch])
    # Rewards 1, 0 and 0.25 over 5, 9 and 2 decisions, against 0.5.
    assert output.loss.item() == pytest.approx((14 * 0.25 + 2 * 0.0625) / 16)


def test_nothing_to_learn(make_model, make_batch, run):
    output, grads = run(make_model("critic"), [make_batch([(4, 0)], [1.0])])
    assert output.loss == 0
    assert not any(grad.any() for grad in grads.values())
