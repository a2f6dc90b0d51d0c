"""All four stages on the CPU, from nothing to a table and a figure: what ``make demo`` runs.

Each line that begins with $ is a command that you can type yourself.
"""

import argparse
import os
import time
from pathlib import Path

from commands import run

STAGES = ("baseline", "critic", "verifiable", "rho1")
FIGURE = Path("checkpoints/demo.png")
NEXT = """
What to try next (each takes half a minute):
  wmtp-ds show stage_configs/local/verifiable.toml
  wmtp-ds train --stage rho1 --config stage_configs/local/rho1.toml --override training.k_percent=0.3
  deepspeed bin/train_stage.py --stage rho1 --num_gpus 4 --config stage_configs/local/rho1.toml
  wmtp-ds validate stage_configs/critic.toml
  mlflow ui --backend-store-uri sqlite:///mlflow.db
(in this shell: source .venv/bin/activate)"""


def main() -> None:
    """Data, models, configs, stages, results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks of each stage")
    ranks = parser.parse_args().ranks
    os.chdir(Path(__file__).resolve().parents[1])
    began = time.monotonic()
    run("wmtp-ds data sample")
    if not Path("storage/models/micro-reference/trunk_fingerprint.json").exists():
        run("wmtp-ds model micro")
    configs = [f"stage_configs/local/{stage}.toml" for stage in STAGES]
    for stage, config in zip(STAGES, configs, strict=True):
        if stage != "verifiable":  # its critic is not trained yet; the pipeline checks its config before it starts
            run(f"wmtp-ds validate {config}")
    run(f"wmtp-ds pipeline {' '.join(configs)} --num_gpus {ranks} --name demo --reuse --figure {FIGURE}")
    print(f"loss curves: {FIGURE}\n{time.monotonic() - began:.0f} seconds in all\n{NEXT}")


if __name__ == "__main__":
    main()
