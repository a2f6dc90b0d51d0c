"""Turns one problem of CodeContests into a problem and rows of ours.

The language and difficulty numbers are those of the published schema (Li et al. 2022, "Competition-Level Code
Generation with AlphaCode").
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import pyarrow as pa

LANGUAGES = {"python2": 1, "cpp": 2, "python3": 3, "java": 4}
# What problems and rows call a language, where not as above.
_CALLED = {"python3": "python"}
SITES = ("unknown", "codechef", "codeforces", "hackerearth", "codejam", "atcoder", "aizu")
MAX_DIFFICULTY = 11
# Of a problem's tests, as JSON: a line of problems.jsonl must stay readable.
MAX_TEST_BYTES = 16 << 20

_Item = TypeVar("_Item")
_LOWEST_RATING, _RATING_STEP = 800, 250


@dataclass(frozen=True)
class Options:
    """What of CodeContests is imported. The caps are on each problem's solutions and tests."""

    language: str = "python3"
    difficulty: str = "enum"
    max_correct: int = 20
    max_incorrect: int = 20
    min_tests: int = 1
    max_tests: int = 100
    seed: int = 0


@dataclass
class Converted:
    """A line of problems.jsonl and the problem's rows, or why it is skipped; and what of it was dropped."""

    problem: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: str = ""
    dropped: Counter[str] = field(default_factory=Counter)


def difficulty_of_enum(number: int | None) -> int:
    """1 to 5 and 7 to 11 as they are, above that 11; 0 where it is unknown (0) or external (6)."""
    if number is None or number <= 0 or number == 6:
        return 0
    return min(number, MAX_DIFFICULTY)


def difficulty_of_rating(rating: int | None) -> int:
    """Codeforces' rating in eleven steps of 250: up to 1049 is 1, 1050 to 1299 is 2, from 3300 on 11; 0 unknown."""
    if rating is None or rating <= 0:
        return 0
    return max(1, min(MAX_DIFFICULTY, 1 + (rating - _LOWEST_RATING) // _RATING_STEP))


def problem_id(problem: "pa.StructScalar") -> str:
    """The id: site and name, as names may be the same on different sites; "" without a name."""
    name = " ".join((problem["name"].as_py() or "").split())
    return f"{_site(problem)}/{name}" if name else ""


def convert(problem: "pa.StructScalar", options: Options) -> Converted:
    """Convert a problem, whose texts are UTF-8.

    Args:
        problem: a row of the Parquet file.
        options: language, difficulty, caps.

    Raises:
        UnicodeDecodeError: a text is not UTF-8.
    """
    converted = Converted()
    own_id = problem_id(problem)
    description = (problem["description"].as_py() or "").replace("\r\n", "\n").strip()
    converted.skipped = _why_not(problem, own_id, description)
    if converted.skipped:
        return converted
    cases = _cases(problem, options, own_id, converted)
    if cases is None:
        return converted
    solutions = _solutions(problem, options, own_id, converted)
    if solutions is None:
        return converted
    rated = options.difficulty == "rating"
    number = problem["cf_rating" if rated else "difficulty"].as_py()
    difficulty = (difficulty_of_rating if rated else difficulty_of_enum)(number)
    language = _CALLED.get(options.language, options.language)
    told = {"difficulty": difficulty} if difficulty else {}
    converted.problem = {
        "problem_id": own_id,
        "instruction": description,
        **told,
        "tests": {"kind": "stdio", "cases": cases},
        **_limits(problem),
        "language": language,
        "evaluation_only": False,
        "source": "codecontests",
    }
    metadata = {"source": "codecontests", "language": language}
    converted.rows = [
        {
            "problem_id": own_id,
            "instruction": description,
            "output": text,
            "is_correct": is_correct,
            **told,
            "metadata": {**metadata, "source_label": is_correct},
        }
        for text, is_correct in solutions
    ]
    return converted


def _site(problem: "pa.StructScalar") -> str:
    number = problem["source"].as_py()
    return SITES[number] if number is not None and 0 <= number < len(SITES) else SITES[0]


def _why_not(problem: "pa.StructScalar", own_id: str, description: str) -> str:
    if not own_id:
        return "problems_without_name"
    if not description:
        return "problems_without_description"
    if any((problem[name].as_py() or "").strip() for name in ("input_file", "output_file")):
        return "problems_with_file_input"
    return ""


def _cases(
    problem: "pa.StructScalar", options: Options, own_id: str, converted: Converted
) -> list[tuple[str, str]] | None:
    """Pairs of input and output: public tests first, then private, then generated ones."""
    known: set[tuple[str, str]] = set()
    chosen: list[tuple[str, str]] = []
    for name in ("public_tests", "private_tests", "generated_tests"):
        tests = problem[name].as_py() or {}
        inputs, outputs = tests.get("input") or [], tests.get("output") or []
        if len(inputs) != len(outputs) or None in inputs or None in outputs:
            converted.skipped = "problems_malformed"
            return None
        found = [pair for pair in dict.fromkeys(zip(inputs, outputs, strict=True)) if pair not in known]
        known.update(found)
        room = options.max_tests - len(chosen)
        chosen += sample_in_order(found, room, f"{options.seed}-{own_id}-{name}")
    if not known:
        converted.skipped = "problems_without_tests"
        return None
    fitting = _fit(chosen)
    if len(fitting) < options.min_tests:
        converted.skipped = "problems_with_too_few_tests"
        return None
    converted.dropped["tests_over_the_cap"] += len(known) - len(chosen)
    converted.dropped["tests_too_large"] += len(chosen) - len(fitting)
    return fitting


def _fit(cases: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those cases that fit into ``MAX_TEST_BYTES`` together, the first ones first."""
    fitting, left = [], MAX_TEST_BYTES
    for case in cases:
        size = len(json.dumps(case))
        if size <= left:
            left -= size
            fitting.append(case)
    return fitting


def _solutions(
    problem: "pa.StructScalar", options: Options, own_id: str, converted: Converted
) -> list[tuple[str, bool]] | None:
    """The solutions with the source's label, correct ones first, none twice."""
    found: dict[bool, dict[str, str]] = {}
    for is_correct, name in ((True, "solutions"), (False, "incorrect_solutions")):
        texts = _texts_in(problem[name], LANGUAGES[options.language])
        if texts is None:
            converted.skipped = "problems_malformed"
            return None
        kept = [text for text in map(tidy, texts) if text]
        unique: dict[str, str] = {}
        for text in kept:
            unique.setdefault(without_line_ends(text), text)
        found[is_correct] = unique
        converted.dropped["solutions_empty"] += len(texts) - len(kept)
        converted.dropped["solutions_repeated"] += len(kept) - len(unique)
    both = found[True].keys() & found[False].keys()
    converted.dropped["solutions_labelled_both_ways"] += 2 * len(both)
    chosen = []
    for is_correct, cap in ((True, options.max_correct), (False, options.max_incorrect)):
        texts = [text for key, text in found[is_correct].items() if key not in both]
        kept = sample_in_order(texts, cap, f"{options.seed}-{own_id}-{is_correct}")
        converted.dropped["solutions_over_the_cap"] += len(texts) - len(kept)
        chosen += [(text, is_correct) for text in kept]
    if not chosen:
        converted.skipped = "problems_without_solutions"
        return None
    return chosen


def _texts_in(solutions: "pa.StructScalar", language: int) -> list[str] | None:
    """The solutions in a language; None where the lists do not fit each other. Only these become Python texts."""
    import pyarrow.compute as pc

    if not solutions.is_valid:
        return []
    languages, texts = solutions["language"].values, solutions["solution"].values
    if languages is None and texts is None:
        return []
    if languages is None or texts is None or len(languages) != len(texts):
        return None
    return [text or "" for text in texts.filter(pc.equal(languages, language)).to_pylist()]


def tidy(text: str) -> str:
    """A solution as it is written: line ends are newlines, and nothing follows the last character."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").rstrip()


def without_line_ends(text: str) -> str:
    """What two solutions are compared by: the text without white space at the ends of lines."""
    return "\n".join(line.rstrip() for line in text.split("\n"))


def sample_in_order(items: Sequence[_Item], most: int, key: str) -> list[_Item]:
    """At most ``most`` of the items, drawn by the key, in their own order."""
    if len(items) <= most:
        return list(items)
    places = Random(key).sample(range(len(items)), max(0, most))
    return [items[place] for place in sorted(places)]


def _limits(problem: "pa.StructScalar") -> dict[str, dict[str, float]]:
    """The limits that the source gives: seconds, and millions of bytes, rounded up."""
    limits: dict[str, float] = {}
    time = problem["time_limit"].as_py() or {}
    seconds = (time.get("seconds") or 0) + (time.get("nanos") or 0) / 1e9
    if seconds > 0:
        limits["seconds"] = seconds
    memory = problem["memory_limit_bytes"].as_py() or 0
    if memory > 0:
        limits["memory_mb"] = math.ceil(memory / 1e6)
    return {"limits": limits} if limits else {}
