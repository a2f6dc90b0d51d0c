"""The picture of a data file's statistics."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wmtp_ds.data.output_file import whole_file

_RIGHT, _WRONG, _NEUTRAL = "tab:green", "tab:red", "tab:blue"
_BINS = 40


def plot_statistics(
    report: dict[str, Any],
    rows_per_problem: npt.NDArray[np.integer],
    prompts: npt.NDArray[np.integer],
    solutions: npt.NDArray[np.integer],
    picture: Path,
) -> None:
    """Draw difficulties, rows per problem, lengths, and what each curriculum phase learns from, as a PNG.

    Args:
        report: as `wmtp-ds data stats --json` prints it.
        rows_per_problem: [problems].
        prompts: lengths [rows], in tokens where the report has any, else in bytes.
        solutions: likewise.
        picture: the file to write; its folder is there.

    Raises:
        RunError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plan = report["plan"]
    figure, axes = plt.subplots(2, 3 if plan else 2, figsize=(15 if plan else 10.5, 7.2), squeeze=False)
    figure.suptitle(f"{report['file']}: {report['rows']:,} rows of {report['problems']:,} problems")
    _difficulty(axes[0, 0], report["by_difficulty"])
    most = int(rows_per_problem.max())
    axes[0, 1].hist(rows_per_problem, bins=_BINS if most > _BINS else np.arange(0.5, most + 1), color=_NEUTRAL)
    axes[0, 1].set(title="rows per problem", xlabel="rows", ylabel="problems")
    unit = "tokens" if report["tokens"] else "bytes"
    for axis, what, lengths in ((axes[1, 0], "prompts", prompts), (axes[1, 1], "solutions", solutions)):
        axis.hist(lengths, bins=_BINS, color=_NEUTRAL)
        axis.set(title=what, xlabel=unit, ylabel="rows")
        if report["tokens"] and lengths.max() > report["tokens"]["max_length"] / 2:
            axis.axvline(report["tokens"]["max_length"], color="black", linestyle="--", label="max_length")
            axis.legend()
    if plan:
        _phases(axes[0, 2], plan["phases"], ("correct", "incorrect"), by_bin=False)
        if "by_bin" in plan["run"]:
            _phases(axes[1, 2], plan["phases"], tuple(plan["run"]["by_bin"]), by_bin=True)
        else:
            axes[1, 2].remove()
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    try:
        with whole_file(picture) as partial:
            figure.savefig(partial, dpi=120, format="png")
    finally:
        plt.close(figure)


def _difficulty(axis: Any, by_difficulty: dict[str, dict[str, int]]) -> None:
    names = ["unknown" if level == "0" else level for level in by_difficulty]
    right = [counts["correct"] for counts in by_difficulty.values()]
    wrong = [counts["incorrect"] for counts in by_difficulty.values()]
    axis.bar(names, right, color=_RIGHT, label="correct")
    axis.bar(names, wrong, bottom=right, color=_WRONG, label="incorrect")
    axis.set(title="difficulty", xlabel="difficulty", ylabel="rows")
    axis.legend()


def _phases(axis: Any, phases: list[dict[str, Any]], names: tuple[str, ...], *, by_bin: bool) -> None:
    """Stacked bars of supervised tokens, one a phase: by correctness, or by difficulty bin."""
    labels = [f"{begin:g} to {end:g}" for begin, end in (phase["epoch_range"] for phase in phases)]
    places = np.arange(len(phases))
    below = np.zeros(len(phases))
    for name in names:
        height = np.array(
            [
                phase["by_bin"][name]["supervised_tokens"] if by_bin else phase[f"supervised_tokens_{name}"]
                for phase in phases
            ]
        )
        axis.bar(places, height, bottom=below, label=name, color={"correct": _RIGHT, "incorrect": _WRONG}.get(name))
        below += height
    axis.set_xticks(places, labels)
    axis.set(title="supervised tokens of each phase", xlabel="share of the run", ylabel="tokens")
    axis.legend()
