"""Rows that differ in length, and what is scored of them, in a small checkout."""

import json
import random
from dataclasses import replace
from pathlib import Path

from wmtp_ds.scores.manifest import Settings
from wmtp_ds.scores.worker import Work

ROWS, MAX_LENGTH, SHARD_TOKENS = 30, 320, 150
TRAIN = Path("storage/data/sample/train.jsonl")
REFERENCE = Path("storage/models/micro-reference")
TOO_LONG, LONG_PROMPT = 7, 4  # rows


def write_rows(file: Path, count: int = ROWS, seed: int = 0) -> None:
    """Rows of several lengths; one prompt is longer than a sequence may be, and one solution."""
    rng = random.Random(seed)
    with file.open("w") as stream:
        for number in range(count):
            body = "".join(
                f"    x = x + {rng.randint(1, 99)}\n" for _ in range(40 if number == TOO_LONG else rng.randint(1, 4))
            )
            row = {
                "problem_id": f"p{number // 2}",
                "instruction": f"Add {number}{' '.join(map(str, range(300 * (number == LONG_PROMPT))))}.",
                "output": f"def f(x):\n{body}    return x\n",
                "is_correct": number % 3 > 0,
            }
            stream.write(json.dumps(row) + "\n")


def work(output: str = "scores", **changes: object) -> Work:
    """What is scored, in a checkout that is the current directory; settings and other fields by name."""
    settings = Settings(
        template="alpaca",
        max_length=MAX_LENGTH,
        compute_dtype="float32",
        dtype="float32",
        correct_only=False,
        shard_tokens=SHARD_TOKENS,
    )
    known = {name: changes.pop(name) for name in list(changes) if name in Settings.model_fields}
    plain = Work(
        (TRAIN,),
        Path(output),
        REFERENCE,
        REFERENCE,
        settings.model_copy(update=known),
        batch_size=4,
        device="cpu",
        cache_dir=None,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]
