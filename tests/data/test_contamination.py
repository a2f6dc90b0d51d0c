"""Overlap of training data with evaluation sets and with the other side of a split."""

import gzip
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_ds.cli.main import main
from wmtp_ds.data.contamination import ContainedSets, EvaluationSet
from wmtp_ds.data.contamination_sources import EvaluationText, read_evaluation
from wmtp_ds.data.duplicates import DuplicateOptions, find_duplicates
from wmtp_ds.errors import UserError

WORDS = [f"w{n}" for n in range(300)]


def text_of(seed: int, length: int = 40) -> str:
    return " ".join(Random(seed).choices(WORDS, k=length))


def row(problem: str, text: str, output: str) -> dict[str, Any]:
    return {"problem_id": problem, "instruction": text, "output": output, "is_correct": True}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def evaluation(*texts: tuple[str, str], ngram: int | None = 13, share: float = 0.7) -> EvaluationSet:
    found = [EvaluationText(f"e:{n}", part, text) for n, (part, text) in enumerate(texts, start=1)]
    return EvaluationSet(found, threshold=0.8, shingle=5, ngram=ngram, share=share)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 30)), max_size=8),
    st.sets(st.integers(0, 30)),
    st.sampled_from([0.0, 0.3, 0.7, 0.8, 1.0]),
)
def test_contained_sets_are_those_of_brute_force(sets: list[set[int]], of: set[int], share: float) -> None:
    index = ContainedSets([np.array(sorted(one), np.uint64) for one in sets], share)
    found = index.shared(np.array(sorted(of), np.uint64))
    # In tenths, as floating point is not the oracle.
    expected = [
        (i, len(one & of))
        for i, one in enumerate(sets)
        if one & of and 10 * len(one & of) >= round(10 * share) * len(one)
    ]
    assert found == expected


def ngram_share(of: str, text: str, size: int) -> float:
    grams = []
    for one in (of, text):
        said = re.findall(r"\w+", one.lower())
        grams.append({tuple(said[i : i + size]) for i in range(len(said) - size + 1)})
    return len(grams[0] & grams[1]) / len(grams[0])


def test_a_quotation_is_found_by_its_ngrams() -> None:
    problem = text_of(1)
    quoted = f"{text_of(2)}\n# {problem.upper().replace(' ', ', ', 5)}.\n{text_of(3)}"
    found = evaluation(("problem", text_of(9)), ("problem", problem)).compare("solution", quoted)
    assert found is not None
    assert (found.rule, found.similarity, found.of.where) == ("ngram", 1.0, "e:2")


def test_the_share_of_ngrams_decides() -> None:
    problem = text_of(1)
    part = " ".join(problem.split()[:30])  # 18 of 28 13-grams
    assert ngram_share(problem, part + " " + text_of(5), 13) == pytest.approx(18 / 28)
    assert evaluation(("problem", problem)).compare("problem", part + " " + text_of(5)) is None
    found = evaluation(("problem", problem), share=0.6).compare("problem", part + " " + text_of(5))
    assert found is not None
    assert found.similarity == pytest.approx(18 / 28)
    one = " ".join(problem.split()[:13])
    assert evaluation(("problem", problem), share=0.0).compare("problem", f"{one} {text_of(6)}") is not None
    assert evaluation(("problem", problem), share=0.0).compare("problem", " ".join(problem.split()[:12])) is None


def test_short_texts_count_from_eight_words_on() -> None:
    for length, expected in ((7, None), (8, "ngram")):
        short = text_of(4, length)
        found = evaluation(("problem", short)).compare("problem", f"{text_of(5)} {short} {text_of(6)}")
        assert (found and found.rule) == expected


def test_shorter_ngrams_find_shorter_texts() -> None:
    short = text_of(4, 6)
    for ngram, expected in ((5, "ngram"), (6, "ngram"), (7, None)):
        found = evaluation(("problem", short), ngram=ngram).compare("problem", f"{text_of(5)} {short} {text_of(6)}")
        assert (found and found.rule) == expected


def test_of_texts_that_are_contained_alike_the_first_is_named() -> None:
    one, two = text_of(1, 20), text_of(2, 20)
    for order in ((one, two), (two, one)):
        known = evaluation(*(("problem", text) for text in order))
        found = known.compare("problem", f"{two} {text_of(3)} {one} {text_of(5)}")
        assert found is not None
        assert (found.rule, found.similarity, found.of.where) == ("ngram", 1.0, "e:1")
    partly = evaluation(("problem", " ".join([*one.split()[:18], "other", "words"])), ("problem", two))
    found = partly.compare("problem", f"{one} {text_of(3)} {two} {text_of(5)}")
    assert found is not None
    assert (found.similarity, found.of.where) == (1.0, "e:2")


def test_a_text_that_says_nothing_is_in_no_evaluation_set() -> None:
    known = evaluation(("problem", " \n"), ("solution", ""), ("problem", "something"))
    assert len(known.texts) == 1
    assert known.compare("problem", "") is None
    assert known.compare("solution", "\n") is None


def test_exact_and_near_duplicates_are_of_the_same_part() -> None:
    code = text_of(1)
    known = evaluation(("solution", code), ngram=None)
    same = known.compare("solution", code + "  \n\n")
    assert same is not None
    assert (same.rule, same.similarity) == ("exact", 1.0)
    near = known.compare("solution", code + " w1")
    assert near is not None
    assert (near.rule, near.similarity) == ("near", pytest.approx(36 / 37))
    assert known.compare("problem", code) is None
    assert known.compare("problem", code + " w1") is None
    assert known.compare("solution", text_of(2)) is None


def test_rows_that_overlap_are_found(tmp_path: Path) -> None:
    train = write(
        tmp_path / "rows.jsonl",
        [
            row("a", text_of(1), text_of(11)),
            row("b", text_of(2), text_of(12)),
            row("b", text_of(2), text_of(22)),
            row("c", text_of(3), text_of(13)),
        ],
    )
    humaneval = tmp_path / "HumanEval.jsonl.gz"
    with gzip.open(humaneval, "wt") as file:
        for line in (
            {"task_id": "HumanEval/0", "prompt": text_of(2) + " w1", "canonical_solution": text_of(50)},
            {"task_id": "HumanEval/1", "prompt": text_of(60), "canonical_solution": text_of(13)},
        ):
            file.write(json.dumps(line) + "\n")
    found = find_duplicates(train, DuplicateOptions(), against=[humaneval])
    assert found.kept.tolist() == [True, False, False, False]
    report = found.report["contamination"]
    assert (report["rows"], report["problems"], report["evaluation_texts"]) == (3, 2, 4)
    assert report["by_rule"] == {"problem_near": 2, "solution_exact": 1}
    assert report["pairs"][0]["row"] == f"{train}:2"
    assert report["pairs"][0]["of"] == f"{humaneval}:1"
    assert report["pairs"][2] == {"row": f"{train}:4", "part": "solution", "of": f"{humaneval}:2",
                                  "of_part": "solution", "rule": "exact", "similarity": 1.0}  # fmt: skip
    only = find_duplicates(train, DuplicateOptions(parts=("solution",)), against=[humaneval])
    assert only.kept.tolist() == [True, True, True, False]


def test_of_a_folder_only_what_is_for_evaluation(tmp_path: Path) -> None:
    write(tmp_path / "evaluation.jsonl", [row("a", "one", "two")])
    write(
        tmp_path / "problems.jsonl",
        [{"instruction": "trained on"}, {"instruction": "three", "input": "four", "evaluation_only": True}],
    )
    found = [(text.part, text.text) for text in read_evaluation(tmp_path)]
    assert found == [("problem", "one"), ("solution", "two"), ("problem", "three\nfour")]
    assert [text.text for text in read_evaluation(tmp_path / "problems.jsonl")] == ["trained on", "three\nfour"]


def test_no_problem_is_on_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "validation.jsonl", [row("a", text_of(1), "x y"), row("z", text_of(7), "x y")])
    rows = [
        row("a", text_of(8), "p q"),
        row("b", text_of(7) + " w1", "r s"),
        row("c", text_of(9), "x y"),
        row("b", text_of(7) + " w1", "t u"),
    ]
    train = write(tmp_path / "train.jsonl", rows)
    with pytest.raises(SystemExit):
        main(["data", "dedup", str(train), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["split"]["problems"], report["split"]["rows"]) == (2, 3)
    assert report["split"]["by_rule"] == {"problem_id": 1, "near": 1}
    assert [pair["of"] for pair in report["split"]["pairs"]] == [f"{tmp_path}/validation.jsonl:{n}" for n in (1, 2)]
    assert report["rows_kept"] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no such file: correct --against"),
        ("bad.jsonl.gz", b"no gzip", "is no complete gzip file"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "is no complete gzip file"),
        ("empty.jsonl", b"", "nothing to evaluate on"),
        ("other.jsonl", b'{"a": 1}\n', "other.jsonl:1: has no text of a problem"),
        ("list.jsonl", b"[]\n", "list.jsonl:1: must be a JSON object"),
    ],
)
def test_evaluation_sets_that_are_none(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        list(read_evaluation(path))


def test_a_folder_without_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write(tmp_path / "rows.jsonl", [row("a", "b", "c")])
    with pytest.raises(SystemExit) as end:
        main(["data", "dedup", str(train), "--against", str(tmp_path)])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: has neither evaluation.jsonl nor problems.jsonl")
