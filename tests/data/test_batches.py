"""Rows become tensors: tokenisation, padding, masks, truncation, and how a global batch is cut."""

import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from wmtp_ds.data.batches import NO_ROW, Batch, Collator, TextEncoder, eligible_rows, micro_batches, validation_batches
from wmtp_ds.data.index import build_index
from wmtp_ds.data.rows import Row
from wmtp_ds.data.sampling import SamplePlan
from wmtp_ds.data.templates import alpaca, plain
from wmtp_ds.errors import UserError

TEXTS = ["def add(a, b):\n    return a + b\n", "Write a function.", "for i in range(10):\n    print(i)"] * 5


def byte_level(**special: str) -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


TOKENIZER = byte_level(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
BOS, EOS, PAD = 0, 1, 2


def sentence_piece_like() -> Any:
    """Llama's: a space in front, spaces as ▁, unknown characters byte by byte."""
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    core = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def row(output: str = "return a + b", instruction: str = "Add a and b.", is_correct: bool = True) -> Row:
    return Row("p", instruction, output, is_correct)


def collator(max_length: int = 200, **options: Any) -> Collator:
    return Collator(TOKENIZER, plain, max_length, **options)


def check(batch: Batch) -> None:
    """What holds for every batch."""
    count, length = batch.input_ids.shape
    expected = {
        "input_ids": (torch.int64, (count, length)),
        "supervised": (torch.bool, (count, length)),
        "decisions": (torch.bool, (count, length)),
        "rewards": (torch.float32, (count,)),
        "segment_ids": (torch.int32, (count, length)),
        "row_ids": (torch.int64, (count,)),
    }
    assert {name: (getattr(batch, name).dtype, tuple(getattr(batch, name).shape)) for name in expected} == expected
    assert not batch.decisions[:, -1].any()
    assert torch.equal(batch.decisions[:, :-1], batch.supervised[:, 1:])
    assert not batch.supervised[:, 0].any()
    assert not batch.supervised[batch.segment_ids == 0].any()
    assert (batch.input_ids[:, 0] == BOS).all()
    assert (batch.segment_ids[:, 0] == 1).all()
    assert (batch.segment_ids.diff(dim=1) <= 0).all()  # padding is on the right
    assert (batch.input_ids[batch.segment_ids == 0] == PAD).all()
    assert ((batch.rewards >= 0) & (batch.rewards <= 1)).all()


def test_a_batch_by_hand():
    rows = [row(), row("x", "Long " * 10, is_correct=False)]
    batch = collator()(rows, [5, 9])
    check(batch)
    expected = [[BOS, *ids_of(plain(r)), *ids_of(r.output), EOS] for r in rows]
    for b, tokens in enumerate(expected):
        learned = len(ids_of(rows[b].output)) + 1
        assert batch.input_ids[b, : len(tokens)].tolist() == tokens
        assert batch.supervised[b].nonzero().flatten().tolist() == list(range(len(tokens) - learned, len(tokens)))
        assert int(batch.segment_ids[b].sum()) == len(tokens)
    assert batch.input_ids.shape[1] == max(map(len, expected))
    assert batch.rewards.tolist() == [1.0, 0.0]
    assert batch.row_ids.tolist() == [5, 9]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=60), st.text(max_size=60), st.booleans()), min_size=1, max_size=4),
    st.integers(2, 90),
    st.sampled_from([1, 8]),
)
def test_rows_of_any_length(pairs, max_length, multiple):
    rows = [row(output, instruction, label) for instruction, output, label in pairs]
    made = collator(max_length, pad_to_multiple_of=multiple)
    batch = made(rows, range(len(rows)))
    check(batch)
    assert batch.input_ids.shape[1] % multiple == 0
    assert int((batch.segment_ids > 0).sum(1).max()) <= max_length
    truncated = skipped = 0
    for b, r in enumerate(rows):
        prompt, solution = ids_of(plain(r)), ids_of(r.output)
        tokens = batch.input_ids[b][batch.segment_ids[b] > 0].tolist()
        if len(solution) + 2 > max_length:
            skipped += 1
            assert tokens == [BOS]
            assert not batch.supervised[b].any()
            continue
        truncated += len(prompt) + len(solution) + 2 > max_length
        kept = tokens[1 : len(tokens) - len(solution) - 1]
        assert kept == prompt[len(prompt) - len(kept) :]
        assert len(kept) == min(len(prompt), max_length - 2 - len(solution))
        assert batch.input_ids[b][batch.supervised[b]].tolist() == [*solution, EOS]
    assert (made.truncated, made.skipped) == (truncated, skipped)


def test_the_solution_may_fill_the_sequence():
    length = len(ids_of("return a + b")) + 2
    made = collator(length)
    batch = made([row()], [0])
    assert batch.input_ids.tolist() == [[BOS, *ids_of("return a + b"), EOS]]
    assert (made.truncated, made.skipped) == (1, 0)
    made = collator(length - 1)
    assert made([row()], [0]).input_ids.tolist() == [[BOS]]
    assert (made.truncated, made.skipped) == (0, 1)


def test_prompt_and_solution_are_tokenised_separately():
    assert ids_of("function") != ids_of("func") + ids_of("tion")  # together they would be other tokens
    made = Collator(TOKENIZER, lambda r: r.instruction, 50)
    assert made([row("tion", "func")], [0]).input_ids.tolist() == [[BOS, *ids_of("func"), *ids_of("tion"), EOS]]


def test_text_that_looks_like_a_special_token_stays_text():
    text = "a <s>b</s> <pad>"
    assert ids_of(text) != TextEncoder(TOKENIZER)([text])[0]
    batch = collator()([row(text)], [0])
    tokens = batch.input_ids[0].tolist()
    assert (tokens.count(BOS), tokens.count(EOS), tokens.count(PAD)) == (1, 1, 0)
    assert TOKENIZER.decode(batch.input_ids[0][batch.supervised[0]], skip_special_tokens=True) == text


def test_settings_of_the_shared_tokenizer_do_not_matter():
    tokenizer = byte_level(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer(["a b c d e f"], truncation=True, max_length=2, padding="max_length")
    encoder = TextEncoder(tokenizer)
    assert encoder(["a b c d e f", "a"]) == [ids_of("a b c d e f"), ids_of("a")]
    assert encoder([]) == []


def test_without_a_pad_token_padding_is_eos_and_not_learned():
    made = Collator(byte_level(bos_token="<s>", eos_token="</s>"), plain, 100)
    batch = made([row(), row("x")], [0, 1])
    padding = batch.segment_ids == 0
    assert padding.any()
    assert (batch.input_ids[padding] == EOS).all()
    assert not batch.supervised[padding].any()
    assert [int(n) for n in (batch.input_ids[batch.supervised] == EOS).sum().flatten()] == [2]


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_tokenizer_without_bos_or_eos_is_an_error(name):
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    del special[name]
    with pytest.raises(UserError, match=rf"it has no {name}, .*models\.policy\.tokenizer_path"):
        Collator(byte_level(**special), plain, 100)


def test_scores_take_the_place_of_labels():
    scores = np.array([0.25, 0.5, 1.0])
    batch = collator(rewards=scores)([row(), row()], np.array([2, 0]))
    assert batch.rewards.tolist() == [1.0, 0.25]
    check(batch)


@pytest.mark.parametrize("multiple", [1, 8])
def test_no_rows_make_a_batch_without_anything_to_learn(multiple):
    batch = collator(pad_to_multiple_of=multiple, rewards=np.array([0.5]))([], np.array([], np.int64))
    check(batch)
    assert batch.input_ids.shape == (1, multiple)
    assert not batch.supervised.any()
    assert not batch.decisions.any()
    assert batch.row_ids.tolist() == [NO_ROW]


def test_to_moves_every_tensor():
    batch = collator()([row()], [0])
    assert batch.to("meta").reference is None
    batch = replace(batch, reference=torch.zeros(batch.input_ids.shape))
    moved = batch.to("meta")
    assert {getattr(moved, field.name).device.type for field in fields(Batch)} == {"meta"}
    assert moved.host is batch
    assert moved.to("meta").host is batch
    for field in fields(Batch):
        assert getattr(moved, field.name).shape == getattr(batch, field.name).shape


def write(path: Path, outputs: list[str]) -> Path:
    rows = [{"problem_id": "p", "instruction": "i", "output": output, "is_correct": True} for output in outputs]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("tokenizer", [TOKENIZER, sentence_piece_like()])
@pytest.mark.parametrize("max_length", [2, 5, 20, 60])
def test_eligible_rows_are_those_whose_solution_fits(tmp_path, monkeypatch, tokenizer, max_length):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts = [*("a " * n + "a" for n in range(40)), *("é" * n for n in range(1, 30)), *("x" * n for n in range(1, 60))]
    index = build_index(write(tmp_path / "d.jsonl", texts))
    mask, skipped = eligible_rows(index, tokenizer, max_length)
    fits = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2 <= max_length for text in texts]
    assert mask.tolist() == fits
    assert skipped == fits.count(False)
    made = Collator(tokenizer, alpaca, max_length)
    made([index.read_row(i) for i in range(len(index))], range(len(index)))
    assert made.skipped == skipped


def test_short_solutions_are_not_even_read(tmp_path):
    index = build_index(write(tmp_path / "d.jsonl", ["short"] * 20 + ["long " * 30]))
    read: list[int] = []
    watched = SimpleNamespace(
        output_bytes=index.output_bytes, read_row=lambda i: read.append(i) or index.read_row(i), __len__=None
    )
    watched = type("Watched", (SimpleNamespace,), {"__len__": lambda self: len(index)})(**vars(watched))
    mask, skipped = eligible_rows(watched, TOKENIZER, 30)
    assert (mask.sum(), skipped, read) == (20, 1, [20])


def plan_of(draws: int, global_batch: int) -> SamplePlan:
    index: Any = None
    return SamplePlan(index, np.arange(draws) * 10, global_batch, draws, ((0, draws),), ())


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2))
def test_micro_batches_are_the_global_batch(world_size, accumulation, batch_size, step):
    size = world_size * accumulation * batch_size
    plan = plan_of(3 * size, size)
    cut = [micro_batches(plan, step, rank, world_size, batch_size, accumulation) for rank in range(world_size)]
    for rank, windows in enumerate(cut):
        assert len(windows) == accumulation
        for a, rows in enumerate(windows):
            assert rows.shape == (batch_size,)
            for b, found in enumerate(rows):
                assert found == plan.rows(step)[(a * world_size + rank) * batch_size + b]
    together = [int(r) for windows in cut for rows in windows for r in rows]
    assert sorted(together) == plan.rows(step).tolist()


def test_a_cut_that_is_not_the_global_batch_is_a_programmers_error():
    with pytest.raises(ValueError, match="reshape"):
        micro_batches(plan_of(16, 8), 0, 0, 3, 1, 2)


@given(st.integers(0, 50), st.integers(1, 4), st.integers(1, 5))
def test_validation_rows_are_each_read_once(count, world_size, batch_size):
    rows = np.arange(count) * 3
    shares = [validation_batches(rows, rank, world_size, batch_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(int(r) for share in shares for batch in share for r in batch) == rows.tolist()
    assert all(len(batch) <= batch_size for share in shares for batch in share)
    assert len(shares[0]) == -(-count // (world_size * batch_size))
    in_order = [int(r) for step in zip(*shares, strict=True) for batch in step for r in batch]
    assert in_order == rows.tolist()
