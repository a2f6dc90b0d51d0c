"""Rewards from a reward model: scored once, in any order and division, squashed, kept."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from wmtp_ds.data.index import DataIndex, build_index
from wmtp_ds.data.rows import Row
from wmtp_ds.errors import UserError
from wmtp_ds.models.config_file import model_key
from wmtp_ds.reward_values import Squash
from wmtp_ds.rewards import ScoreCache, score_rows, stored_scores

FINITE = st.floats(-1e4, 1e4, width=32)


@given(st.lists(FINITE, min_size=1, max_size=20))
def test_the_logistic_function_of_scores(scores: list[float]) -> None:
    found = Squash("sigmoid")(np.array(scores, np.float32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expit(np.array(scores, np.float32).astype(float)), rtol=1e-6, atol=1e-38)
    assert ((found >= 0) & (found <= 1)).all()


@given(st.lists(FINITE, min_size=2, max_size=20))
def test_the_logistic_function_of_z_scores(scores: list[float]) -> None:
    array = np.array(scores, np.float32)
    wide = array.astype(float)
    deviation = wide.std() or 1.0
    found = Squash.of("zscore_sigmoid", array)(array)
    np.testing.assert_allclose(found, expit((wide - wide.mean()) / deviation), rtol=1e-5, atol=1e-7)


def test_z_scores_are_those_of_the_rows_that_are_trained_on() -> None:
    squash = Squash.of("zscore_sigmoid", np.array([1.0, 3.0], np.float32))
    np.testing.assert_allclose(squash(np.array([2.0, 4.0, np.nan], np.float32)), [0.5, expit(2.0), np.nan], rtol=1e-6)


def test_scores_that_are_all_alike_say_nothing() -> None:
    alike = np.full(5, 7.0, np.float32)
    assert Squash.of("zscore_sigmoid", alike)(alike).tolist() == [0.5] * 5


# --- scoring ---


def write(file: Path, outputs: list[str], **metadata: object) -> DataIndex:
    lines = []
    for number, output in enumerate(outputs):
        row = {"problem_id": f"p{number}", "instruction": "do", "output": output, "is_correct": True}
        lines.append(json.dumps(row | {"metadata": {key: value[number] for key, value in metadata.items()}}))
    file.write_text("\n\n".join(lines) + "\n")  # blank lines are no rows
    return build_index(file)


def encode(row: Row) -> list[int]:
    return [1 + ord(letter) - ord("a") for letter in row.output]


class Sums:
    """A reward model that adds tokens up, and remembers what it was called with."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, input_ids: torch.Tensor, lengths: torch.Tensor, pad_id: int) -> torch.Tensor:
        self.shapes.append(tuple(input_ids.shape))
        assert all((ids[length:] == pad_id).all() for ids, length in zip(input_ids, lengths, strict=True))
        assert all((ids[:length] != pad_id).all() for ids, length in zip(input_ids, lengths, strict=True))
        return torch.stack([ids[:length].sum() for ids, length in zip(input_ids, lengths, strict=True)]).float()


OUTPUTS = ["a", "bcd", "zz", "abcdefgh", "b", "ccccc"]


def score(index: DataIndex, rows: list[int], batch_size: int, scorer: Sums | None = None, **more: object) -> np.ndarray:
    options = {"batch_size": batch_size, "vocabulary": 40, "device": torch.device("cpu")} | more
    return score_rows(scorer or Sums(), encode, index, rows, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [5, 0, 3], [2], []])
def test_each_row_gets_its_own_score(tmp_path: Path, batch_size: int, rows: list[int]) -> None:
    index = write(tmp_path / "rows.jsonl", OUTPUTS)
    done: list[int] = []
    found = score(index, rows, batch_size, on_done=done.append)
    assert found.dtype == np.float32
    assert found.tolist() == [sum(ord(letter) - 96 for letter in OUTPUTS[row]) for row in rows]
    assert sum(done) == len(rows)


def test_long_solutions_come_first_and_share_a_batch(tmp_path: Path) -> None:
    scorer = Sums()
    score(write(tmp_path / "rows.jsonl", OUTPUTS), list(range(6)), 2, scorer)
    assert scorer.shapes == [(2, 8), (2, 3), (2, 1)]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_work_and_all_know_the_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """Ranks in turn; what they would add up is added up here."""
    index = write(tmp_path / "rows.jsonl", OUTPUTS)
    monkeypatch.setattr("wmtp_ds.rewards.distributed.world_size", lambda: world)
    monkeypatch.setattr("wmtp_ds.rewards.distributed.sum_over_ranks", lambda tensor: tensor)
    parts, calls = [], []
    for rank in range(world):
        monkeypatch.setattr("wmtp_ds.rewards.distributed.rank", lambda rank=rank: rank)
        scorer = Sums()
        parts.append(score(index, list(range(6)), 2, scorer))
        calls.append(len(scorer.shapes))
    assert len(set(calls)) == 1  # as many collective forward passes on every rank
    assert np.sum(parts, axis=0).tolist() == score_alone(index).tolist()


def score_alone(index: DataIndex) -> np.ndarray:
    return np.array([sum(ord(letter) - 96 for letter in index.read_row(row).output) for row in range(len(index))])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_names_the_line(tmp_path: Path, wrong: float) -> None:
    index = write(tmp_path / "rows.jsonl", OUTPUTS)

    def broken(input_ids: torch.Tensor, lengths: torch.Tensor, pad_id: int) -> torch.Tensor:
        return torch.where(lengths == 2, wrong, 1.0)

    with pytest.raises(UserError, match=rf"rows\.jsonl:5 is {wrong}\. .*models\.reward\.dtype"):
        score_rows(broken, encode, index, range(6), batch_size=3, vocabulary=40, device=torch.device("cpu"))


# --- keeping ---


def test_a_cache_knows_what_it_was_given(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "new/folder", ["data", "model"], 3)
    assert np.isnan(cache.load()).all()
    cache.store(np.array([1.0, np.nan, 3.0], np.float32))
    np.testing.assert_array_equal(cache.load(), [1.0, np.nan, 3.0])
    assert [file.name for file in cache.path.parent.iterdir()] == [cache.path.name]
    assert np.isnan(ScoreCache(tmp_path / "new/folder", ["data", "another"], 3).load()).all()


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x93NUMPY\x01\x00"])
def test_a_damaged_cache_is_none(tmp_path: Path, content: bytes) -> None:
    cache = ScoreCache(tmp_path, ["data"], 3)
    cache.path.write_bytes(content)
    assert np.isnan(cache.load()).all()


@pytest.mark.parametrize("array", [np.zeros(4, np.float32), np.zeros(3, np.float64), np.zeros((3, 1), np.float32)])
def test_a_cache_of_something_else_is_none(tmp_path: Path, array: np.ndarray) -> None:
    cache = ScoreCache(tmp_path, ["data"], 3)
    np.save(cache.path, array)
    assert np.isnan(cache.load()).all()


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ScoreCache(tmp_path / "file" / "folder", ["data"], 3).store(np.zeros(3, np.float32))


def test_another_model_has_another_key(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    key = model_key(tmp_path)
    assert key == model_key(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    changed = model_key(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    assert len({key, changed, model_key(tmp_path)}) == 3


# --- scores that come with the data ---


def test_scores_in_the_data(tmp_path: Path) -> None:
    index = write(tmp_path / "rows.jsonl", ["a", "b", "c"], reward_score=[0.5, -2, 3])
    assert stored_scores(index, [2, 0]).tolist() == [3.0, 0.5]


@pytest.mark.parametrize("wrong", ["0.5", None, True, 1e300])
def test_no_score_in_the_data_names_the_line(tmp_path: Path, wrong: object) -> None:
    index = write(tmp_path / "rows.jsonl", ["a", "b"], reward_score=[0.5, wrong])
    with pytest.raises(UserError, match=r"rows\.jsonl:3: metadata\.reward_score is .*wmtp-ds data label --reward-mod"):
        stored_scores(index, [0, 1])
