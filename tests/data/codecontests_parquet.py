"""Small CodeContests files in exactly the published schema, written by the tests."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TESTS = pa.struct([("input", pa.list_(pa.string())), ("output", pa.list_(pa.string()))])
SOLUTIONS = pa.struct([("language", pa.list_(pa.int64())), ("solution", pa.list_(pa.string()))])
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("description", pa.string()),
        ("public_tests", TESTS),
        ("private_tests", TESTS),
        ("generated_tests", TESTS),
        ("source", pa.int64()),
        ("difficulty", pa.int64()),
        ("solutions", SOLUTIONS),
        ("incorrect_solutions", SOLUTIONS),
        ("cf_contest_id", pa.int64()),
        ("cf_index", pa.string()),
        ("cf_points", pa.float32()),
        ("cf_rating", pa.int32()),
        ("cf_tags", pa.list_(pa.string())),
        ("is_description_translated", pa.bool_()),
        ("untranslated_description", pa.string()),
        ("time_limit", pa.struct([("seconds", pa.int64()), ("nanos", pa.int64())])),
        ("memory_limit_bytes", pa.int64()),
        ("input_file", pa.string()),
        ("output_file", pa.string()),
    ]
)


def cases(*pairs: tuple[str, str]) -> dict[str, list[str]]:
    return {"input": [given for given, _ in pairs], "output": [wanted for _, wanted in pairs]}


def in_languages(*pairs: tuple[int, str]) -> dict[str, list[Any]]:
    return {"language": [language for language, _ in pairs], "solution": [text for _, text in pairs]}


def problem(number: int, **changes: Any) -> dict[str, Any]:
    """Adds ``number`` to what it reads; one correct and one incorrect solution in each language."""
    return {
        "name": f"{number}_A. Add",
        "description": f"Read a number and add {number} to it.\n\nInput\n\nOne number.\n",
        "public_tests": cases(("1\n", f"{1 + number}\n")),
        "private_tests": cases(("2\n", f"{2 + number}\n"), ("3\n", f"{3 + number}\n")),
        "generated_tests": cases(*((f"{n}\n", f"{n + number}\n") for n in range(10, 14))),
        "source": 2,
        "difficulty": 7 + number % 5,
        "solutions": in_languages(
            (2, f"int main() {{ int x; cin >> x; cout << x + {number}; }}"),
            (3, f"print(int(input()) + {number})\r\n"),
            (1, f"print input() + {number}"),
            (4, f"class Main {{ /* + {number} */ }}"),
        ),
        "incorrect_solutions": in_languages(
            (3, f"print(int(input()) - {number})"), (2, f"int main() {{ return {number}; }}")
        ),
        "cf_contest_id": number,
        "cf_index": "A",
        "cf_points": 500.0,
        "cf_rating": 800 + 100 * (number % 28),
        "cf_tags": ["math"],
        "is_description_translated": False,
        "untranslated_description": "",
        "time_limit": {"seconds": 2, "nanos": 500_000_000},
        "memory_limit_bytes": 256_000_000,
        "input_file": "",
        "output_file": "",
        **changes,
    }


def many(number: int, correct: int, incorrect: int) -> dict[str, Any]:
    """A problem with as many solutions in Python 3."""
    return problem(
        number,
        solutions=in_languages(*((3, f"print(int(input()) + {number})  # {n}") for n in range(correct))),
        incorrect_solutions=in_languages(*((3, f"print(int(input()) - {n})") for n in range(incorrect))),
    )


def write_parquet(
    path: Path, problems: Iterable[dict[str, Any]], *, group: int = 5, schema: pa.Schema = SCHEMA
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(problems), schema), path, row_group_size=group)
    return path


def write_shards(folder: Path, **shards: Sequence[dict[str, Any]]) -> Path:
    """Shards named as published: ``train_0`` becomes train-00000-of-00002-abc.parquet."""
    for name, problems in shards.items():
        split, _, number = name.partition("_")
        write_parquet(folder / f"{split}-0000{number or 0}-of-00002-abc.parquet", problems)
    return folder


def write_large(path: Path, problems: int, bytes_each: int, *, group: int = 100) -> Path:
    """A file of many problems, most of which is solutions that do not compress, written group by group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for start in range(0, problems, group):
            rows = []
            for number in range(start, min(start + group, problems)):
                texts = [rng.randbytes(bytes_each // 16).hex() for _ in range(8)]
                rows.append(problem(number, solutions=in_languages(*((3, text) for text in texts))))
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA), row_group_size=group)
    return path
