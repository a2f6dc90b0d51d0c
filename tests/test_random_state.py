"""Random numbers: fixed by the seed, gone on with, and of each rank alone where there is nothing to go on with."""

import random

import pytest
import torch

from wmtp_ds import distributed
from wmtp_ds.random_state import random_state, restore_random, seed_random

CPU = torch.device("cpu")


def draw() -> tuple[float, float]:
    return random.random(), float(torch.rand(()))


def test_the_seed_fixes_both_streams() -> None:
    drawn = []
    for seed in (7, 7, 8):
        random.random()
        seed_random(seed)
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[2][0]
    assert drawn[0][1] != drawn[2][1]


def test_a_state_is_gone_on_with() -> None:
    seed_random(7)
    draw()
    state = random_state(CPU)
    expected = draw()
    seed_random(9)
    restore_random(state, CPU, (7, 1))
    assert draw() == expected


def test_other_ranks_begin_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(rank: int, ranks: int, step: int) -> tuple[float, float]:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: ranks)
        restore_random(None, CPU, (7, step))
        return draw()

    assert first(0, 4, 10) == first(0, 4, 10)
    drawn = [first(rank, ranks, step) for ranks in (2, 4) for rank in range(ranks) for step in (10, 20)]
    assert len(set(drawn)) == len(drawn) == 12
