"""Kills a run again and again, goes on with ``--resume auto``, and compares the end with a run that was left in peace.

    python tests/soak/kill_soak.py --kills 20 --stage verifiable

prints its figures as JSON. Ranks and the launcher are killed with SIGKILL: between steps, while the run starts, and at
an operation on files in a save. Every moment is drawn from ``--seed``; what the machine's speed makes of it is not.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from safetensors.torch import load_file

from wmtp_ds.checkpoint_files import MANIFEST, complete_checkpoints, leftovers, read_manifest, verify_manifest
from wmtp_ds.launch import launch_environment, ranks_command

HERE = Path(__file__).resolve().parent
RANKS = 2
# A run that hangs is a failure, not a reason to wait.
PATIENCE = 600
SAVE_EVERY = 3
KINDS = ("rank", "launcher", "while saving", "while starting")


class Process(Protocol):
    """Of `subprocess.Popen` what is asked for here."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float) -> int: ...


@dataclass
class Figures:
    """What a soak has seen."""

    stage: str
    steps: int
    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    saves_cut_short: int = 0
    steps_lost: list[int] = field(default_factory=list)
    files_checked: int = 0
    files_lost: int = 0
    seconds: float = 0.0
    equal: bool = False

    def report(self) -> dict[str, Any]:
        """For JSON and the docs."""
        return {
            "stage": self.stage,
            "ranks": RANKS,
            "steps": self.steps,
            "seed": self.seed,
            "kills": sum(self.kills.values()),
            "kills_by_kind": dict(self.kills),
            "saves_cut_short": self.saves_cut_short,
            "steps_between_checkpoints": SAVE_EVERY,
            "steps_lost": sum(self.steps_lost),
            "most_steps_lost_by_a_kill": max(self.steps_lost, default=0),
            "files_checked": self.files_checked,
            "files_lost": self.files_lost,
            "equal_to_the_bit": self.equal,
            "seconds": round(self.seconds),
        }


class Soak:
    """One run in a workspace with the micro models and sample data.

    Args:
        root: the workspace.
        stage: to train.
        steps: of the whole run.
        seed: of the moments.
        overrides: of the config.
    """

    def __init__(self, root: Path, stage: str, steps: int, seed: int, overrides: tuple[str, ...] = ()):
        self.root, self.random, self.overrides = root, random.Random(seed), overrides
        self.figures = Figures(stage, steps, seed)

    def folder(self, name: str) -> Path:
        return self.root / "checkpoints" / f"soak-{self.figures.stage}-{name}"

    def start(self, name: str, doom: dict[str, int] | None = None) -> tuple[Process, Path]:
        """Start the launcher; its process, and the file of what it says."""
        values = [
            f'checkpoint.save_dir="{self.folder(name)}"',
            f"training.max_steps={self.figures.steps}",
            "data_sampling.n_samples=24",  # 6 steps an epoch: a checkpoint twice in each
            f"training.n_epochs={self.figures.steps}.0",
            f"checkpoint.save_checkpoint_every={SAVE_EVERY / 6}",
            "checkpoint.save_total_limit=2",
            "checkpoint.save_best=false",
            "training.batch_size=2",
            "training.gradient_accumulation_steps=1",
            "training.log_interval=1",
            "training.eval_interval=10",
            'mlflow.tracking_uri=""',
            *self.overrides,
        ]
        stage = self.figures.stage
        arguments = ["--stage", stage, "--config", f"stage_configs/local/{stage}.toml", "--resume", "auto"]
        arguments += [part for value in values for part in ("--override", value)]
        command = ranks_command(list(range(RANKS)), "doomed_rank", arguments)
        environment = launch_environment("cpu", os.environ) | {"DOOM": json.dumps(doom or {})}
        path = [str(HERE), str(HERE.parent), *sys.path]
        environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
        log = self.root / f"soak-{time.monotonic_ns()}.log"
        return self.spawn(command, environment, log), log

    def spawn(self, command: list[str], environment: dict[str, str], log: Path) -> Process:
        """Start a command in a session of its own, which writes into ``log``."""
        with log.open("wb") as stream:
            return subprocess.Popen(
                command, cwd=self.root, env=environment, stdout=stream, stderr=stream, start_new_session=True
            )

    def finish(self, name: str) -> str:
        """Train to the end; what was said."""
        process, log = self.start(name)
        code = process.wait(PATIENCE)
        text = log.read_text()
        assert code == 0, text
        return text

    def steps_logged(self) -> int:
        """The last step that the run has taken, as far as anyone can know."""
        try:
            lines = (self.folder("killed") / "metrics.jsonl").read_text().splitlines()
            return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
        except OSError:
            return 0

    def kill_once(self, kind: str, doom: dict[str, int] | None = None) -> None:
        """Start or go on, strike, and see that the checkpoints are whole and no process is left."""
        folder, figures = self.folder("killed"), self.figures
        began = self.steps_logged()
        before = self.contents(folder)
        if kind == "while saving" and doom is None:
            # One of the first saves of this process; about so many operations has each.
            doom = {"rank": self.random.randrange(RANKS), "save": self.random.randint(1, 2)}
            doom["moment"] = self.random.randrange(40 if doom["rank"] == 0 else 12)
        process, log = self.start("killed", doom)
        ranks = self.ranks(process)
        if kind == "while starting":
            time.sleep(self.random.uniform(0, 8))
            self.strike(process, self.random.choice([process.pid, *ranks]))
        elif kind != "while saving":
            self.wait_for_step(process, began + self.random.randint(1, 6), log)
            time.sleep(self.random.uniform(0, 0.3))
            self.strike(process, process.pid if kind == "launcher" else self.random.choice(ranks))
        code = process.wait(PATIENCE)
        self.see_off(ranks, log)
        assert code != 0 or self.is_done(), f"{kind}: it went on to the end; {log.read_text()}"
        if self.is_done():
            return
        figures.kills[kind] += 1
        figures.saves_cut_short += any(path.name.startswith(".partial-step_") for path in leftovers(folder))
        self.look(folder, before)

    def strike(self, process: Process, victim: int) -> None:
        if process.poll() is None:
            os.kill(victim, signal.SIGKILL)

    def look(self, folder: Path, before: dict[str, str]) -> None:
        """Count what is lost."""
        figures = self.figures
        sound = [path for path in complete_checkpoints(folder) if verify_manifest(path) is None]
        figures.files_lost += sum(
            len(read_manifest(path)["files"]) for path in complete_checkpoints(folder) if path not in sound
        )
        figures.files_checked += sum(len(read_manifest(path)["files"]) for path in sound)
        now = self.contents(folder)
        # Those that were there are there as they were, unless newer ones have taken their place.
        gone = [name for name in before if name not in now]
        assert len(gone) <= len([name for name in now if name not in before]), (before, now)
        figures.files_lost += sum(now[name] != text for name, text in before.items() if name in now)
        newest = int(sound[-1].name[-8:]) if sound else 0
        figures.steps_lost.append(max(0, self.steps_logged() - newest))

    def contents(self, folder: Path) -> dict[str, str]:
        """Complete checkpoints, and what their manifests say."""
        return {path.name: (path / MANIFEST).read_text() for path in complete_checkpoints(folder)}

    def ranks(self, process: Process) -> list[int]:
        """Process ids of the ranks, once they are there."""
        launcher, deadline = psutil.Process(process.pid), time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            children = [child.pid for child in launcher.children()]
            if len(children) >= RANKS:
                return children
            time.sleep(0.05)
        raise AssertionError("the launcher has started no ranks")

    def wait_for_step(self, process: Process, step: int, log: Path) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.steps_logged() < step and process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)

    def see_off(self, ranks: list[int], log: Path) -> None:
        """No rank may be left; one that has saved at the launcher's end takes a moment."""
        deadline = time.monotonic() + 60
        while any(psutil.pid_exists(pid) for pid in ranks):
            assert time.monotonic() < deadline, f"a rank is left behind: {log.read_text()}"
            time.sleep(0.05)

    def is_done(self) -> bool:
        return (self.folder("killed") / "checkpoint_final").exists()

    def compare(self) -> None:
        """The ends of both runs, to the bit; raises AssertionError where they differ."""
        peaceful, killed = self.folder("peaceful"), self.folder("killed")
        assert metrics(killed) == metrics(peaceful)
        assert sorted(metrics(peaceful)) == list(range(1, self.figures.steps + 1))
        for file in sorted((peaceful / "checkpoint_final").glob("*.safetensors")):
            expected, found = load_file(file), load_file(killed / "checkpoint_final" / file.name)
            same(found, expected, file.name)
        last = complete_checkpoints(peaceful)[-1]
        shards = sorted(last.glob("*_states.pt"))
        assert len(shards) == 2 * RANKS
        for file in shards:  # weights, optimizer, schedule, random numbers of each rank
            same(plain(killed / last.name / file.name), plain(file), file.name)
        self.figures.equal = True


def plain(file: Path) -> Any:
    """What a shard holds, without what depends on the clock, on where it lies, and on what memory held before."""
    shard = torch.load(file, weights_only=False)
    shard.pop("ds_config", None)
    progress = shard.get("wmtp", {}).get("progress", {})
    for name in ("seconds", "waited"):
        progress.pop(name, None)
    if file.name.endswith("_optim_states.pt"):
        clear_padding(shard["optimizer_state_dict"]["fp32_flat_groups"], file)
    return shard


def clear_padding(flat: list[torch.Tensor], file: Path) -> None:
    """A parameter that the ranks cannot share evenly ends with places of no parameter, which nobody ever sets."""
    model = torch.load(file.with_name(file.name.replace("_optim_", "_model_")), weights_only=False)
    rank, ranks = int(re.search(r"rank_(\d+)_mp", file.name)[1]), model["dp_world_size"]
    for group, shapes in zip(flat, model["param_shapes"], strict=True):
        offset = 0
        for shape in shapes.values():
            share = -(-shape.numel() // ranks)
            group.data[offset + max(0, min(share, shape.numel() - rank * share)) : offset + share] = 0
            offset += share


def same(found: Any, expected: Any, where: str) -> None:
    """Equal to the bit, however nested."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            same(found[number], value, f"{where}[{number}]")
    elif not callable(expected) and type(expected).__module__ == "builtins":
        assert found == expected or (found != found and expected != expected), where


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    """Everything logged at each step but what depends on the clock. A step that was taken twice must be the same."""
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        values = {name: value for name, value in record["metrics"].items() if not name.startswith("perf/")}
        known = found.setdefault(record["step"], {})
        assert all(known.get(name, value) == value for name, value in values.items()), record["step"]
        known.update(values)
    return found


def make_critic(root: Path) -> Path:
    """A critic with random weights for the workspace's policy."""
    from wmtp_ds.handoff import save_value_head
    from wmtp_ds.models.fingerprint import read_trunk_fingerprint
    from wmtp_ds.models.value_head import ValueHead

    torch.manual_seed(7)
    head = ValueHead(64, "mlp")
    torch.nn.init.normal_(head.output.weight, std=0.5)
    file = root / "soak-critic" / "value_head.safetensors"
    file.parent.mkdir(exist_ok=True)
    fingerprint = str(read_trunk_fingerprint(root / "storage/models/micro-policy"))
    save_value_head(
        file, head.state_dict(), hidden_size=64, type="mlp", activation="sigmoid", trunk_fingerprint=fingerprint
    )
    return file


def soak(root: Path, stage: str, kills: int, seed: int, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """So many kills of every kind in turn; the figures.

    Raises:
        AssertionError: if a checkpoint or a process is lost, or the end differs.
    """
    began = time.monotonic()
    # No kill comes later than six steps after the start, and then the steps until it has come.
    if stage == "verifiable":
        overrides = (*overrides, f'experiment.critic_checkpoint="{make_critic(root)}"')
    run = Soak(root, stage, 9 * kills + 12, seed, overrides)
    run.finish("peaceful")
    kinds = [KINDS[number % len(KINDS)] for number in range(kills)]
    run.random.shuffle(kinds)
    for kind in kinds:
        run.kill_once(kind)
        print(json.dumps(run.figures.report()), file=sys.stderr, flush=True)
    run.finish("killed")
    run.compare()
    assert sum(run.figures.kills.values()) == kills, "it came to its end before the last kill"
    run.figures.seconds = time.monotonic() - began
    return run.figures.report()


def main() -> None:
    """Soak in a workspace of its own."""
    sys.path[:0] = [str(HERE.parent / "launch"), str(HERE.parent)]
    from conftest import make_workspace

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stage", default="verifiable")
    parser.add_argument("--seed", type=int, default=0)
    typed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = make_workspace(Path(folder))
        print(json.dumps(soak(root, typed.stage, typed.kills, typed.seed), indent=1))


if __name__ == "__main__":
    main()
