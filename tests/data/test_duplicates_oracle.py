"""All that `wmtp-ds data dedup` drops, step by step, against tuples of tokens that are compared one to one."""

import json
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pytest
from duplicate_rows import write

from wmtp_ds.data.duplicates import DuplicateOptions, find_duplicates

WORDS = [f"w{n}" for n in range(60)]
Text = tuple[str, str]  # the part, and what it says


def grams(tokens: Sequence[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}


def likeness(a: str, b: str, size: int) -> Fraction:
    sets = []
    for text in (a, b):
        tokens = re.findall(r"\w+|[^\w\s]", text)
        sets.append(grams(tokens, min(size, len(tokens))))
    return Fraction(len(sets[0] & sets[1]), len(sets[0] | sets[1]))


def same(part: str, text: str) -> str:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return " ".join(text.split()) if part == "problem" else "\n".join(lines)


def said(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def asks(row: dict[str, Any]) -> str:
    return f"{row['instruction']}\n{row['input']}" if "input" in row else str(row["instruction"])


class Oracle:
    """The steps, each over the rows that are left."""

    def __init__(self, rows: list[dict[str, Any]], options: DuplicateOptions) -> None:
        self.rows, self.options = rows, options
        self.left = list(range(len(rows)))

    def drop(self, rows: set[int]) -> int:
        gone = rows & set(self.left)
        self.left = [i for i in self.left if i not in gone]
        return len(gone)

    def overlaps(self, part: str, text: str, texts: list[Text], ngrams: bool) -> bool:
        o = self.options
        for of, other in texts:
            if of == part and same(part, other) == same(part, text):
                return True
            if of == part and likeness(other, text, o.shingle) >= Fraction(str(o.threshold)):
                return True
            if ngrams and len(said(other)) >= min(8, o.ngram):
                wanted = grams(said(other), min(o.ngram, len(said(other))))
                shared = len(wanted & grams(said(text), min(o.ngram, len(said(other)))))
                if shared and Fraction(shared, len(wanted)) >= Fraction(str(o.overlap)):
                    return True
        return False

    def contaminated(self, texts: list[Text]) -> int:
        parts = self.options.parts
        return self.drop(
            {
                i
                for i in self.left
                if ("problem" in parts and self.overlaps("problem", asks(self.rows[i]), texts, True))
                or ("solution" in parts and self.overlaps("solution", self.rows[i]["output"], texts, True))
            }
        )

    def on_both_sides(self, other: list[dict[str, Any]]) -> int:
        ids, texts = {row["problem_id"] for row in other}, [("problem", asks(row)) for row in other]
        near = "problem" in self.options.parts
        return self.drop(
            {
                i
                for i in self.left
                if self.rows[i]["problem_id"] in ids
                or (near and self.overlaps("problem", asks(self.rows[i]), texts, False))
            }
        )

    def problems(self) -> int:
        firsts: dict[Text, str] = {}
        for row in self.rows:
            firsts.setdefault((row["problem_id"], same("problem", asks(row))), asks(row))
        here = {i: (self.rows[i]["problem_id"], same("problem", asks(self.rows[i]))) for i in self.left}
        kept: list[tuple[str, str]] = []
        gone = set()
        for key, text in firsts.items():
            if key not in here.values():
                continue
            if any(of != key[0] and self.alike(text, other) for of, other in kept):
                gone.add(key)
            else:
                kept.append((key[0], text))
        return self.drop({i for i in self.left if here[i] in gone})

    def conflicts(self) -> int:
        labels: dict[Text, set[bool]] = {}
        keys = {i: (self.rows[i]["problem_id"], same("solution", self.rows[i]["output"])) for i in self.left}
        for i in self.left:
            labels.setdefault(keys[i], set()).add(self.rows[i]["is_correct"])
        clashing = {i for i in self.left if len(labels[keys[i]]) == 2}
        return self.drop(clashing) if self.options.conflicts == "drop" else len(clashing)

    def solutions(self) -> int:
        kept: list[dict[str, Any]] = []
        gone = set()
        for i in self.left:
            row = self.rows[i]
            alike = [one for one in kept if all(one[key] == row[key] for key in ("problem_id", "is_correct"))]
            if any(self.alike(one["output"], row["output"]) for one in alike):
                gone.add(i)
            else:
                kept.append(row)
        return self.drop(gone)

    def alike(self, a: str, b: str) -> bool:
        return likeness(a, b, self.options.shingle) >= Fraction(str(self.options.threshold))


def family(random: Random) -> list[str]:
    """Texts that differ in a few words and in white space."""
    base = random.choices(WORDS, k=random.randint(6, 40))
    found = []
    for _ in range(6):
        text = list(base)
        for _ in range(random.choice([0, 0, 1, 1, 2, 5])):
            text[random.randrange(len(text))] = random.choice(WORDS)
        found.append("".join(word + random.choice([" ", " ", "\n", "\n\n", "  ", " \n", ", "]) for word in text))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_every_step_drops_what_comparing_one_to_one_does(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    asked, given = ([text for _ in range(3) for text in family(random)] for _ in range(2))
    rows: list[dict[str, Any]] = []
    for _ in range(random.randint(2, 30)):
        row = {"problem_id": random.choice("abcdefgh"), "instruction": random.choice(asked),
               "output": random.choice(given), "is_correct": random.random() < 0.5}  # fmt: skip
        rows.append(row | ({"input": random.choice(asked)} if random.random() < 0.3 else {}))
    rows += [dict(random.choice(rows)) for _ in range(random.randrange(5))]
    near = random.choice(asked if seed % 5 == 0 else family(random))
    held = [{"problem_id": random.choice("hijk"), "instruction": near, "output": "x", "is_correct": True}]
    near = random.choice(asked if seed % 3 == 0 else family(random))
    evaluation = [
        {"prompt": family(random)[0], "canonical_solution": random.choice(given)},
        {"text": near, "code": family(random)[0]},
    ]
    options = DuplicateOptions(
        threshold=random.choice([0.3, 0.5, 0.8, 1.0]),
        shingle=random.choice([1, 2, 5]),
        ngram=random.choice([2, 5, 8, 13]),
        overlap=random.choice([0.0, 0.3, 0.7, 1.0]),
        parts=random.choice([("problem", "solution"), ("problem", "solution"), ("problem",), ("solution",)]),
        conflicts=random.choice(["keep", "drop"]),  # type: ignore[arg-type]
    )
    against = write(tmp_path / "evaluation.jsonl", evaluation)
    split = write(tmp_path / "held.jsonl", held)
    found = find_duplicates(write(tmp_path / "rows.jsonl", rows), options, against=[against], split=split)
    oracle = Oracle(rows, options)
    texts = [(part, one[key]) for one in evaluation for part, key in
             (("problem", "prompt"), ("problem", "text"), ("solution", "canonical_solution"), ("solution", "code"))
             if key in one]  # fmt: skip
    expected = {
        "contamination": oracle.contaminated(texts),
        "split": oracle.on_both_sides(held),
        "repeated_problems": oracle.problems() if "problem" in options.parts else None,
        "conflicts": oracle.conflicts(),
        "repeated_solutions": oracle.solutions() if "solution" in options.parts else None,
    }
    told = {step: found.report[step] and found.report[step]["rows"] for step in expected}
    assert told == expected
    assert found.kept.nonzero()[0].tolist() == oracle.left
    assert json.loads(json.dumps(found.dropped())) == found.dropped()
    assert [one["line"] - 1 for one in found.dropped()] == sorted(set(range(len(rows))) - set(oracle.left))
