"""What tracking costs a step: one training process, and in turn no tracking, a good server, a slow one, a dead one.

    python tests/soak/tracking_soak.py --rounds 6 --seconds 40

prints its figures as JSON. Each round trains a block of steps in each condition, in an order drawn from ``--seed``, and
a condition's time per step is compared with that of the same round's block without tracking: what else the machine
does meanwhile meets all alike. The servers are in another process than the training.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
DELAY = 5.0  # seconds for each answer of the slow server
# The second "off" is compared with the first: what it differs by is the machine's noise.
CONDITIONS = ("off", "off again", "good", "slow", "dead")


def soak(workspace: Path, *, rounds: int, seconds: float, seed: int) -> dict[str, Any]:
    """Measure; the figures by condition.

    Args:
        workspace: a folder like a checkout, with the micro models and small data.
        rounds: how often each condition is measured.
        seconds: of each block.
        seed: of the order.
    """
    from mlflow_server import PASSWORD, USER, FaultyProxy, MlflowServer

    from wmtp_ds.launch import launch_environment
    from wmtp_ds.meeting import free_port

    place = tempfile.TemporaryDirectory(prefix="tracking-soak-")
    folder = Path(place.name)
    server = MlflowServer(folder)
    proxies: list[FaultyProxy] = []
    try:
        server.start()
        server.add_user(USER, PASSWORD)
        for delay in (0.0, DELAY):
            proxies.append(FaultyProxy(server.uri))
            proxies[-1].delay = delay
        uris = {
            "off": "",
            "off again": "",
            "good": proxies[0].uri,
            "slow": proxies[1].uri,
            "dead": "http://127.0.0.1:9",
        }
        order = random.Random(seed)
        # The first block, which is not counted, imports MLflow and warms up.
        blocks = ["good"] + [kind for _ in range(rounds) for kind in order.sample(CONDITIONS, len(CONDITIONS))]
        plan = {"root": str(folder / "runs"), "seconds": seconds, "blocks": [(kind, uris[kind]) for kind in blocks]}
        environment = launch_environment("cpu", os.environ) | {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        }
        command = [sys.executable, str(HERE / "tracking_soak.py"), "--measure", json.dumps(plan)]
        done = subprocess.run(command, cwd=workspace, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        for proxy in proxies:
            proxy.close()
        server.kill()
        place.cleanup()
    measured = json.loads(done.stdout.splitlines()[-1])[1:]
    return figures([measured[start : start + len(CONDITIONS)] for start in range(0, len(measured), len(CONDITIONS))])


def figures(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """By condition: how much slower the median step was than without tracking, and what bounds it from above."""
    found: dict[str, Any] = {}
    for kind in CONDITIONS:
        blocks = [block for of_round in rounds for block in of_round if block["kind"] == kind]
        ratios = [
            next(b["median"] for b in of_round if b["kind"] == kind)
            / next(b["median"] for b in of_round if b["kind"] == "off")
            for of_round in rounds
        ]
        wall = sum(block["wall"] for block in blocks)
        found[kind] = {
            "steps": sum(block["steps"] for block in blocks),
            "step_ms": 1000 * statistics.median(block["median"] for block in blocks),
            "slower": statistics.median(ratios) - 1,
            "slower_by_round": [round(ratio - 1, 4) for ratio in ratios],
            "typically_off_by": statistics.median(abs(ratio - 1) for ratio in ratios),
            # Of the loop's time: in the tracker's calls, and taken from it by the tracker's thread at the very most.
            "in_calls": sum(block["in_calls"] for block in blocks) / wall,
            "thread": sum(block["thread"] for block in blocks) / wall,
        }
    return found


def measure(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """What the training process does: block after block."""
    import torch

    from wmtp_ds import engine, tracking
    from wmtp_ds.config.schema import MlflowConfig
    from wmtp_ds.launch import Place, Request
    from wmtp_ds.rank import quiet
    from wmtp_ds.run_data import open_data
    from wmtp_ds.run_folder import RunFolder
    from wmtp_ds.train import Training

    quiet("error", Place(0, 0, 1, 1))
    torch.set_num_threads(1)
    root = Path(plan["root"])
    overrides = [
        f'checkpoint.save_dir="{root}/training"',
        "training.max_steps=1000000",
        "training.n_epochs=1000000.0",
        "training.scheduler=constant",
        'mlflow.tracking_uri=""',
    ]
    resolved = Request("baseline", config=Path("stage_configs/local/baseline.toml"), override=tuple(overrides)).load()
    data = open_data(resolved, 1)
    device = engine.start("cpu")
    training: Any = Training(resolved, data, RunFolder(root / "training", "never"), device, None)
    training.display = SimpleNamespace(step=lambda *_: None, say=lambda *_: None, close=lambda: None)
    training.config = resolved.config.model_copy(
        update={"training": resolved.config.training.model_copy(update={"log_interval": 1})}
    )
    windows = training._windows()
    found = []
    for number, (kind, uri) in enumerate(plan["blocks"]):
        table = MlflowConfig(tracking_uri=uri, experiment="soak")
        tracker = tracking.start_tracking(
            table, run_name=f"{number}", run_dir=root / f"{number}", tags={}, params=resolved.flat()
        )
        log, spent = tracker.log, [0.0]

        def timed(step: int, metrics: dict[str, float], log: Any = log, spent: list[float] = spent) -> None:
            began = time.perf_counter()
            log(step, metrics)
            spent[0] += time.perf_counter() - began

        tracker.log = timed  # type: ignore[method-assign]
        training.tracker = tracker
        times, began = [], time.perf_counter()
        while time.perf_counter() - began < plan["seconds"]:
            window, waited = next(windows)
            start = time.perf_counter()
            training.take_step(window, 0, waited)
            times.append(time.perf_counter() - start)
        wall = time.perf_counter() - began
        found.append(
            {
                "kind": kind,
                "steps": len(times),
                "median": statistics.median(times),
                "wall": wall,
                "in_calls": spent[0],
                "thread": thread_seconds(),
            }
        )
        tracker.finish("KILLED", timeout=0.1)
        while senders():  # one that waits for the slow server ends with its answer
            time.sleep(0.1)
    training.engine.close()
    return found


def thread_seconds() -> float:
    """CPU seconds of the tracker's thread; 0 where there is none."""
    ids = senders()
    return sum(t.user_time + t.system_time for t in psutil.Process().threads() if t.id in ids)


def senders() -> set[int | None]:
    """The ids of the trackers' threads that are alive."""
    from wmtp_ds.tracking import SENDING

    return {thread.native_id for thread in threading.enumerate() if thread.name == SENDING}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure))), flush=True)
        os._exit(0)
    for folder in (HERE.parent, HERE.parent / "launch"):
        sys.path.insert(0, str(folder))
    from conftest import make_workspace

    with tempfile.TemporaryDirectory() as place:
        found = soak(make_workspace(Path(place)), rounds=options.rounds, seconds=options.seconds, seed=options.seed)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
