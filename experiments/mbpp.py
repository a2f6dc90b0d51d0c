"""All four stages on MBPP with the micro model, and what a ready critic saves: the README's table of results.

``--input`` is a folder with MBPP's train.jsonl and validation.jsonl, in the dataset's own format. Each line that begins
with $ is a command that you can type yourself.
"""

import argparse
import os
from pathlib import Path

from commands import run

from wmtp_ds.run_summary import read_summary

DATA, MODELS = "storage/data/mbpp", "storage/models/mbpp"
# rho1 on four ranks, the others on two.
RANKS = {"baseline": 2, "critic": 2, "verifiable": 2, "rho1": 4}


def markdown() -> str:
    """The runs as a Markdown table, and the cost of verifiable with and without training its critic."""
    lines = [
        "| stage | ranks | steps | first loss | last loss | val loss | AUC | seconds | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    runs = {stage: read_summary(Path(f"checkpoints/mbpp-{stage}")) for stage in RANKS}
    for stage, found in runs.items():
        auc = f"{found['val/auc']:.3f}" if "val/auc" in found else ""
        lines.append(
            f"| {stage} | {found['world_size']} | {found['steps']} | {found['first_loss']:.4f} | "
            f"{found['last_loss']:.4f} | {found['val/loss']:.4f} | {auc} | {found['wall_seconds']:.0f} | "
            f"{found['tokens_per_s']:,.0f} |"
        )
    critic, verifiable = (runs[stage]["wall_seconds"] for stage in ("critic", "verifiable"))
    both = critic + verifiable
    lines.append(
        f"\nCritic plus verifiable: {both:.0f} s. Verifiable again with the ready critic: {verifiable:.0f} s, "
        f"{verifiable / both:.0%} of it."
    )
    return "\n".join(lines)


def main() -> None:
    """Import, make models, train, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="folder with MBPP's train.jsonl and validation.jsonl")
    source = parser.parse_args().input.resolve()
    os.chdir(Path(__file__).resolve().parents[1])
    run(f"wmtp-ds data import mbpp --input {source} --output {DATA}")
    run(f"wmtp-ds model micro --data {DATA}/train.jsonl --output {MODELS}")
    configs = {stage: f"experiments/mbpp/{stage}.toml" for stage in RANKS}
    for stage, ranks in RANKS.items():
        run(f"wmtp-ds train --stage {stage} --config {configs[stage]} --num_gpus {ranks}")
    print(markdown())


if __name__ == "__main__":
    main()
