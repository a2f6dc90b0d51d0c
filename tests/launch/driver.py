"""What ranks run in these tests: several runs, one after another.

Each job is a stage config with overrides, run by the function that ``bin/train_stage.py`` runs. ``stop_after`` makes
it see a SIGTERM while it takes that step, as if one had come; ``record`` writes down the rows of each step.
"""

import json
import signal
import sys
from pathlib import Path

import fifth_stage
import torch

import wmtp_ds.train
from wmtp_ds import distributed
from wmtp_ds.launch import Place, Request
from wmtp_ds.rank import quiet
from wmtp_ds.signals import Interruption

TRAINING = wmtp_ds.train.Training


def interrupted_after(steps: int) -> type[Interruption]:
    """An interruption whose signal comes during the given step."""

    class Scheduled(Interruption):
        seen = 0

        @property
        def signal(self) -> int:
            self.seen += 1
            return signal.SIGTERM if self.seen == steps else 0

        @signal.setter
        def signal(self, value: int) -> None:
            pass

    return Scheduled


class Recorded(wmtp_ds.train.Training):
    """Writes the rows that this rank reads in each step beside the checkpoints, and saves at once what it resumes."""

    def _restore(self, source: Path) -> str | None:
        run_id = super()._restore(source)
        self._save()
        return run_id

    def take_step(self, window: list, *arguments: object, **keywords: object) -> int:
        rows = [row for batch in window for row in batch.row_ids.tolist()]
        line = json.dumps({"step": self.progress.step + 1, "rows": rows})
        with (self.folder.root / f"rows-{distributed.rank()}.jsonl").open("a") as stream:
            stream.write(line + "\n")
        return super().take_step(window, *arguments, **keywords)


def main() -> None:
    """Run the jobs of a JSON file; write each one's exit code beside its checkpoints."""
    jobs_file = Path(sys.argv[-1])
    torch.set_num_threads(1)
    quiet("warning", Place(0, 0, 1, 1))
    # As if it lay in wmtp_ds/stages/focal.py, with its config class in wmtp_ds/config/training.py.
    sys.modules["wmtp_ds.stages.focal"] = fifth_stage
    for job in json.loads(jobs_file.read_text()):
        resolved = Request(stage=job["stage"], config=Path(job["config"]), override=tuple(job["override"])).load()
        stop_after = job.get("stop_after")
        wmtp_ds.train.Training = Recorded if job.get("record") else TRAINING
        wmtp_ds.train.Interruption = interrupted_after(stop_after) if stop_after else Interruption
        code = wmtp_ds.train.train(resolved, resume=job.get("resume", "never"))
        assert code == (143 if stop_after else 0), f"{job} ended with {code}"
    never = {"sklearn", "torch._inductor.compile_fx"} & sys.modules.keys()
    assert not never, f"{never}: seconds to import, for nothing"
    print("all jobs done", flush=True)


main()
