"""Completed runs side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmtp_ds.plots import plot_losses
from wmtp_ds.run_summary import read_summary
from wmtp_ds.tracking_state import METRICS_FILE


def results(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What each run's folder says of it, with the folder itself."""
    return [{"folder": str(folder), **read_summary(folder)} for folder in folders]


def print_table(folders: Sequence[Path]) -> None:
    """Stage, steps, losses, seconds, tokens/s and run id of each run, on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for title in ("stage", "steps", "first loss", "last loss", "val loss", "AUC", "seconds", "tokens/s", "MLflow run"):
        table.add_column(title, justify="left" if title in ("stage", "MLflow run") else "right", no_wrap=True)
    for run in results(folders):
        auc = run.get("val/auc")
        table.add_row(
            run["stage"],
            str(run["steps"]),
            f"{run['first_loss']:.4f}",
            f"{run['last_loss']:.4f}",
            f"{run['val/loss']:.4f}",
            "" if auc is None else f"{auc:.3f}",
            f"{run['seconds']:.1f}",
            f"{run['tokens_per_s']:,.0f}",
            run.get("mlflow_run_id") or "not tracked",
        )
    # Wide enough for the run ids even where the output is a file.
    console = Console()
    console = console if console.is_terminal else Console(width=130)
    console.print(table)


def figure_of(folders: Sequence[Path], picture: Path) -> None:
    """The loss curves of several runs in one PNG, each under its stage; under its folder where two share a stage."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    stages = [str(read_summary(folder)["stage"]) for folder in folders]
    titles = [
        stage if stages.count(stage) == 1 else f"{stage}: {folder.name}"
        for stage, folder in zip(stages, folders, strict=True)
    ]
    plot_losses({title: folder / METRICS_FILE for title, folder in zip(titles, folders, strict=True)}, picture)
