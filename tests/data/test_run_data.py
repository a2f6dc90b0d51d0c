"""A run's data, cached or not, packed or not: the same solutions in every optimizer step."""

import json
import logging
import os
from itertools import chain
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from wmtp_ds.config import load_config
from wmtp_ds.data import token_cache
from wmtp_ds.data.batch import NO_ROW, PackedBatch
from wmtp_ds.run_data import MASK_ALIGNMENT, open_data

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Data and a tokenizer; no model is read."""
    monkeypatch.chdir(tmp_path)
    pieces = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.save_pretrained("policy")
    for name, count in (("train", 60), ("validation", 11)):
        with Path(f"{name}.jsonl").open("w") as stream:
            for i in range(count):
                row = {"problem_id": f"{name}{i // 2}", "instruction": "do " * (i % 4), "is_correct": i % 2 == 0}
                # The last rows of all are longer than max_length.
                stream.write(json.dumps(row | {"output": "x" * (200 if i >= count - 2 else 3 + 2 * i)}) + "\n")
    return tmp_path


def data(*overrides: str, world_size: int = 2, stage: str = "critic"):
    ours = {
        "models.policy.path": "policy",
        "dataset.train": "train.jsonl",
        "dataset.validation": "validation.jsonl",
        "dataset.max_length": 160,
        "dataset.template": "plain",
        "training.max_steps": 3,
        "data_sampling.n_samples": 40,
        "deepspeed.config": str(REPOSITORY / "ds_configs/zero3_cpu.json"),
    }
    typed = [f"{key}={json.dumps(value)}" for key, value in ours.items()]
    file = REPOSITORY / f"stage_configs/local/{stage}.toml"
    return open_data(load_config(file, [*typed, *overrides], checks=False, environ={}), world_size)


PACK, NO_CACHE = "data_sampling.pack_sequences=true", 'dataset.cache_dir=""'


def rows_of(windows) -> list[list[int]]:
    return [sorted(i for batch in window for i in batch.row_ids.tolist()) for window in windows]


def steps(run, world_size: int = 2):
    """The micro-batches of all ranks, step by step."""
    ranks = [list(run.windows(0, rank, world_size)) for rank in range(world_size)]
    return [[batch for window in windows for batch in window] for windows in zip(*ranks, strict=True)]


def test_every_step_reads_the_same_solutions(workspace):
    plain = data(NO_CACHE)
    expected = rows_of(steps(plain))
    assert [len(rows) for rows in expected] == [16, 16, 16]  # 2 ranks · 4 · 2
    for options in ([], [PACK], [PACK, NO_CACHE]):
        run = data(*options)
        assert (run.train_tokens is None) == (NO_CACHE in options)
        assert rows_of(steps(run)) == expected
        assert run.too_long == plain.too_long == 2


def test_packed_batches_do_not_depend_on_the_cache(workspace):
    for batch, twin in zip(chain(*steps(data(PACK))), chain(*steps(data(PACK, NO_CACHE))), strict=True):
        assert type(batch) is type(twin) is PackedBatch
        for name, tensor in vars(batch).items():
            if name != "reference":  # of which there is none
                assert torch.equal(tensor, getattr(twin, name)), name


def test_unpacked_batches_do_not_depend_on_the_cache(workspace):
    for batch, twin in zip(chain(*steps(data())), chain(*steps(data(NO_CACHE))), strict=True):
        for name, tensor in vars(batch).items():
            if name != "reference":  # of which there is none
                assert torch.equal(tensor, getattr(twin, name)), name


@pytest.mark.parametrize("stage", ["baseline", "critic"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_reads_every_solution_that_fits_once(workspace, stage, world_size):
    expected = [i for i in range(9) if stage == "critic" or i % 2 == 0]
    for options in ([], [PACK], [PACK, NO_CACHE], [NO_CACHE]):
        run = data(*options, world_size=world_size, stage=stage)
        shares = [run.validation_batches(rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        found = [i for share in shares for batch in share for i in batch.row_ids.tolist() if i != NO_ROW]
        assert sorted(found) == expected
        if PACK in options:
            assert len(shares[0]) <= len(data(NO_CACHE, world_size=world_size, stage=stage).validation_batches(0, 1))


def test_the_caches_folder_is_the_configs(workspace):
    data('dataset.cache_dir="elsewhere/tokens"')
    assert len([path for path in Path("elsewhere/tokens").iterdir() if path.is_dir()]) == 2
    assert not Path("storage").exists()
    data()
    assert len([path for path in Path("storage/cache/tokens").iterdir() if path.is_dir()]) == 2


def test_a_place_that_cannot_be_written_stops_no_run(workspace, caplog):
    caplog.set_level(logging.WARNING)
    Path("storage").write_text("a file")
    run = data(PACK)
    assert run.train_tokens is None
    assert len([r for r in caplog.records if "no tokens can be kept there" in r.getMessage()]) == 2
    assert rows_of(steps(run)) == rows_of(steps(data(NO_CACHE)))


def test_a_damaged_row_changes_no_batch(workspace):
    expected = steps(data())
    for tokens in Path("storage/cache/tokens").glob("*/tokens.npy"):
        size = tokens.stat().st_size
        with tokens.open("r+b") as file:
            file.seek(-size // 2, os.SEEK_END)
            file.write(b"\xff\xff" * 20)
    for window, twin in zip(expected, steps(data()), strict=True):
        for batch, same in zip(window, twin, strict=True):
            assert torch.equal(batch.input_ids, same.input_ids)


def test_masks_are_aligned_on_gpus_alone(workspace, monkeypatch):
    assert data(PACK).collator.pad_to_multiple_of == 1
    monkeypatch.setattr("wmtp_ds.run_data.resolve_device", lambda device: "cuda")
    assert data(PACK).collator.pad_to_multiple_of == MASK_ALIGNMENT
    assert data().collator.pad_to_multiple_of == 1


def test_a_second_start_tokenises_nothing(workspace, monkeypatch):
    data()
    monkeypatch.setattr(token_cache, "encode_rows", None)
    monkeypatch.setattr("wmtp_ds.data.batches.encode_rows", None)
    assert len(steps(data())) == 3
