"""What ranks do together, with two processes that form a group of their own."""

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
said["gathered"] = distributed.gather_objects([rank] * (rank + 1))
print(json.dumps(said))
distributed.close()
"""


def test_the_others_wait_for_what_one_does_and_hear_of_its_errors(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    ranks = [
        subprocess.Popen([sys.executable, "-c", CODE, str(rank), store], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in ranks:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert json.loads(out.splitlines()[-1]) == {
            "value": "made",
            "error": ["no room", True, 1],
            "gathered": [[0], [1, 1]],
        }


def test_alone(tmp_path: Path) -> None:
    assert distributed.on_main(lambda: 7) == 7
    assert distributed.gather_objects("x") == ["x"]
    assert not RunError("said by one rank").everywhere
