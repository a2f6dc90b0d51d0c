"""The gradient does not depend on how a global batch is cut; and the pieces that stages are made of."""

import sys
from types import ModuleType

import pytest
import torch

from wmtp_ds.stages.base import Output, Stage, Totals, head_scales, make_stage

STAGES = [
    ("baseline", {}),
    ("critic", {}),
    ("critic", {"value_target": "gae", "loss_type": "huber"}),
    ("verifiable", {}),
    ("verifiable", {"td_normalize": "zscore", "beta": 0.5}),
    ("verifiable", {"weight_norm": "mean1", "td_lambda": 0.95}),
    ("verifiable", {"td_normalize": "zscore", "weight_norm": "mean1"}),
    ("rho1", {"selection_scope": "sequence"}),
    ("rho1", {"weighting": "softmax"}),
]


@pytest.mark.parametrize(("stage", "options"), STAGES, ids=str)
@pytest.mark.parametrize("cut", [[[0], [1], [2], [3]], [[3, 1], [2, 0]], [[0, 1, 2], [3]]], ids=str)
@pytest.mark.parametrize("trim", [False, True])
def test_micro_batches_add_up_to_the_batch(
    stage, options, cut, trim, make_model, batch, references, rows, run, assert_same
):
    """Loss, gradients and what is logged: cut anywhere, in any order, with as much padding as each piece needs."""
    model = make_model(stage, **options)
    window = [rows(batch, piece, trim) for piece in cut]
    pieces = [references[piece][:, : part.input_ids.shape[1]] for piece, part in zip(cut, window, strict=True)]
    whole, expected = run(model, [batch], [references])
    summed, grads = run(model, window, pieces)
    assert whole.loss > 0.01
    torch.testing.assert_close(summed.loss, whole.loss, rtol=1e-5, atol=1e-6)
    assert_same(grads, expected, rtol=1e-4, atol=1e-6)
    assert_same(summed.shares, whole.shares, rtol=1e-5, atol=1e-6)


def test_rho1_by_batch_selects_within_each_micro_batch(make_model, batch, references, rows, run, assert_same):
    """The one exception: with micro-batches of a sequence each, "batch" is what "sequence" is for any cut."""
    window = [rows(batch, [b], trim=False) for b in range(4)]
    pieces = [references[[b]] for b in range(4)]
    cut, grads = run(make_model("rho1", selection_scope="batch"), window, pieces)
    by_sequence, expected = run(make_model("rho1", selection_scope="sequence"), [batch], [references])
    torch.testing.assert_close(cut.loss, by_sequence.loss)
    assert_same(grads, expected, rtol=1e-4, atol=1e-6)
    together, _ = run(make_model("rho1", selection_scope="batch"), [batch], [references])
    assert abs(together.loss - cut.loss) > 1e-3


@pytest.mark.parametrize("stage", ["baseline", "critic", "verifiable", "rho1"])
def test_what_stands_in_the_padding_does_not_matter(stage, make_model, batch, references, run, assert_same):
    model = make_model(stage)
    expected, grads = run(model, [batch], [references])
    padding = batch.segment_ids == 0
    batch.input_ids[padding] = 63 - batch.input_ids[padding]
    found, dirty = run(model, [batch], [references])
    torch.testing.assert_close(found.loss, expected.loss)
    assert_same(dirty, grads)


def test_totals_survive_the_exchange():
    totals = Totals(torch.tensor([3, 2]), torch.tensor([5, 4]), *map(torch.tensor, (7, 2**40 + 1, 1, 2**40 + 3)))
    packed = totals.pack()
    assert packed.dtype == torch.float64
    back = Totals.unpack(packed, 2)
    for name in ("targets_n", "supervised_n", "decisions", "tokens", "sequences", "places"):
        assert torch.equal(getattr(back, name), getattr(totals, name).double())


def test_scales_of_heads():
    zero = torch.zeros(())
    totals = Totals(torch.tensor([10.0, 0.0]), torch.tensor([10.0, 0.0]), zero, zero, zero, zero)
    assert head_scales(totals).tolist() == pytest.approx([0.05, 0.0])
    assert head_scales(totals).dtype == torch.float32


def test_outputs_add_up():
    first = Output(torch.tensor(1.0), {"a": torch.tensor(2.0)}, {"x": torch.zeros(5)})
    total = first + Output(torch.tensor(3.0), {"b": torch.tensor(4.0)}, {"y": torch.ones(5)})
    assert total.loss == 4
    assert set(total.shares) == {"a", "b"}
    assert set(total.moments) == {"x", "y"}


def test_a_stage_is_found_by_the_name_of_its_file(monkeypatch):
    for name in ("baseline", "critic", "verifiable", "rho1"):
        stage = make_stage(name, training := object())
        assert type(stage).__name__.lower() == name
        assert stage.training is training
    fifth = ModuleType("wmtp_ds.stages.fifth")
    fifth.Stage, fifth.Fifth = Stage, type("Fifth", (Stage,), {"__module__": fifth.__name__})
    monkeypatch.setitem(sys.modules, fifth.__name__, fifth)
    assert type(make_stage("fifth", None)) is fifth.Fifth


@pytest.mark.parametrize("n", [4, 1])
def test_validation_is_the_unweighted_loss_of_correct_solutions(n, make_model, batch, places, materialised):
    model = make_model("verifiable", n)
    with torch.no_grad():
        sums = model(batch, mode="evaluate")
        ce = materialised(model, batch)
        values = model(batch, mode="values").squeeze(-1)
    for k in range(1, n + 1):
        # Of the rewards 1, 0, 1 and 0.25 only sequences 0 and 2 count as correct.
        losses = [ce[k - 1, b, i, batch.input_ids[b, i + k]].item() for b, i in places(batch, k) if b in (0, 2)]
        assert sums["ce_n"][k - 1].item() == pytest.approx(sum(losses), rel=1e-6)
        assert sums["targets_n"][k - 1].item() == len(losses)
    errors = ((values - batch.rewards[:, None]) ** 2)[batch.decisions]
    assert sums["value_loss"].item() == pytest.approx(errors.sum().item(), rel=1e-5)
    assert sums["decisions"].item() == 16
    assert torch.equal(sums["values_BS"], values)


def test_validation_of_a_critic_is_the_value_loss_alone(make_model, batch):
    sums = make_model("critic")(batch, mode="evaluate")
    assert set(sums) == {"value_loss", "decisions", "values_BS"}
    assert set(make_model("baseline")(batch, mode="evaluate")) == {"ce_n", "targets_n"}
