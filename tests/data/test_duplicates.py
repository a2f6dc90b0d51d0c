"""Near duplicates: against brute force, and the rows that `wmtp-ds data dedup` drops."""

import re
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from duplicate_rows import WORDS, long_text, planted, row, write
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_ds.data.duplicates import DuplicateOptions, find_duplicates
from wmtp_ds.data.duplicates_files import write_kept
from wmtp_ds.data.duplicates_near import missed, near_duplicates, rows_of_band
from wmtp_ds.data.duplicates_shingles import (
    MinHash,
    code_tokens,
    jaccard,
    same_code,
    shingles,
    standard_error,
)


def brute_force(a: str, b: str, size: int) -> float:
    """The Jaccard similarity of the sets of tuples of tokens."""
    sets = []
    for text in (a, b):
        tokens = re.findall(r"\w+|[^\w\s]", text)
        width = min(size, len(tokens))
        sets.append({tuple(tokens[i : i + width]) for i in range(len(tokens) - width + 1)} if tokens else set())
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1]) if sets[0] | sets[1] else 1.0


def family(random: Random, copies: int, length: int = 120) -> list[str]:
    """A text and copies of it, each with a few words changed."""
    text = random.choices(WORDS, k=length)
    found = [" ".join(text)]
    for _ in range(copies):
        other = list(text)
        for _ in range(random.randrange(6)):
            other[random.randrange(length)] = random.choice(WORDS)
        found.append(" ".join(other))
    return found


def greedy(texts: list[str], threshold: float, size: int, groups: list[int]) -> dict[int, tuple[int, float]]:
    """By comparing every text to all that were kept."""
    kept, found = [], {}
    for i, text in enumerate(texts):
        scores = [(brute_force(text, texts[j], size), -j) for j in kept if groups[j] == groups[i]]
        best, j = max(scores, default=(0.0, 0))
        if scores and best >= threshold:
            found[i] = -j, best
        else:
            kept.append(i)
    return found


def by_signature(texts: list[str], threshold: float, size: int, groups: list[int]) -> dict[int, tuple[int, float]]:
    sets = [shingles(code_tokens(text), size) for text in texts]
    signature = MinHash()
    found = near_duplicates(np.array([signature(one) for one in sets]), np.array(groups), threshold, sets.__getitem__)
    return {pair.text: (pair.of, pair.similarity) for pair in found}


@given(st.text(alphabet="ab (\n+", max_size=60), st.text(alphabet="ab (\n+", max_size=60), st.integers(1, 6))
def test_jaccard_is_that_of_the_sets_of_tuples(a: str, b: str, size: int) -> None:
    found = jaccard(shingles(code_tokens(a), size), shingles(code_tokens(b), size))
    assert found == pytest.approx(brute_force(a, b, size), abs=1e-12)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_planted_near_duplicates_are_found_as_by_brute_force(threshold: float) -> None:
    random = Random(7)
    texts = [text for _ in range(25) for text in family(random, 4)]
    random.shuffle(texts)
    groups = [random.randrange(2) for _ in texts]
    expected = greedy(texts, threshold, 5, groups)
    found = by_signature(texts, threshold, 5, groups)
    assert len(expected) >= 8
    assert found.keys() == expected.keys()
    assert {i: of for i, (of, _) in found.items()} == {i: of for i, (of, _) in expected.items()}
    for i, (_, similarity) in found.items():
        assert similarity == pytest.approx(expected[i][1], abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(alphabet="abc ", min_size=1, max_size=12), min_size=1, max_size=12), st.integers(1, 3))
def test_no_false_positives(texts: list[str], size: int) -> None:
    found = by_signature(texts, 0.6, size, [0] * len(texts))
    for i, (of, similarity) in found.items():
        assert of < i
        assert of not in found
        assert similarity == pytest.approx(brute_force(texts[i], texts[of], size), abs=1e-12)
        assert similarity >= 0.6


def test_texts_of_one_owner_are_not_compared() -> None:
    sets = [shingles(code_tokens("a b c d e f g h"), 2)] * 3
    signatures = np.array([MinHash()(one) for one in sets])
    owners = np.array([0, 0, 1])
    found = near_duplicates(signatures, np.zeros(3, np.int64), 0.8, sets.__getitem__, owners)
    assert [(pair.text, pair.of) for pair in found] == [(2, 0)]


def test_signatures_estimate_the_similarity_within_their_error() -> None:
    random, signature, errors = Random(3), MinHash(), []
    for _ in range(60):
        a, b = (np.unique(np.array(random.sample(range(600), 300), np.uint64) * np.uint64(0x9E3779B97F4A7C15))
                for _ in range(2))  # fmt: skip
        truth = jaccard(a, b)
        errors.append((np.mean(signature(a) == signature(b)) - truth) / standard_error(truth))
    assert abs(np.mean(errors)) < 0.5
    assert 0.7 < np.std(errors) < 1.3
    assert standard_error(0.5) == pytest.approx(0.0442, abs=1e-4)


def test_a_signature_made_part_by_part_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.sort(np.arange(1, 100, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    at_once = MinHash()(hashes).tolist()
    for rows in (1, 2, 98):
        monkeypatch.setattr("wmtp_ds.data.duplicates_shingles._ROWS", rows)
        assert MinHash()(hashes).tolist() == at_once


def test_signatures_are_the_same_in_every_run() -> None:
    found = MinHash()(shingles(code_tokens("def f(x):\n    return x + 1"), 5))
    assert found[:3].tolist() == MinHash()(shingles(code_tokens("def f(x): return x + 1"), 5))[:3].tolist()
    assert found[:3].tolist() == GOLDEN


GOLDEN = [743409739, 303969088, 412732456]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_miss_few(threshold: float) -> None:
    rows = rows_of_band(threshold)
    assert missed(threshold, rows) <= 1e-3
    assert rows == 16 or missed(threshold, rows + 1) > 1e-3


def test_code_is_the_same_but_for_trailing_white_space_and_empty_lines() -> None:
    assert same_code("if x:  \r\n\n    y()\n") == same_code("if x:\n    y()")
    assert same_code("if x:\n    y()\nz()") != same_code("if x:\n    y()\n    z()")


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return planted(tmp_path / "rows.jsonl")


def test_what_is_found_in_a_file(train: Path) -> None:
    found = find_duplicates(train, DuplicateOptions())
    assert np.flatnonzero(~found.kept).tolist() == [2, 3, 4, 9, 10]
    report = found.report
    solutions = report["repeated_solutions"]
    assert [(pair["row"].rpartition(":")[2], pair["of"].rpartition(":")[2], pair["rule"]) for pair in
            solutions["pairs"]] == [("3", "1", "exact"), ("4", "1", "near"), ("5", "2", "near")]  # fmt: skip
    assert (solutions["exact"], solutions["near"], solutions["groups"], solutions["correct"]) == (1, 2, 2, 2)
    assert solutions["pairs"][1]["similarity"] == pytest.approx(
        brute_force(long_text(1), long_text(1) + " x", 5), abs=1e-4
    )
    problems = report["repeated_problems"]
    assert (problems["exact"], problems["near"], problems["rows"]) == (1, 0, 2)
    assert report["conflicts"]["rows"] == 2
    assert report["conflicts"]["pairs"] == [{"row": f"{train}:8", "of": f"{train}:7", "says": "incorrect, and correct"}]
    assert report["rows_kept"] == 6


def test_rows_of_different_labels_are_never_merged(train: Path, tmp_path: Path) -> None:
    found = find_duplicates(train, DuplicateOptions())
    assert found.kept[[6, 7]].all()
    dropped = find_duplicates(train, DuplicateOptions(conflicts="drop"))
    assert not dropped.kept[[6, 7]].any()


def test_only_one_part(train: Path) -> None:
    found = find_duplicates(train, DuplicateOptions(parts=("solution",)))
    assert np.flatnonzero(~found.kept).tolist() == [2, 3, 4]
    assert found.report["repeated_problems"] is None
    found = find_duplicates(train, DuplicateOptions(parts=("problem",)))
    assert np.flatnonzero(~found.kept).tolist() == [9, 10]
    assert found.report["repeated_solutions"] is None


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_what_is_left_has_no_duplicates_and_keeps_its_order(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    random = Random(seed)
    folder = tmp_path_factory.mktemp("d")
    rows = [row(random.choice("pq"), text, random.random() < 0.5) for _ in range(5) for text in family(random, 3, 30)]
    random.shuffle(rows)
    options = DuplicateOptions(conflicts="drop", parts=("solution",))
    source = write(folder / "rows.jsonl", rows)
    first = find_duplicates(source, options)
    write_kept(first, folder / "out.jsonl", {})
    lines = source.read_text().splitlines()
    assert (folder / "out.jsonl").read_text().splitlines() == [lines[i] for i in np.flatnonzero(first.kept)]
    assert not find_duplicates(folder / "out.jsonl", options).anything


def kept_of(path: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[list[int], dict[str, Any]]:
    found = find_duplicates(write(path, rows), DuplicateOptions(**options))
    return np.flatnonzero(found.kept).tolist(), found.report


def chain(seed: int) -> tuple[str, str, str]:
    """Three texts, of which neighbours are near duplicates (0.7), and the first and the last are none."""
    middle = long_text(seed).split()
    return " ".join(["x"] * 8 + middle[8:]), " ".join(middle), " ".join(middle[:-8] + ["y"] * 8)


def test_a_copy_of_what_repeats_a_problem_of_its_own_id_is_compared_to_others(tmp_path: Path) -> None:
    first, middle, last = chain(1)
    rows = [row(problem, f"solution {n}", text=text) for n, (problem, text) in
            enumerate([("a", first), ("b", middle), ("a", middle), ("c", last)])]  # fmt: skip
    assert brute_force(first, last, 5) < 0.7 < brute_force(first, middle, 5)
    kept, report = kept_of(tmp_path / "rows.jsonl", rows, threshold=0.7)
    assert kept == [0, 2]
    assert [pair["of"].rpartition(":")[2] for pair in report["repeated_problems"]["pairs"]] == ["1", "3"]


def test_a_copy_of_what_is_nearly_the_same_is_nearly_the_same(tmp_path: Path) -> None:
    text = long_text(1)
    kept, report = kept_of(tmp_path / "rows.jsonl", [row("p", one) for one in (text, text + " x", text + " x\n")])
    assert kept == [0]
    found = report["repeated_solutions"]
    assert (found["exact"], found["near"], found["groups"]) == (0, 2, 1)
    assert [(pair["rule"], pair["similarity"] < 1) for pair in found["pairs"]] == [("near", True), ("near", True)]


def test_problems_without_a_text_repeat_nothing(tmp_path: Path) -> None:
    rows = [{**row(problem, f"{problem} says"), "instruction": " "} for problem in "pqr"]
    kept, report = kept_of(tmp_path / "rows.jsonl", rows)
    assert kept == [0, 1, 2]
    assert report["repeated_problems"]["rows"] == 0


def test_as_similar_as_the_threshold_is_near(tmp_path: Path) -> None:
    assert brute_force("a b c d", "a b c e", 1) == 0.6
    texts = ["a b c d", "a b c e"]
    for threshold, expected in ((0.6, [0]), (0.61, [0, 1])):
        kept, _ = kept_of(tmp_path / "rows.jsonl", [row("p", text) for text in texts], threshold=threshold, shingle=1)
        assert kept == expected
