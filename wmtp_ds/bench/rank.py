"""The process of one rank of a measurement: ``python -m wmtp_ds.bench.rank WORKSPACE``, started by the launcher."""

import json
import os
import signal
import sys
from pathlib import Path

from wmtp_ds.bench.settings import RESULT_FILE, StepSettings
from wmtp_ds.launch import Place
from wmtp_ds.rank import enter_rank, run_rank


def main() -> None:
    """Measure on this rank; rank 0 writes the result."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to save
    # The launcher may put an option of its own (--local_rank) in front.
    workspace = Path(sys.argv[-1])
    place = Place.of(os.environ)
    assert place is not None, "started by the launcher alone"
    enter_rank(StepSettings.read(workspace).device, place, "warning")

    def work() -> int:
        from wmtp_ds.bench.measure import measure

        result = measure(workspace)
        if place.rank == 0:
            (workspace / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n")
        return 0

    sys.exit(run_rank(work))


if __name__ == "__main__":
    main()
