"""Data files with duplicates planted in them."""

import json
from pathlib import Path
from random import Random
from typing import Any

WORDS = [f"word{n}" for n in range(400)]


def row(problem: str, output: str, correct: bool = True, text: str = "") -> dict[str, Any]:
    return {"problem_id": problem, "instruction": text or f"{problem} asks for it", "output": output,
            "is_correct": correct}  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def long_text(seed: int) -> str:
    return " ".join(Random(seed).choices(WORDS, k=60))


def planted(path: Path) -> Path:
    """Eleven rows, of which 3, 4, 5 (lines) repeat solutions, 10 and 11 a problem, and 7 and 8 disagree."""
    a, b = long_text(1), long_text(2)
    return write(
        path,
        [
            row("p", a),
            row("p", b, False),
            row("p", a + "  \n\n"),  # exactly, but for white space
            row("p", a + " x"),  # nearly
            row("p", b + " x", False),
            row("q", a),  # another problem's
            row("q", b),
            row("q", b, False),  # a conflict
            row("r", long_text(3), text=long_text(9)),
            row("s", long_text(4), text=long_text(9) + " "),  # the problem again
            row("s", long_text(5), text=long_text(9) + " "),
        ],
    )
