"""The baseline's loss against materialised logits."""

import math

import pytest
import torch

from wmtp_ds.stages.base import Output


@pytest.mark.parametrize("n", [4, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_every_token_of_every_head_weighs_one(
    n, dtype, tolerance, make_model, batch, run, policy_loss, gradients, assert_same
):
    model = make_model("baseline", n, dtype)
    output, grads = run(model, [batch])
    expected = policy_loss(model, batch, lambda k, b, i: 1.0)
    torch.testing.assert_close(output.loss, expected.detach(), rtol=tolerance, atol=tolerance)
    assert_same(grads, gradients(model, expected), rtol=10 * tolerance, atol=tolerance)
    assert output.loss > 1  # of a random policy: there is something to compare
    assert all(grad.any() for grad in grads.values())


def test_the_losses_of_heads_are_told_and_their_mean_is_the_loss(make_model, batch, run, places, materialised):
    model = make_model("baseline")
    output, _ = run(model, [batch])
    ce = materialised(model, batch)
    for k in range(1, 5):
        losses = [ce[k - 1, b, i, batch.input_ids[b, i + k]] for b, i in places(batch, k)]
        torch.testing.assert_close(
            output.shares[f"train/loss_head_{k}"].double(), torch.stack(losses).mean(), rtol=1e-6, atol=1e-6
        )
    heads = [share for name, share in output.shares.items() if name.startswith("train/loss_head_")]
    assert len(heads) == 4
    torch.testing.assert_close(torch.stack(heads).mean(), output.loss)
    assert not any(share.requires_grad for share in output.shares.values())


def test_its_weights_are_ones(make_model, batch, run):
    """Entropies of sequences of 6, 10, 0 and 3 decisions, of which one has none."""
    output, _ = run(make_model("baseline"), [batch])
    counts = batch.decisions.sum(-1).tolist()
    assert output.moments["weight"].tolist() == [sum(counts), sum(counts), sum(counts), -1.0, 1.0]
    uniform = [math.log(count) for count in counts if count]
    assert output.shares["weight/entropy"].item() == pytest.approx(sum(uniform) / len(uniform), abs=1e-6)


def test_heads_count_the_supervised_tokens_that_they_can_reach(make_model, batch, count):
    """Solutions of 5, 9, 0 and 2 tokens after prompts of 3, 1, 4 and 2: head k misses those before token k."""
    model = make_model("baseline")
    totals = count(model, [batch, batch])
    assert totals.targets_n.tolist() == [32, 30, 26, 20]
    assert totals.supervised_n.tolist() == totals.targets_n.tolist()
    assert (totals.decisions, totals.sequences, totals.tokens) == (32, 6, 52)


def test_a_head_without_targets_contributes_nothing(make_model, make_batch, run, materialised):
    """One supervised token behind one prompt token: only the first head can predict it."""
    batch = make_batch([(1, 1)], [1.0])
    model = make_model("baseline")
    output, grads = run(model, [batch])
    expected = materialised(model, batch)[0, 0, 0, batch.input_ids[0, 1]] / 4
    torch.testing.assert_close(output.loss, expected.detach(), rtol=1e-6, atol=1e-6)
    assert [output.shares[f"train/loss_head_{k}"].item() for k in (2, 3, 4)] == [0.0, 0.0, 0.0]
    assert not any(grad.any() for name, grad in grads.items() if "mtp_heads" in name)


@pytest.mark.parametrize("lengths", [[(4, 0), (2, 0)], [(1, 0)]])
def test_nothing_to_learn_is_a_loss_of_zero_with_gradients_of_zero(lengths, make_model, make_batch, run):
    output, grads = run(make_model("baseline"), [make_batch(lengths, [1.0] * len(lengths))])
    assert output.loss == 0
    assert not any(grad.any() for grad in grads.values())


def test_16_bit_weights(make_model, batch, run):
    exact, _ = run(make_model("baseline"), [batch])
    low, grads = run(make_model("baseline", dtype=torch.bfloat16), [batch])
    assert low.loss.dtype == torch.float32
    assert low.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    assert {grad.dtype for grad in grads.values()} == {torch.bfloat16}


def test_the_forward_returns_a_plain_tuple_and_knows_its_modes(make_model, batch, count):
    model = make_model("baseline")
    output = model(batch, count(model, [batch]))
    assert type(output) is tuple
    assert isinstance(Output(*output).shares, dict)
    assert type(model(batch, mode="evaluate")) is dict
