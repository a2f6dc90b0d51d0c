"""Pictures of runs."""

from collections.abc import Mapping
from pathlib import Path

from wmtp_ds.tracking_state import read_metrics


def read_series(metrics_file: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric in a run's ``metrics.jsonl``; later lines of the same step win.

    A line that a crash cut short is left out.
    """
    series = {step: metrics[name] for step, metrics in read_metrics(metrics_file).items() if name in metrics}
    return list(series), list(series.values())


def plot_losses(runs: Mapping[str, Path], picture: Path) -> None:
    """Training and validation loss over optimizer steps, one panel a run, as a PNG.

    Args:
        runs: title -> the run's ``metrics.jsonl``.
        picture: the file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(len(runs), 2)
    rows = -(-len(runs) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.5 * columns, 3.6 * rows), squeeze=False)
    for axis, (title, file) in zip(axes.flat, runs.items(), strict=False):
        axis.plot(*read_series(file, "train/loss"), label="train", linewidth=1.2)
        axis.plot(*read_series(file, "val/loss"), label="validation", marker="o", markersize=4, linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("loss (nats)" if "critic" not in title else "value loss")
        axis.grid(alpha=0.3)
        axis.legend()
    for axis in axes.flat[len(runs) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)
