"""The experiments: ``make experiments``, or one of them, ``python experiments/run.py placement``.

Each trains its arms with every seed, keeps what is done (a second run goes on), and writes results.json, table.md and
figure.png to experiments/results/STUDY (another size: STUDY-SIZE). README.md beside this file gets the tables.
"""

import argparse
import dataclasses
import importlib
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from sizes import SIZES, Size

STUDIES = ("placement", "corruption", "critic_quality", "rerun_cost", "heads")
OF_MBPP = ("placement", "corruption", "critic_quality")
RESULTS = Path("experiments/results")
README = Path("experiments/README.md")


def load(name: str) -> ModuleType:
    """The module of a study: TITLE, study, table, draw."""
    return importlib.import_module(name)


def folder_of(name: str, size: Size) -> Path:
    """Where a study's results are."""
    return RESULTS / (name if size.name == "small" else f"{name}-{size.name}")


def conduct(name: str, size: Size, seeds: list[int], workers: int) -> None:
    """Do a study, and write down what came of it."""
    began = time.monotonic()
    study = load(name)
    print(f"== {study.TITLE}", flush=True)
    found: dict[str, Any] = study.study(size, seeds, workers)
    found |= {"seeds": seeds, "size": size.name, "machine": machine(size), "seconds": time.monotonic() - began}
    folder = folder_of(name, size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    show(study, found, folder)


def show(study: ModuleType, found: dict[str, Any], folder: Path) -> None:
    """The table and the figure of results; the README's copy of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    table = study.table(found)
    (folder / "table.md").write_text(table + "\n")
    print(f"{table}\n", flush=True)
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    study.draw(found, axis)
    axis.set_title(study.TITLE, fontsize=10)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "figure.png", dpi=120)
    plt.close(figure)
    before = README.read_text()
    if (after := with_results(before, folder.name, study.TITLE, table, found)) != before:
        README.write_text(after)


def with_results(readme: str, name: str, title: str, table: str, found: dict[str, Any]) -> str:
    """A page with a study's table and figure between ``<!-- NAME -->`` and ``<!-- end -->``, if it has that place."""
    head, mark, rest = readme.partition(f"<!-- {name} -->\n")
    if not mark:
        return readme
    made = ", ".join(f"{key} {value}" for key, value in found["machine"].items() if key != "device")
    seeds = f"Seeds {found['seeds'][0]} to {found['seeds'][-1]}; {found['machine']['device']}; {made}."
    figure = f"![{title}](results/{name}/figure.png)"
    return f"{head}{mark}{table}\n\n{seeds}\n\n{figure}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


def machine(size: Size) -> dict[str, str]:
    """What the figures depend on besides the seeds."""
    import torch

    device = f"CPU, {len(os.sched_getaffinity(0))} cores"
    if size.device == "cuda":
        device = torch.cuda.get_device_name()
    versions = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    return {"device": device, "python": platform.python_version()} | versions


def main() -> None:
    """Do what is asked for, in the order of the list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"{', '.join(STUDIES)}; all by default")
    parser.add_argument(
        "--size", choices=SIZES, default="small", help="small: minutes on a CPU; mbpp: the same with MBPP; large: a GPU"
    )
    parser.add_argument("--mbpp", type=Path, metavar="FOLDER", help="with MBPP's train.jsonl and validation.jsonl")
    parser.add_argument("--seeds", type=int, default=5, help="how many; 5 by default")
    parser.add_argument("--workers", type=int, help="runs at a time; one a CPU core, one on a GPU")
    parser.add_argument("--show", action="store_true", help="only make tables and figures again from results.json")
    asked = parser.parse_args()
    known = OF_MBPP if asked.size == "mbpp" else STUDIES
    if unknown := set(asked.studies) - set(known):
        parser.error(
            f"no study of size {asked.size} is called {', '.join(sorted(unknown))}: choose from {', '.join(known)}"
        )
    if (asked.size == "mbpp" and not asked.show) != (asked.mbpp is not None):
        parser.error("--size mbpp needs --mbpp FOLDER, and nothing else does")
    if asked.seeds < 1 or (asked.workers is not None and asked.workers < 1):
        parser.error("--seeds and --workers must be at least 1")
    size = SIZES[asked.size]
    if asked.mbpp is not None:
        size = dataclasses.replace(size, mbpp=asked.mbpp.resolve())
    os.chdir(Path(__file__).resolve().parents[1])
    workers = asked.workers or (1 if size.device == "cuda" else len(os.sched_getaffinity(0)))
    for name in asked.studies or known:
        if asked.show:
            folder = folder_of(name, size)
            show(load(name), json.loads((folder / "results.json").read_text()), folder)
        else:
            conduct(name, size, list(range(asked.seeds)), workers)


if __name__ == "__main__":
    main()
