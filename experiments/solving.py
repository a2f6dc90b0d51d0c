"""pass@1 of a trained model, by ``wmtp-ds evaluate``."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_OPTIONS = ("--max-new-tokens", "192", "--batch-size", "64", "--force", "--json")


def solve(model: Path, problems: Path, template: str) -> dict[str, Any]:
    """Greedy solutions of problems, run against their tests; the figures of the summary. Done once."""
    output = model.parent / f"solved-{problems.stem}"
    command = [str(Path(sys.executable).with_name("wmtp-ds")), "evaluate", str(model), "--problems", str(problems)]
    command += ["--prompt", template, "--output", str(output), *_OPTIONS]
    # Several run at a time.
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout)["figures"]
    return figures


def solve_all(models: Sequence[Path], problems: Path, template: str) -> list[dict[str, Any]]:
    """The same of several models, as many at a time as there are cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda model: solve(model, problems, template), models))
