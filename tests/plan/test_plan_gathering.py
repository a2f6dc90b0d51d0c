"""The replay of DeepSpeed's gathering, on orders of modules whose outcome can be worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp_ds.plan.gathering import ROOT, Gathering, Module
from wmtp_ds.plan.zero import ZeroSettings

NEAR = 10**9


def settings(**changes: int) -> ZeroSettings:
    defaults = {"prefetch_bucket": 0, "persistence_threshold": 0, "max_live": NEAR, "max_reuse": 0}
    return ZeroSettings(**(defaults | changes))


def blocks(count: int, *sizes: int, is_leaf: bool = True) -> list[Module]:
    return [Module(f"block {number}", sizes, is_leaf=is_leaf) for number in range(count)]


def walk(gathering: Gathering) -> list[tuple[int, int]]:
    """The most that each visit holds, and what is left after it."""
    found = []
    for module in gathering.visits:
        most = gathering.fetch()
        gathering.release(module)
        found.append((most, gathering.held))
    return found


def test_one_rank_gathers_nothing() -> None:
    assert walk(Gathering(settings(), blocks(3, 10, 20), copies=False, buffers=False)) == [(0, 0)] * 3


def test_a_block_passes_through_a_buffer() -> None:
    """Its parameters are copied out of it, and both are there for a moment."""
    assert walk(Gathering(settings(), blocks(2, 10, 20), copies=True, buffers=True)) == [(60, 0)] * 2


def test_a_single_parameter_is_its_buffer() -> None:
    assert walk(Gathering(settings(), blocks(2, 30), copies=True, buffers=True)) == [(30, 0)] * 2


def test_from_host_memory_parameters_come_without_a_buffer() -> None:
    assert walk(Gathering(settings(), blocks(2, 10, 20), copies=True, buffers=False)) == [(30, 0)] * 2


def test_what_is_used_again_soon_is_kept() -> None:
    forward = blocks(3, 30)
    visits = [*forward, *reversed(forward)]
    near = walk(Gathering(settings(max_reuse=NEAR), visits, copies=True, buffers=True))
    assert near == [(30, 30), (60, 60), (90, 90), (90, 60), (60, 30), (30, 0)]
    # Between the uses of block 1 lie 60 elements, of block 2 none.
    reached = walk(Gathering(settings(max_reuse=60), visits, copies=True, buffers=True))
    assert reached == [(30, 0), (30, 0), (30, 30), (30, 0), (30, 0), (30, 0)]
    far = walk(Gathering(settings(max_reuse=61), visits, copies=True, buffers=True))
    assert far == [(30, 0), (30, 30), (60, 60), (60, 30), (30, 0), (30, 0)]
    assert walk(Gathering(settings(max_reuse=NEAR), visits, copies=True, buffers=True, traced=False)) == [(30, 0)] * 6


def test_seen_from_a_plain_module_leaves_have_no_length() -> None:
    """As DeepSpeed counts: an embedding is kept however many blocks lie between its uses."""
    embedding, between = Module("embedding", (5,)), blocks(4, 100)
    visits = [embedding, *between, embedding]
    kept = walk(Gathering(settings(max_reuse=50), visits, copies=True, buffers=True))
    assert [left for _, left in kept] == [5, 5, 5, 5, 5, 0]
    plain = [Module(block.name, block.parameters) for block in between]
    released = walk(Gathering(settings(max_reuse=50), [embedding, *plain, embedding], copies=True, buffers=True))
    assert released[0] == (5, 0)


def test_a_block_is_kept_if_the_forward_pass_ends_soon() -> None:
    """Seen from a leaf, the root has all parameters: so a trunk is kept for a backward pass that never reaches it."""
    trunk, head = blocks(3, 30), Module("head", (7,))
    visits = [ROOT, Module("embedding", (5,)), *trunk, head, ROOT, head]
    near = walk(Gathering(settings(max_reuse=NEAR), visits, copies=True, buffers=True))
    assert [left for _, left in near] == [0, 0, 30, 60, 90, 97, 97, 90]
    # From block 1 to the end of the forward pass it is 37 elements, from block 0 it is 67.
    far = walk(Gathering(settings(max_reuse=38), visits, copies=True, buffers=True))
    assert [left for _, left in far] == [0, 0, 0, 30, 60, 67, 67, 60]


def test_gathering_ahead_is_bounded() -> None:
    ahead = Gathering(settings(prefetch_bucket=40), blocks(4, 30), copies=True, buffers=True)
    # Block 0, and of those ahead the first that reach 40 elements together: blocks 1 and 2, through one buffer.
    assert ahead.fetch() == 30 + 60
    ahead.release(ahead.visits[0])
    assert ahead.held == 60
    assert ahead.fetch() == 120 + 30  # both out of the buffer, which block 2 still waits in; block 3 ahead
    few = Gathering(settings(prefetch_bucket=40, max_live=30), blocks(4, 30), copies=True, buffers=True)
    assert few.fetch() == 30


def test_small_parameters_stay() -> None:
    gathering = Gathering(settings(persistence_threshold=10), blocks(2, 10, 20), copies=True, buffers=True)
    assert gathering.persistent == 20
    assert walk(gathering) == [(40, 20), (40, 20)]


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    count=st.integers(1, 6),
    prefetch=st.integers(0, 200),
    reuse=st.integers(0, 500),
    persistence=st.integers(0, 30),
    is_leaf=st.booleans(),
)
def test_everything_is_released_and_nothing_twice(
    sizes: list[int], count: int, prefetch: int, reuse: int, persistence: int, is_leaf: bool
) -> None:
    forward = blocks(count, *sizes, is_leaf=is_leaf)
    chosen = settings(prefetch_bucket=prefetch, max_reuse=reuse, persistence_threshold=persistence)
    gathering = Gathering(chosen, [*forward, *reversed(forward)], copies=True, buffers=True)
    found = walk(gathering)
    assert found[-1][1] == gathering.persistent
    for module, (most, left) in zip(gathering.visits, found, strict=True):
        assert sum(module.parameters) <= most <= 2 * count * sum(sizes)
        assert 0 <= left <= most


@pytest.mark.parametrize("traced", [True, False])
def test_replaying_does_not_depend_on_copies(traced: bool) -> None:
    visits = [*blocks(3, 10, 20), *reversed(blocks(3, 10, 20))]
    alone = Gathering(settings(prefetch_bucket=15), visits, copies=True, buffers=False, traced=traced)
    together = Gathering(settings(prefetch_bucket=15), visits, copies=True, buffers=True, traced=traced)
    assert all(a <= b for (a, _), (b, _) in zip(walk(alone), walk(together), strict=True))
