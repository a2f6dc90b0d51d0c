"""Sequences that share rows: none lost, none split, little padding; and batches made of them."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from wmtp_ds.data.batch import NO_ROW, PackedBatch
from wmtp_ds.data.batches import Collator
from wmtp_ds.data.index import build_index
from wmtp_ds.data.loader import Ranks, load_batch, load_packed, load_windows, timed
from wmtp_ds.data.packing import LITTLE, fewest_micro_batches, pack
from wmtp_ds.data.sampling import SamplePlan
from wmtp_ds.data.templates import plain
from wmtp_ds.data.token_cache import open_token_cache

PIECES = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


def collator(max_length: int = 64, **options) -> Collator:
    """One token a byte."""
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(PIECES)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return Collator(PreTrainedTokenizerFast(tokenizer_object=core, **special), plain, max_length, **options)


@pytest.fixture
def index(tmp_path):
    path = tmp_path / "d.jsonl"
    with path.open("w") as handle:
        for i in range(48):
            text = chr(97 + i % 26)
            row = {"problem_id": "p", "instruction": text * (i % 5 + 1), "output": text * (i + 1)}
            handle.write(json.dumps(row | {"is_correct": i % 3 == 0}) + "\n")
    return build_index(path)


# --- which sequences share a row ---


@st.composite
def windows(draw):
    capacity, micro_batches, most_rows = draw(st.integers(1, 60)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, capacity), max_size=micro_batches * most_rows))
    return lengths, {"capacity": capacity, "micro_batches": micro_batches, "most_rows": most_rows}


def widths(lengths, packed):
    return [[sum(lengths[i] for i in row) for row in rows] for rows in packed]


@given(windows())
def test_each_sequence_is_in_one_row_and_no_row_overflows(window):
    lengths, limits = window
    packed = pack(lengths, **limits)
    assert len(packed) == limits["micro_batches"]
    assert sorted(i for rows in packed for row in rows for i in row) == list(range(len(lengths)))
    assert all(row for rows in packed for row in rows)
    assert all(len(rows) <= limits["most_rows"] for rows in packed)
    assert all(width <= limits["capacity"] for rows in widths(lengths, packed) for width in rows)
    assert packed == pack(lengths, **limits)


@given(windows())
def test_waste_is_bounded(window):
    """As the docstring says, and never more than a row for each sequence would waste, sorted by length."""
    lengths, limits = window
    by_batch = widths(lengths, pack(lengths, **limits))
    filled = [width for rows in by_batch for width in rows]
    area = sum(len(rows) * max(rows, default=0) for rows in by_batch)
    most = max(map(len, by_batch))
    if filled and len(filled) == most * limits["micro_batches"]:
        assert area - sum(lengths) <= (most - 1) * (max(filled) - min(filled))
    assert [max(rows, default=0) for rows in by_batch] == sorted((max(r, default=0) for r in by_batch), reverse=True)
    if most <= 1:
        assert area == sum(lengths)


@given(windows())
def test_rows_are_short_where_that_costs_little_padding(window):
    """Among all numbers of rows: the most with which little is padding, else the one with the least padding."""
    lengths, limits = window
    by_batch = widths(lengths, pack(lengths, **limits))
    wasted = sum(max(rows) - width for rows in by_batch for width in rows)
    others = []
    for rows in range(1, limits["most_rows"] + 1):
        loads = [[0, -i, []] for i in range(rows * limits["micro_batches"])]
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            row = min(loads, key=lambda load: (load[0], -load[1]))
            row[0] += lengths[i]
        tokens = sorted((load[0] for load in loads), reverse=True)
        groups = [[t for t in tokens[g : g + rows] if t] for g in range(0, len(tokens), rows)]
        if tokens[0] <= limits["capacity"]:
            others.append((rows, sum(max(group) - t for group in groups for t in group)))
    good = [rows for rows, waste in others if waste <= LITTLE * sum(lengths)]
    assert wasted == (dict(others)[max(good)] if good else min(waste for _, waste in others))


@pytest.mark.parametrize("shape", [(2, 4), (4, 4), (16, 4), (2, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_less_than_a_twentieth_is_padding(seed, shape):
    """Lengths spread as those of code solutions (log-normal), in rows with room for several; forty steps."""
    micro_batches, most_rows = shape
    random, tokens, area = np.random.default_rng(seed), 0, 0
    for _ in range(40):
        spread = random.lognormal(5.2, 0.5, micro_batches * most_rows)
        lengths = np.clip(spread, 20, 1024).astype(int).tolist()
        packed = pack(lengths, capacity=1024, micro_batches=micro_batches, most_rows=most_rows)
        tokens += sum(lengths)
        area += sum(len(rows) * max(rows) for rows in widths(lengths, packed))
    assert 1 - tokens / area < 0.05


def test_by_hand():
    assert pack([5, 3, 4, 2], capacity=8, micro_batches=2, most_rows=2) == [[[0, 3]], [[2, 1]]]
    assert pack([5, 3, 4, 2], capacity=6, micro_batches=1, most_rows=4) == [[[0], [1, 3], [2]]]
    # Of 199 tokens one is padding: not worth a row of twice the width.
    assert pack([100, 99], capacity=300, micro_batches=1, most_rows=2) == [[[0], [1]]]
    assert pack([100, 96], capacity=300, micro_batches=1, most_rows=2) == [[[0, 1]]]
    assert pack([7], capacity=7, micro_batches=3, most_rows=1) == [[[0]], [], []]
    assert pack([], capacity=7, micro_batches=2, most_rows=1) == [[], []]
    for lengths, rows in (([5, 5, 5], 2), ([8], 3)):
        with pytest.raises(ValueError, match=f"have no room in 1 x {rows} rows of 7"):
            pack(lengths, capacity=7, micro_batches=1, most_rows=rows)


@given(windows(), st.integers(1, 4))
def test_the_fewest_micro_batches_that_have_room(window, multiple):
    lengths, limits = window
    found = fewest_micro_batches(
        lengths, capacity=limits["capacity"], most_rows=limits["most_rows"], multiple_of=multiple
    )
    assert found % multiple == 0
    rows = found * limits["most_rows"]
    assert rows * limits["capacity"] >= sum(lengths)
    assert found == multiple or (found - multiple) * limits["most_rows"] < len(lengths)


# --- batches ---


def check(batch: PackedBatch, made: Collator, index) -> None:
    """Token by token: each sequence is what it is in a batch of its own."""
    assert type(batch) is PackedBatch
    count, width = batch.input_ids.shape
    for name, kind in {"members": torch.int64, "position_ids": torch.int64, "segment_ids": torch.int32}.items():
        assert (getattr(batch, name).dtype, getattr(batch, name).shape) == (kind, (count, width))
    seen = torch.zeros(count * width, dtype=torch.bool)
    for g, row_id in enumerate(batch.row_ids.tolist()):
        alone = load_batch(index, made, np.array([row_id]))
        length = int((alone.segment_ids > 0).sum())
        places = batch.places[g]
        assert (places[length:] == -1).all()
        places = places[:length]
        assert (places.diff() == 1).all()
        assert int(places[0]) // width == int(places[-1]) // width
        assert not seen[places].any()
        seen[places] = True
        for name in ("input_ids", "supervised", "decisions"):
            assert torch.equal(getattr(batch, name).flatten()[places], getattr(alone, name)[0, :length]), name
        assert batch.position_ids.flatten()[places].tolist() == list(range(length))
        assert set(batch.members.flatten()[places].tolist()) == {g}
        assert len(set(batch.segment_ids.flatten()[places].tolist())) == 1
        assert batch.rewards[g] == alone.rewards[0]
    padding = ~seen.view(count, width)
    assert torch.equal(padding, batch.segment_ids == 0)
    assert (batch.input_ids[padding] == PIECES.index("<pad>")).all()
    assert not batch.supervised[padding].any()
    assert not batch.decisions[padding].any()
    assert (batch.members.flatten().diff() >= 0).all()  # the kernels' groups are in order
    assert (batch.segment_ids[:, 0] == 1).all()


def test_sequences_in_a_row(index):
    made = collator(60)  # the longest prompts are cut
    ids = np.array([3, 47, 0, 20, 11])
    batch = made.pack(made.encode([index.read_row(int(i)) for i in ids]), index.is_correct[ids], ids, [1, 1, 3])
    check(batch, made, index)
    assert batch.row_ids.tolist() == ids.tolist()
    assert batch.segment_ids.amax(1).tolist() == [1, 1, 3]
    assert batch.input_ids.shape[1] == int((batch.segment_ids > 0).sum(1).max())


def test_rewards_of_a_reward_model(index):
    made = collator(rewards=np.linspace(0, 1, 48))
    [batch] = load_packed(index, made, np.array([40, 2, 7]), None, Ranks(0, 1, 3))
    assert batch.rewards.tolist() == pytest.approx([i / 47 for i in batch.row_ids.tolist()])


def test_rows_of_a_multiple(index):
    made = collator(pad_to_multiple_of=16)
    for batch in load_packed(index, made, np.arange(12), None, Ranks(0, 1, 4), 2):
        assert batch.input_ids.shape[1] % 16 == 0
        check(batch, made, index)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 3), (3, 2)])
def test_the_ranks_together_read_the_rows_once(index, tmp_path, cached, world_size, accumulation):
    made, batch_size = collator(), 8
    cache = open_token_cache(index, made.encoder, plain, tmp_path / "cache" if cached else None)
    assert (cache is not None) == cached
    rows = np.random.default_rng(0).integers(0, 48, world_size * accumulation * batch_size)
    shares = [
        load_packed(index, made, rows, cache, Ranks(rank, world_size, batch_size), accumulation)
        for rank in range(world_size)
    ]
    assert all(len(share) == accumulation for share in shares)
    batches = [batch for share in shares for batch in share]
    for batch in batches:
        check(batch, made, index)
        assert len(batch.input_ids) <= batch_size
        assert batch.input_ids.shape[1] <= 64
    assert sorted(i for batch in batches for i in batch.row_ids.tolist()) == sorted(rows.tolist())
    tokens = sum(int((batch.segment_ids > 0).sum()) for batch in batches)
    assert tokens == sum(int((load_batch(index, made, np.array([i])).segment_ids > 0).sum()) for i in rows)
    # What is computed at the same time is about equally large: neighbours in width.
    in_turn = [batch.input_ids.shape[1] for together in zip(*shares, strict=True) for batch in together]
    assert in_turn == sorted(in_turn, reverse=True)
    if world_size > 1:
        assert in_turn[0] > in_turn[-1]


@pytest.mark.parametrize("cached", [False, True])
def test_validation_takes_no_more_passes_than_it_needs(index, tmp_path, cached):
    made = collator(256)
    cache = open_token_cache(index, made.encoder, plain, tmp_path) if cached else None
    shares = [load_packed(index, made, np.arange(48), cache, Ranks(rank, 2, 4)) for rank in range(2)]
    assert [len(share) for share in shares] == [1, 1]  # 1375 tokens have room in 2 · 4 · 256
    assert sorted(i for [batch] in shares for i in batch.row_ids.tolist()) == list(range(48))
    # More ranks than sequences: the last ones have nothing to learn, and take the same passes.
    shares = [load_packed(index, made, np.arange(2), cache, Ranks(rank, 3, 4)) for rank in range(3)]
    assert [len(share) for share in shares] == [1, 1, 1]
    [lone] = shares[2]
    assert lone.row_ids.tolist() == [NO_ROW]
    assert not lone.supervised.any()


@pytest.mark.parametrize("cached", [False, True])
def test_windows_of_packed_rows(index, tmp_path, cached):
    made = collator()
    plan = SamplePlan(index, np.arange(48), 12, 48, ((0, 48),), ())
    cache = open_token_cache(index, made.encoder, plain, tmp_path) if cached else None
    options = {"rank": 0, "world_size": 1, "batch_size": 6, "accumulation": 2, "cache": cache}
    found = list(load_windows(index, plan, made, **options, packed=True))
    assert [sorted(i for batch in window for i in batch.row_ids.tolist()) for window in found] == [
        list(range(start, start + 12)) for start in range(0, 48, 12)
    ]
    again = list(load_windows(index, plan, made, **options, packed=True, start=2))
    for window, same in zip(found[2:], again, strict=True):
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(window, same, strict=True))
    unpacked = list(load_windows(index, plan, made, **options))
    assert [[batch.row_ids.tolist() for batch in window] for window in unpacked] == [
        [list(range(start, start + 6)), list(range(start + 6, start + 12))] for start in range(0, 48, 12)
    ]


def test_waits_are_timed(monkeypatch):
    clock = iter([0.0, 2.0, 5.0, 5.5, 7.0, 7.0])
    monkeypatch.setattr("wmtp_ds.data.loader.time.monotonic", lambda: next(clock))
    assert list(timed(iter([["a"], ["b"]]))) == [(["a"], 2.0), (["b"], 0.5)]
