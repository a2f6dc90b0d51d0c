"""Scores as batches carry them: the right rows, wherever they stand, and nothing that is damaged."""

import itertools
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_process import examples
from score_checkout import LONG_PROMPT, MAX_LENGTH, REFERENCE, TOO_LONG, TRAIN, work

from wmtp_ds.data.batches import Collator
from wmtp_ds.data.index import build_index
from wmtp_ds.data.loader import Ranks, load_batch, load_packed, load_windows
from wmtp_ds.data.sampling import SamplePlan
from wmtp_ds.data.templates import get_template
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.models.loading import load_policy, load_tokenizer
from wmtp_ds.models.reference import ReferenceModel
from wmtp_ds.scores.manifest import Input, Manifest, Shard, StoredFile, read_manifest, what_is_damaged
from wmtp_ds.scores.reader import ReferenceScores
from wmtp_ds.scores.scoring import Scoring


@pytest.fixture
def scores(there: Path) -> ReferenceScores:
    manifest = read_manifest(Path("scores"))
    return ReferenceScores(Path("scores"), manifest, manifest.inputs[0])


@pytest.fixture
def collator(scores: ReferenceScores) -> Collator:
    made = Collator(load_tokenizer(REFERENCE), get_template("alpaca"), MAX_LENGTH)
    made.reference = scores
    return made


@pytest.fixture
def live(there: Path) -> ReferenceModel:
    return ReferenceModel(load_policy(REFERENCE, n_future_tokens=1)).eval()


@torch.no_grad()
def test_batches_carry_what_the_live_reference_says(collator: Collator, live: ReferenceModel) -> None:
    index = build_index(TRAIN)
    for rows in ([3, 0, 29], [LONG_PROMPT, 5], [11], [2, 2, TOO_LONG]):
        batch = load_batch(index, collator, np.array(rows))
        assert batch.reference is not None
        assert batch.reference.dtype == torch.float32
        torch.testing.assert_close(batch.reference, live(batch), rtol=0, atol=1e-5)
        assert torch.equal(batch.reference != 0, batch.supervised)
    assert collator.truncated
    nothing = load_batch(index, collator, np.array([], np.int64))
    assert torch.equal(nothing.reference, torch.zeros(1, 1))


@torch.no_grad()
@pytest.mark.parametrize("world_size", [1, 2])
def test_packed_rows_carry_it_too(here: Path, collator: Collator, world_size: int) -> None:
    wide = Scoring(work("wide", max_length=900)).run()[0]
    collator.max_length, collator.reference = 900, ReferenceScores(Path("wide"), wide, wide.inputs[0])
    live = ReferenceModel(load_policy(REFERENCE, n_future_tokens=1)).eval()
    rows, seen, segments = np.array([3, 0, 29, 11, LONG_PROMPT, 5, 8, 8]), [], 0
    for rank in range(world_size):
        for batch in load_packed(build_index(TRAIN), collator, rows, None, Ranks(rank, world_size, 2)):
            torch.testing.assert_close(batch.reference, live(batch), rtol=0, atol=1e-5)
            assert torch.equal(batch.reference != 0, batch.supervised)
            seen, segments = seen + batch.row_ids.tolist(), max(segments, int(batch.segment_ids.max()))
    assert sorted(seen) == sorted(rows.tolist())
    assert segments > 1


def test_after_a_resume_and_on_other_ranks_the_rows_are_the_same(collator: Collator, scores: ReferenceScores) -> None:
    index = build_index(TRAIN)
    draws = np.random.default_rng(0).permutation([row for row in range(len(index)) if row != TOO_LONG])[:24]

    class Plan(SamplePlan):
        total_steps = 6

        def __init__(self) -> None:
            pass

        def rows(self, step: int) -> np.ndarray:
            return draws[4 * step : 4 * step + 4]

    def windows(start: int, world: int, batch: int, accumulation: int) -> list[dict[int, list[float]]]:
        found = []
        loaders = [
            load_windows(
                index,
                Plan(),
                collator,
                rank=rank,
                world_size=world,
                batch_size=batch,
                accumulation=accumulation,
                start=start,
            )
            for rank in range(world)
        ]
        for window in zip(*loaders, strict=True):
            batches = [batch for own in window for batch in own]
            found.append(
                {
                    int(row): batch.reference[b][batch.supervised[b]].tolist()
                    for batch in batches
                    for b, row in enumerate(batch.row_ids)
                }
            )
        return found

    whole = windows(0, 1, 4, 1)
    assert [sorted(step) for step in whole] == [sorted(draws[4 * step : 4 * step + 4].tolist()) for step in range(6)]
    assert windows(4, 1, 4, 1) == whole[4:]
    assert windows(0, 2, 1, 2) == windows(0, 4, 1, 1) == windows(0, 1, 2, 2) == whole


def test_rows_of_other_tokens_are_refused(scores: ReferenceScores, collator: Collator) -> None:
    index = build_index(TRAIN)
    tokens, count = collator.sequence(*collator.encode([index.read_row(5)])[0])
    assert len(scores(5, tokens, count)) == count
    changed = tokens.copy()
    changed[1] += 1  # in the prompt
    for row, given_tokens, supervised in ((5, changed, count), (6, tokens, count), (5, tokens, count - 1)):
        with pytest.raises(RunError, match=rf"row {row} of .*train.jsonl has other tokens than those that were scored"):
            scores(row, given_tokens, supervised)


def test_unscored_rows(scores: ReferenceScores) -> None:
    assert scores.unscored(np.array([0, TOO_LONG, 3])).tolist() == [TOO_LONG]
    assert len(scores(TOO_LONG, np.array([1]), 0)) == 0


# --- the format ---


def made(folder: Path, lengths: list[int], cuts: list[int], dtype: str, base: Manifest) -> tuple[Manifest, np.ndarray]:
    """A folder written by hand: rows of these lengths, cut into files before these rows."""
    losses = (np.arange(sum(lengths)) * 0.5 + 1).astype(dtype)
    ends = np.cumsum(lengths)
    index = np.array([[end, zlib.crc32(np.array([row], "<i4").tobytes())] for row, end in enumerate(ends)], np.int64)
    folder.mkdir()

    def file(name: str, array: np.ndarray) -> dict:
        np.save(folder / name, array)
        return {"name": name, "size": (folder / name).stat().st_size, "sha256": "0" * 64}

    edges = [0, *sorted(set(cuts)), len(lengths)]
    shards = []
    for number, (first, after) in enumerate(itertools.pairwise(edges)):
        part = losses[ends[first] - lengths[first] : ends[after - 1]]
        facts = {"rows": after - first, "tokens": len(part), "loss": float(part.sum(dtype=float))}
        shards.append(Shard(**file(f"input0-{number:05d}.npy", part), **facts))
    scored = Input(
        path="d.jsonl", sha256="0" * 64, size=1, rows=len(lengths), scored=sum(n > 0 for n in lengths),
        tokens=sum(lengths), index=StoredFile(**file("input0-rows.npy", index)), shards=tuple(shards),
    )  # fmt: skip
    settings = base.settings.model_copy(update={"dtype": dtype})
    return base.model_copy(update={"inputs": (scored,), "settings": settings}), losses


@examples(40)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=12).filter(any),
    data=st.data(),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_any_rows_in_any_files(prepared: Path, tmp_path_factory, lengths: list[int], data, dtype: str) -> None:
    folder = tmp_path_factory.mktemp("format") / "f"
    cuts = data.draw(st.lists(st.integers(1, len(lengths) - 1), max_size=4)) if len(lengths) > 1 else []
    manifest, losses = made(folder, lengths, cuts, dtype, read_manifest(prepared / "scores"))
    manifest.write(folder)
    manifest = read_manifest(folder)
    reader = ReferenceScores(folder, manifest, manifest.inputs[0])
    begin = 0
    for row, length in enumerate(lengths):
        found = reader(row, np.array([row]), length)
        assert found.dtype == np.float32
        assert found.tolist() == losses[begin : begin + length].astype(np.float32).tolist()
        begin += length
    assert reader.unscored(np.arange(len(lengths))).tolist() == [
        row for row, length in enumerate(lengths) if not length
    ]


WRONG = st.one_of(
    st.none(), st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=2), st.just({}), st.floats()
)


@examples(60)
@given(data=st.data())
def test_whatever_a_manifest_says_it_is_an_error_or_a_manifest(prepared: Path, tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    content = json.loads((prepared / "scores/manifest.json").read_text())
    node, key = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    node[key] = data.draw(WRONG.filter(lambda value: value != node[key]))
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        read_manifest(folder)
    text = (prepared / "scores/manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(text[: data.draw(st.integers(0, len(text) - 3))])
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        read_manifest(folder)


def test_names_in_a_manifest_stay_in_its_folder(prepared: Path, tmp_path: Path) -> None:
    manifest = read_manifest(prepared / "scores")
    for name in ("../x.npy", "/etc/x.npy", ".npy", "a/b.npy", "x.npy\n"):
        scored = manifest.inputs[0].model_copy(
            update={"index": manifest.inputs[0].index.model_copy(update={"name": name})}
        )
        manifest.model_copy(update={"inputs": (scored,)}).write(tmp_path)
        with pytest.raises(UserError, match=r"damaged: inputs.0.index.name"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("what", ["missing", "cut", "flipped", "dtype", "pickle"])
def test_damaged_files(here: Path, what: str) -> None:
    manifest = read_manifest(Path("scores"))
    scored = manifest.inputs[0]
    shard = scored.shards[1]
    file = Path("scores") / shard.name
    content = file.read_bytes()
    if what == "missing":
        file.unlink()
    elif what == "dtype":
        np.save(file, np.load(file).astype(np.float16))
    elif what == "pickle":
        np.save(file, np.array([{}], object), allow_pickle=True)
    else:
        file.write_bytes(content[:-1] if what == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    assert (what_is_damaged(Path("scores"), shard, contents=False) is None) == (what == "flipped")
    assert what_is_damaged(Path("scores"), shard, contents=True) is not None
    if what != "flipped":
        with pytest.raises(UserError, match=rf"{shard.name} is (damaged|missing)"):
            ReferenceScores(Path("scores"), manifest, scored)
