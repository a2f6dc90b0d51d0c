"""Every command of the README, as written and in its order, in a copy of the repository.

Some are given options that make them short: nobody reads these figures, and the demo has trained each stage for long.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, environment

pytestmark = pytest.mark.launch

SHORTER = {
    "wmtp-ds bench kernels": "--quick --no-sweep --rounds 1",
    "wmtp-ds bench step --stage rho1": "--sequence-length 64 --batch-size 1 --steps 1 --warmup 2",
    "wmtp-ds train --stage verifiable": "--override training.max_steps=6",
    "deepspeed bin/train_stage.py --stage rho1 --num_gpus 4 --config": "--override training.max_steps=6",
}
STAGES = ("baseline", "critic", "verifiable", "rho1")


def readme_commands() -> list[str]:
    """The lines of the README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a clone would have it, with this virtual environment as its installed .venv."""
    root = tmp_path_factory.mktemp("clone") / "wmtp-ds"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "storage", "checkpoints", "mlruns", "mlflow.db*", ".*_cache", "*.pyc"
    )
    shutil.copytree(REPOSITORY, root, ignore=ignored)
    (root / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".installed":
            (root / ".venv" / entry.name).symlink_to(entry)
    (root / ".venv/.installed").touch()
    return root


def type_in(root: Path, command: str) -> subprocess.CompletedProcess[str]:
    """A line typed into a user's shell, whose environment is activated as the README says."""
    kept = {name: value for name, value in environment().items() if name not in ("VIRTUAL_ENV", "MAKEFLAGS", "VENV")}
    path = os.pathsep.join(p for p in kept["PATH"].split(os.pathsep) if p != str(Path(sys.executable).parent))
    line = f"source .venv/bin/activate; PATH=$PWD/.venv/bin:$PATH; {command}"
    line = command if command.startswith("make") else line
    return subprocess.run(
        ["bash", "-c", line], cwd=root, env=kept | {"PATH": path}, capture_output=True, text=True, timeout=580
    )


def shortened(command: str) -> str:
    """With the options of :data:`SHORTER`."""
    words = command.partition("#")[0].strip()
    return " ".join([words, *(more for begin, more in SHORTER.items() if words.startswith(begin))])


@pytest.fixture(scope="module")
def typed(checkout: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """What came of each command, in order."""
    return {command: type_in(checkout, shortened(command)) for command in readme_commands()}


def test_the_commands_that_the_project_promises_are_there() -> None:
    commands = readme_commands()
    assert commands[0] == "make demo"
    assert "wmtp-ds validate stage_configs/critic.toml" in commands
    assert "deepspeed bin/train_stage.py --stage rho1 --num_gpus 4" in commands
    assert sum(shortened(command) != command for command in commands) == len(SHORTER)


@pytest.mark.parametrize("command", readme_commands())
def test_a_command_of_the_readme(
    typed: dict[str, subprocess.CompletedProcess[str]], checkout: Path, command: str
) -> None:
    done = typed[command]
    said = done.stdout + done.stderr
    # The 7B models are on nobody's disk: these two must say so.
    missing = command.endswith(("validate stage_configs/critic.toml", "--stage rho1 --num_gpus 4"))
    assert done.returncode == (2 if missing else 0), said
    assert "Traceback" not in said
    if missing:
        assert said.count("storage/models/meta-llama-mtp does not exist") == 1
        stage = "rho1" if "rho1" in command else "critic"
        assert f"wmtp-ds model micro, then --config stage_configs/local/{stage}.toml" in said
        assert ("storage/models/ref-sheared-llama-2.7b does not exist" in said) is (stage == "rho1")
        assert not (checkout / f"checkpoints/{stage}-7b").exists()


def test_the_demo_trains_four_stages(typed: dict[str, subprocess.CompletedProcess[str]], checkout: Path) -> None:
    table = typed["make demo"].stdout
    runs = {}
    for stage in STAGES:
        # From make demo, or moved aside by the command that trained the stage again after that.
        folder = checkout / "checkpoints" / f"local-{stage}"
        first = folder.with_name(f"{folder.name}.1")
        run = json.loads(((first if first.exists() else folder) / "run.json").read_text())
        runs[stage] = run
        row = next(line for line in table.splitlines() if line.startswith(f"│ {stage} "))
        assert run["mlflow_run_id"] in row
        assert f"{run['val/loss']:.4f}" in row
        assert run["world_size"] == 2
    for stage in ("baseline", "verifiable", "rho1"):
        assert runs[stage]["last_loss"] < runs[stage]["first_loss"] - 0.5
    # The critic came from its run's artifact.
    critic = f"runs:/{runs['critic']['mlflow_run_id']}/checkpoints/checkpoint_best"
    assert json.loads(runs["verifiable"]["pipeline"])["critic"] == critic
    assert (checkout / "checkpoints/demo.png").read_bytes().startswith(b"\x89PNG")
    assert "deepspeed bin/train_stage.py" in table


def test_the_four_rank_run(typed: dict[str, subprocess.CompletedProcess[str]], checkout: Path) -> None:
    run = json.loads((checkout / "checkpoints/local-rho1/run.json").read_text())
    assert run["world_size"] == 4
    assert run["completed"]


def test_the_pipeline_trains_nothing_again(typed: dict[str, subprocess.CompletedProcess[str]], checkout: Path) -> None:
    [command] = [c for c in typed if c.startswith("wmtp-ds pipeline")]
    for stage in ("critic", "verifiable"):
        said = f"{stage}: checkpoints/local-{stage} is complete and its config has not changed; not trained again"
        assert said in typed[command].stderr
    began = time.monotonic()
    again = type_in(checkout, "wmtp-ds data sample")
    assert again.returncode == 0
    assert time.monotonic() - began < 10
