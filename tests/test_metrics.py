"""What a step reports: shares added up, moments merged, over micro-batches and ranks; and the AUC of values."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_ds import distributed
from wmtp_ds.evaluation import area_under_roc
from wmtp_ds.metrics import WindowMetrics
from wmtp_ds.stages.base import Output
from wmtp_ds.weighting.statistics import moments


def output(loss: float, values: list[float], **shares: float) -> Output:
    return Output(
        torch.tensor(loss, requires_grad=True),
        {name.replace("__", "/"): torch.tensor(share) for name, share in shares.items()},
        {"td": moments(torch.tensor(values)), "weight": moments(torch.tensor(values).exp())},
    )


def test_a_window_of_micro_batches():
    window = WindowMetrics()
    window.add(output(0.5, [1.0, 2.0], train__loss_head_1=0.25))
    window.add(output(0.25, [-3.0], train__loss_head_1=1.0))
    metrics, signal = window.reduce(15)
    assert signal == 15
    values = [1.0, 2.0, -3.0]
    expected = {"train/loss": 0.75, "train/loss_head_1": 1.25}
    for kind, x in (("td", values), ("weight", [math.exp(v) for v in values])):
        expected |= {
            f"{kind}/mean": statistics.fmean(x),
            f"{kind}/std": statistics.pstdev(x),
            f"{kind}/min": min(x),
            f"{kind}/max": max(x),
        }
    assert metrics == pytest.approx(expected)
    assert all(type(value) is float for value in metrics.values())


def test_without_moments_and_signal():
    window = WindowMetrics()
    window.add(Output(torch.tensor(2.0)))
    assert window.reduce() == ({"train/loss": 2.0}, 0)


def test_a_micro_batch_without_decisions_changes_nothing():
    window = WindowMetrics()
    window.add(output(1.0, [4.0]))
    window.add(Output(torch.tensor(0.0), {}, {"td": moments(torch.zeros(0)), "weight": moments(torch.zeros(0))}))
    metrics, _ = window.reduce()
    assert (metrics["td/min"], metrics["td/max"], metrics["td/std"]) == (4.0, 4.0, 0.0)


def test_ranks_add_up(monkeypatch):
    """Two ranks: the one's tensor is replayed as the other's contribution to the collective."""
    other = WindowMetrics()
    other.add(output(0.5, [-7.0, 1.0], a=3.0))
    sent: list[torch.Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "gather_equal", lambda tensor: (sent.append(tensor.clone()), tensor[None])[1])
        other.reduce(2, largest={"waited": 0.75, "other": 0.0})
    assert len(sent) == 1  # one collective for all that a step has to say
    monkeypatch.setattr(distributed, "gather_equal", lambda tensor: torch.stack([tensor, sent[0]]))
    mine = WindowMetrics()
    mine.add(output(0.25, [2.0], a=1.0))
    metrics, signal = mine.reduce(
        0, {"norm": torch.tensor(0.5), "tokens": torch.tensor(7, dtype=torch.int64)}, {"waited": 0.5, "other": 0.25}
    )
    assert signal == 2
    assert (metrics["waited"], metrics["other"]) == (0.75, 0.25)  # the largest of any rank
    assert (metrics["train/loss"], metrics["a"]) == (0.75, 4.0)
    assert (metrics["norm"], metrics["tokens"]) == (0.5, 7.0)  # what all ranks have alike is not added up
    values = [-7.0, 1.0, 2.0]
    assert metrics["td/mean"] == pytest.approx(statistics.fmean(values))
    assert metrics["td/std"] == pytest.approx(statistics.pstdev(values))
    assert (metrics["td/min"], metrics["td/max"]) == (-7.0, 2.0)


def test_nothing_holds_on_to_the_graph():
    window = WindowMetrics()
    share = torch.tensor(1.0, requires_grad=True)
    window.add(Output(share * 2, {"x": share * 3}))
    assert not any(kept.requires_grad for kept in window._shares.values())


def auc_by_pairs(scored: list[tuple[float, float]]) -> float:
    """Share of the pairs of a correct and an incorrect solution in the right order; a tie is half of one."""
    correct = [score for score, reward in scored if reward >= 0.5]
    incorrect = [score for score, reward in scored if reward < 0.5]
    wins = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(correct, incorrect)]
    return sum(wins) / len(wins)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), st.sampled_from([0.0, 0.4, 0.5, 1.0])), min_size=1)
)
def test_auc_matches_counting_pairs(scored):
    kinds = {reward >= 0.5 for _, reward in scored}
    found = area_under_roc(torch.tensor(scored, dtype=torch.float64))
    if len(kinds) < 2:
        assert found is None
    else:
        assert found == pytest.approx(auc_by_pairs(scored))


def test_auc_by_hand():
    assert area_under_roc(torch.tensor([[0.9, 1.0], [0.1, 0.0], [0.3, 0.0]])) == 1.0
    assert area_under_roc(torch.tensor([[0.1, 1.0], [0.9, 0.0]])) == 0.0
    assert area_under_roc(torch.tensor([[0.5, 1.0], [0.5, 0.0]])) == 0.5


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_values_that_have_diverged_have_no_auc(broken):
    assert area_under_roc(torch.tensor([[broken, 1.0], [0.5, 0.0]])) is None
