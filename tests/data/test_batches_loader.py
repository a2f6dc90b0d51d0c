"""Reading ahead: order, resume, errors, and a clean end."""

import json
import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from wmtp_ds.data.batches import Collator
from wmtp_ds.data.index import build_index
from wmtp_ds.data.loader import load_batch, load_windows
from wmtp_ds.data.sampling import sample_plan
from wmtp_ds.data.templates import plain
from wmtp_ds.errors import RunError

SAMPLING = SimpleNamespace(
    n_samples=None,
    correct_ratio=0.5,
    balance_correct=True,
    difficulty_range=None,
    seed=3,
    curriculum_learning=False,
    difficulty_bins={},
    curriculum_schedule=(),
)


@pytest.fixture
def index(tmp_path):
    path = tmp_path / "d.jsonl"
    with path.open("w") as handle:
        for i in range(24):
            row = {"problem_id": "p", "instruction": "i", "output": "x" * (i + 1), "is_correct": i % 2 == 0}
            handle.write(json.dumps(row) + "\n")
    return build_index(path)


@pytest.fixture
def collator():
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return Collator(PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>"), plain, 64)


CUT = {"rank": 0, "world_size": 1, "batch_size": 2, "accumulation": 3}


def row_ids(windows):
    return [[batch.row_ids.tolist() for batch in window] for window in windows]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("wmtp-data")]


def test_every_step_in_order(index, collator):
    plan = sample_plan(index, SAMPLING, total_steps=9, global_batch=6)
    windows = row_ids(load_windows(index, plan, collator, **CUT))
    assert windows == [plan.rows(step).reshape(3, 2).tolist() for step in range(9)]
    assert not threads()


@pytest.mark.parametrize("start", [0, 4, 8, 9])
def test_a_resume_continues_where_it_was(index, collator, start):
    plan = sample_plan(index, SAMPLING, total_steps=9, global_batch=6)
    whole = row_ids(load_windows(index, plan, collator, **CUT))
    assert row_ids(load_windows(index, plan, collator, **CUT, start=start)) == whole[start:]


def test_the_ranks_together_read_the_global_batch(index, collator):
    plan = sample_plan(index, SAMPLING, total_steps=4, global_batch=12)
    ranks = [
        list(load_windows(index, plan, collator, rank=rank, world_size=2, batch_size=3, accumulation=2))
        for rank in range(2)
    ]
    for step, windows in enumerate(zip(*ranks, strict=True)):
        ids = [i for window in windows for batch in window for i in batch.row_ids.tolist()]
        assert sorted(ids) == sorted(plan.rows(step).tolist())
        rewards = torch.cat([batch.rewards for window in windows for batch in window])
        assert rewards.tolist() == [float(i % 2 == 0) for i in ids]


def test_it_reads_ahead_but_not_without_bound(index, collator):
    plan = sample_plan(index, SAMPLING, total_steps=9, global_batch=6)
    read = []
    watched = SimpleNamespace(read_row=lambda i: read.append(i) or index.read_row(i))
    windows = load_windows(watched, plan, collator, **CUT, ahead=2)
    next(windows)
    deadline = time.monotonic() + 10
    while len(read) < 18 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(read) == 18  # the step that was handed out, and two ahead
    windows.close()


def test_closing_early_ends_the_thread(index, collator):
    plan = sample_plan(index, SAMPLING, total_steps=9, global_batch=6)
    windows = load_windows(index, plan, collator, **CUT)
    next(windows)
    assert threads()
    windows.close()
    assert not threads()
    with pytest.raises(StopIteration):
        next(windows)


def test_closing_early_does_not_read_on(index, collator):
    plan = sample_plan(index, SAMPLING, total_steps=9, global_batch=6)
    read = []

    def read_row(i):
        read.append(i)
        time.sleep(0.01)
        return index.read_row(i)

    windows = load_windows(SimpleNamespace(read_row=read_row), plan, collator, **CUT, ahead=6)
    next(windows)
    windows.close()
    assert len(read) <= 18  # the step that was handed out and the one begun, of seven


def test_an_error_comes_at_its_step_and_ends_the_thread(index, collator):
    plan = sample_plan(index, SAMPLING, total_steps=4, global_batch=6)
    bad = int(plan.rows(2)[0])

    def read_row(i):
        if i == bad and i not in first_epoch:
            raise RunError("changed")
        return index.read_row(i)

    first_epoch = set(plan.rows(0).tolist()) | set(plan.rows(1).tolist())
    windows = load_windows(SimpleNamespace(read_row=read_row), plan, collator, **CUT)
    assert len([next(windows), next(windows)]) == 2
    with pytest.raises(RunError, match="changed"):
        next(windows)
    assert not threads()


def test_a_changed_file_is_the_users_to_mend(index, collator):
    os.truncate(index.path, 10)
    with pytest.raises(RunError, match="the file has changed while it was in use"):
        load_batch(index, collator, np.array([5]))


def test_a_batch_of_no_rows(index, collator):
    assert not load_batch(index, collator, np.array([], np.int64)).supervised.any()
