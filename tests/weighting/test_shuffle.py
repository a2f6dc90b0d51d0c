"""Weights dealt to other tokens: the same numbers, other places."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from wmtp_ds.weighting.shuffle import shuffle_weights


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
    st.lists(st.integers(-1, 2**40), min_size=5, max_size=5),
    st.integers(0, 2**31),
)
def test_each_sequence_keeps_its_weights(decided: list[int], ids: list[int], seed: int):
    generator = torch.Generator().manual_seed(seed)
    weights_GL = torch.rand(len(decided), 14, generator=generator)
    decisions_GL = torch.zeros(len(decided), 14, dtype=torch.bool)
    for sequence, count in enumerate(decided):
        decisions_GL[sequence, torch.randperm(14, generator=generator)[:count]] = True
    before = weights_GL.clone()
    row_ids_G = torch.tensor(ids[: len(decided)])
    found_GL = shuffle_weights(weights_GL, decisions_GL, row_ids_G)
    assert torch.equal(weights_GL, before)
    assert torch.equal(found_GL[~decisions_GL], weights_GL[~decisions_GL])
    for sequence, decisions_L in enumerate(decisions_GL):
        assert sorted(found_GL[sequence, decisions_L].tolist()) == sorted(weights_GL[sequence, decisions_L].tolist())
    # A row is dealt alike in whatever batch it stands, behind whatever prompt.
    alone_GL = shuffle_weights(weights_GL[-1:].roll(2, 1), decisions_GL[-1:].roll(2, 1), row_ids_G[-1:])
    if not decisions_GL[-1, -2:].any():
        assert torch.equal(alone_GL, found_GL[-1:].roll(2, 1))


def test_every_weight_comes_to_every_place_as_often():
    rows, length = 6000, 4
    weights_GL = torch.arange(float(length)).expand(rows, length)
    found_GL = shuffle_weights(weights_GL, torch.ones(rows, length, dtype=torch.bool), torch.arange(rows))
    for place in range(length):
        assert chisquare(torch.bincount(found_GL[:, place].long(), minlength=length).numpy()).pvalue > 1e-3
    orders = {tuple(order) for order in found_GL.tolist()}
    assert len(orders) == 24
