"""Targets and weights of heads against loops over positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_ds.weighting.targets import mtp_targets, per_head


@st.composite
def packed(draw: st.DrawFn) -> tuple[list[list[int]], list[list[bool]], list[list[int]]]:
    """Rows of one or more segments with padding on the right; any tokens of theirs may be supervised."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    ids, supervised, segments = [], [], []
    for _ in range(batch):
        filled = draw(st.integers(0, length))
        row = sorted(draw(st.lists(st.integers(1, 3), min_size=filled, max_size=filled)))
        segments.append(row + [0] * (length - filled))
        chosen = draw(st.lists(st.booleans(), min_size=filled, max_size=filled))
        supervised.append(chosen + [False] * (length - filled))
        ids.append(draw(st.lists(st.integers(0, 50), min_size=length, max_size=length)))
    return ids, supervised, segments


@settings(deadline=None, max_examples=100)
@given(packed(), st.integers(1, 12))
def test_targets_match_the_definition(case, n):
    ids, supervised, segments = case
    length = len(ids[0])
    expected = [
        [
            [
                ids[b][i + k]
                if i + k < length and supervised[b][i + k] and segments[b][i + k] == segments[b][i]
                else -100
                for i in range(length)
            ]
            for b in range(len(ids))
        ]
        for k in range(1, n + 1)
    ]
    found = mtp_targets(torch.tensor(ids), torch.tensor(supervised), torch.tensor(segments), n)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_targets_by_hand():
    ids = torch.tensor([[10, 11, 12, 13, 14, 99]])
    supervised = torch.tensor([[False, False, True, True, True, False]])
    segments = torch.tensor([[1, 1, 1, 1, 1, 0]])
    assert mtp_targets(ids, supervised, segments, 3).tolist() == [
        [[-100, 12, 13, 14, -100, -100]],
        [[12, 13, 14, -100, -100, -100]],
        [[13, 14, -100, -100, -100, -100]],
    ]


def test_no_target_crosses_a_segment():
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    segments = torch.tensor([[1, 1, 1, 2, 2, 2]])
    assert mtp_targets(ids, torch.ones_like(ids).bool(), segments, 3).tolist() == [
        [[2, 3, -100, 5, 6, -100]],
        [[3, -100, -100, 6, -100, -100]],
        [[-100] * 6],
    ]


def test_more_heads_than_tokens():
    one = torch.tensor([[7]])
    assert mtp_targets(one, one.bool(), one, 4).tolist() == [[[-100]]] * 4
    two = torch.tensor([[7, 8]])
    assert mtp_targets(two, two.bool(), two * 0 + 1, 4).tolist() == [[[8, -100]]] + [[[-100, -100]]] * 3


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 10), st.integers(0, 1))
def test_per_head_matches_the_definition(batch, length, n, first):
    x = torch.arange(1.0, batch * length + 1).view(batch, length)
    expected = [
        [
            [x[b, i + k - 1 + first].item() if i + k - 1 + first < length else 0.0 for i in range(length)]
            for b in range(batch)
        ]
        for k in range(1, n + 1)
    ]
    assert per_head(x, n, first).tolist() == expected


@settings(deadline=None, max_examples=60)
@given(packed(), st.integers(1, 5))
def test_each_target_takes_the_weight_of_the_decision_that_emits_it(case, n):
    """If the weight of decision ``i`` names token ``i + 1``, every target's weight names the target."""
    ids, supervised, segments = (torch.tensor(part) for part in case)
    unique = torch.arange(ids.numel()).view(ids.shape)
    targets = mtp_targets(unique, supervised, segments, n)
    weights = per_head(torch.nn.functional.pad(unique[:, 1:], (0, 1), value=-1), n)
    references = per_head(unique, n, first=1)
    assert torch.equal(weights[targets != -100], targets[targets != -100])
    assert torch.equal(references[targets != -100], targets[targets != -100])


@pytest.mark.parametrize("n", [1, 4])
def test_masked_values_do_not_move(n):
    x = torch.tensor([[1.0, float("nan"), 3.0]])
    assert per_head(x, n)[0, 0, [0, 2]].tolist() == [1.0, 3.0]
