"""Does Rho-1's selection help where a corpus holds garbage?

Correct solutions of half of the problems train a reference model; those of the other half are the corpus, with 0, 10
or 30 % of its tokens replaced at random. The baseline learns from all of its tokens, `rho1` from the k % with the
highest excess loss over the reference; both see the same rows for as many steps, and are judged on clean solutions of
other problems. The reference's training is no part of these steps.
"""

from collections.abc import Sequence
from typing import Any

import corpora
from intervals import difference, over_seeds
from matplotlib.axes import Axes
from runs import Run, do
from sizes import Size

from wmtp_ds.plots import read_series
from wmtp_ds.tracking_state import METRICS_FILE

TITLE = "Rho-1 against baseline on a corrupted corpus"
SHARES = (0.0, 0.1, 0.3)
K_PERCENT = 0.6  # the production config's
SWEEP = (0.3, 0.45, 0.6, 0.75, 0.9, 1.0)
SWEPT = 0.3  # the share of corrupted tokens at which k is swept
_LOSS = "val/loss_head_1"


def _arms() -> list[tuple[float, float | None]]:
    """Share of corrupted tokens, and k; None is the baseline."""
    arms: list[tuple[float, float | None]] = [(share, k) for share in SHARES for k in (None, K_PERCENT)]
    return arms + [(SWEPT, k) for k in SWEEP if k != K_PERCENT]


def _name(share: float, k: float | None) -> str:
    return f"{round(100 * share)} %, " + ("baseline" if k is None else f"rho1 k={k}")


def study(size: Size, seeds: Sequence[int], workers: int) -> dict[str, Any]:
    """Train all arms; each one's final loss and its curve, one a seed."""
    clean, own = corpora.halves(size, corpora.problems(size))
    references, arms = {}, {}
    for seed in seeds:
        model = corpora.policy(size, clean, seed, 1)
        settings = {"training.max_steps": size.reference_steps, "runtime.seed": seed, "models.policy.path": model}
        references[seed] = Run(f"reference-{seed}", size, "baseline", settings | clean.settings())
    for share, k in _arms():
        arms[_name(share, k)] = [_arm(size, clean, own, references[seed], seed, share, k) for seed in seeds]
    do([run for runs in arms.values() for run in runs], workers)
    figures = {arm: _figures(runs) for arm, runs in arms.items()}
    return {
        "figures": figures,
        "reference loss": [run.summary()[_LOSS] for run in references.values()],
        "steps": size.corpus_steps,
        "commands": {arm: runs[0].command for arm, runs in arms.items()},
    }


def _arm(
    size: Size, clean: corpora.Files, own: corpora.Files, reference: Run, seed: int, share: float, k: float | None
) -> Run:
    model = corpora.policy(size, clean, seed, size.heads)  # whose tokenizer is the reference's
    files = corpora.corrupted(own, corpora.tokenizer_of(model), share)
    settings: dict[str, object] = {
        "training.max_steps": size.corpus_steps,
        "training.eval_interval": max(1, size.corpus_steps // 12),
        "runtime.seed": seed,
        "models.policy.path": model,
    }
    name = f"corrupted-{round(100 * share)}-{'baseline' if k is None else f'rho1-{k}'}-{seed}"
    if k is None:
        return Run(name, size, "baseline", settings | files.settings(), (reference,))
    settings |= {"training.k_percent": k, "models.reference.path": reference.model}
    return Run(name, size, "rho1", settings | files.settings(), (reference,))


def _figures(runs: Sequence[Run]) -> dict[str, Any]:
    curves = [read_series(run.folder / METRICS_FILE, _LOSS) for run in runs]
    return {"loss": [values[-1] for _, values in curves], "curves": [[steps, values] for steps, values in curves]}


def steps_to(steps: Sequence[int], losses: Sequence[float], goal: float) -> float | None:
    """When a curve first comes down to a loss, between the evaluations around it; None if it never does."""
    for place, loss in enumerate(losses):
        if loss <= goal:
            if place == 0:
                return float(steps[0])
            share = (losses[place - 1] - goal) / (losses[place - 1] - loss)
            return steps[place - 1] + share * (steps[place] - steps[place - 1])
    return None


def table(results: dict[str, Any]) -> str:
    """Final losses, differences from the baseline on the same corpus, and steps to the baseline's final loss."""
    figures, total = results["figures"], results["steps"]
    lines = [
        f"| corpus | arm | clean held-out loss, head 1 | minus baseline | steps to the baseline's loss after {total} |",
        "|---|---|---|---|---|",
    ]
    for arm, own in figures.items():
        share, _, method = arm.partition(", ")
        baseline = figures[f"{share}, baseline"]
        apart = reached = ""
        if method != "baseline":
            apart = difference(own["loss"], baseline["loss"]).text(4)
            times = [steps_to(*curve, goal) for curve, goal in zip(own["curves"], baseline["loss"], strict=True)]
            there = [time for time in times if time is not None]
            reached = f"{over_seeds(there).text(0)}" if there else "never"
            if there and len(there) < len(times):
                reached += f" ({len(times) - len(there)} of {len(times)} seeds never)"
        lines.append(f"| {share} corrupted | {method} | {over_seeds(own['loss']).text(4)} | {apart} | {reached} |")
    lines.append(f"\nThe reference's own loss there: {over_seeds(results['reference loss']).text(4)}.")
    return "\n".join(lines)


def draw(results: dict[str, Any], axis: Axes) -> None:
    """Clean held-out loss against steps, means over seeds."""
    colours = {}
    for arm, own in results["figures"].items():
        share, _, method = arm.partition(", ")
        if method not in ("baseline", f"rho1 k={K_PERCENT}"):
            continue
        steps = own["curves"][0][0]
        losses = [over_seeds([curve[1][place] for curve in own["curves"]]) for place in range(len(steps))]
        style = "--" if method == "baseline" else "-"
        [line] = axis.plot(steps, [one.mean for one in losses], style, color=colours.get(share), label=arm)
        colours[share] = line.get_color()
        low, high = ([one.mean + side * (one.half or 0) for one in losses] for side in (-1, 1))
        axis.fill_between(steps, low, high, color=colours[share], alpha=0.12)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("clean held-out loss, head 1 (nats)")
    axis.legend(fontsize=8)
