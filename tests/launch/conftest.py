"""Workspaces with small data and models, and commands."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def environment() -> dict[str, str]:
    """A user's environment in the virtual environment that runs the tests, without what pytest or CI add."""
    ours = ("WMTP_", "MLFLOW_", "PYTEST_", "TRITON_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}


def run(command: list[str], cwd: Path, timeout: float = 900, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, with its output as text."""
    full = environment() | variables
    return subprocess.run(command, cwd=cwd, env=full, capture_output=True, text=True, timeout=timeout)


def write_rows(file: Path, count: int, seed: int) -> None:
    """Rows of several lengths, prompts and difficulties; every other one incorrect."""
    rng = random.Random(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        for number in range(count):
            step, correct = rng.randint(1, 99), number % 2 == 0
            body = "".join(f"    x = x {'+' if correct else '-'} {step + i}\n" for i in range(rng.randint(1, 4)))
            row = {
                "problem_id": f"p{seed}-{number // 2}",
                "instruction": f"Add {step} and what follows to x, {rng.randint(1, 4)} times",
                "output": f"def f(x):\n{body}    return x\n",
                "is_correct": correct,
                "difficulty": 1 + number % 11,
            }
            stream.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout with the micro models and small data in it."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def make_workspace(root: Path) -> Path:
    """Fill an empty folder as `workspace` says."""
    for name in ("stage_configs", "ds_configs", "bin"):
        (root / name).symlink_to(REPOSITORY / name)
    write_rows(root / "storage/data/sample/train.jsonl", 96, seed=0)
    write_rows(root / "storage/data/sample/validation.jsonl", 10, seed=1)
    from preloaded import run_preloaded

    made = run_preloaded(["wmtp-ds", "model", "micro", "--hidden-size", "64"], root)
    assert made.returncode == 0, made.stderr
    return root
