"""What ranks do together, and must have in common, with two processes that form a group of their own."""

import json
import subprocess
import sys
from pathlib import Path

from wmtp_ds import distributed
from wmtp_ds.errors import RunError

CODE = """
import json, sys, time
import torch.distributed as dist
from datetime import timedelta
from wmtp_ds import distributed
from wmtp_ds.errors import RunError

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=3))
said = {}

def work():
    assert rank == 0
    time.sleep(5)  # longer than the group's own patience
    return "made"

said["value"] = distributed.on_main(work)
try:
    distributed.on_main(lambda: (_ for _ in ()).throw(RunError("no room")))
except RunError as error:
    said["error"] = [str(error), error.everywhere, error.exit_code]

# --- what machines must have in common ---
import os, socket
from pathlib import Path
from types import SimpleNamespace
from wmtp_ds.errors import UserError
from wmtp_ds.machines import check_machines
from wmtp_ds.run_folder import RunFolder

root = Path(store).parent
socket.gethostname = lambda: f"box-{rank}"
resolved = SimpleNamespace(
    hash=lambda: "same",
    config=SimpleNamespace(
        runtime=SimpleNamespace(peer_timeout=0.5), experiment=SimpleNamespace(critic_checkpoint="runs:/c/best")
    ),
)
critic = root / f"critic-{rank}"
critic.write_text("same")

def refused(folder, what):
    index = lambda name: SimpleNamespace(path=name, fingerprint=f"{rank}" if name == what else "same")
    manifest = SimpleNamespace(checksum=lambda: index("scores").fingerprint)
    scores = SimpleNamespace(folder="scores", manifest=manifest) if what == "scores" else None
    data = SimpleNamespace(train=index("train.jsonl"), validation=index("validation.jsonl"), scores=scores)
    folder = RunFolder(folder, "never")
    if rank == 0:
        folder.lock()
    else:
        time.sleep(0.3)  # which a network file system may take to show it
    if what == "critic" and rank == 1:
        critic.write_text("another")
    if what == "config":
        resolved.hash = lambda: f"{rank}"
    try:
        check_machines(resolved, folder, data, critic)
    except UserError as error:
        return [error.exit_code, str(error)]
    finally:
        folder.close()
    return None

said["refused"] = [refused(root / "run", "nothing"), refused(root / f"run-{rank}", "")]
files = "train.jsonl", "validation.jsonl", "scores"
said["refused"] += [refused(root / "run", what) for what in (*files, "critic", "config")]
said["gathered"] = distributed.gather_objects([rank] * (rank + 1))
print(json.dumps(said))
distributed.close()
"""


def refusals(root: Path) -> list:
    another = "is another on box-1 than on box-0. Copy it to all machines."
    return [
        None,
        [
            2,
            f"checkpoint.save_dir: {root}/run-{{rank}} is another folder on box-1 than on box-0. Checkpoints are "
            "written by all ranks: choose a folder on a file system that all machines share.",
        ],
        [2, f"dataset.train (train.jsonl) {another}"],
        [2, f"dataset.validation (validation.jsonl) {another}"],
        [2, f"models.reference.scores (scores) {another}"],
        [2, f"the critic (runs:/c/best) {another}"],
        [2, f"the config {another}"],
    ]


def test_the_others_wait_for_what_one_does_and_hear_of_its_errors(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    ranks = [
        subprocess.Popen([sys.executable, "-c", CODE, str(rank), store], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert json.loads(out.splitlines()[-1]) == {
            "value": "made",
            "error": ["no room", True, 1],
            "refused": json.loads(json.dumps(refusals(tmp_path)).replace("{rank}", str(rank))),
            "gathered": [[0], [1, 1]],
        }


def test_alone(tmp_path: Path) -> None:
    assert distributed.on_main(lambda: 7) == 7
    assert distributed.gather_objects("x") == ["x"]
    assert not RunError("said by one rank").everywhere
