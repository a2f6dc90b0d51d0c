"""Does Rho-1's selection help where a corpus holds garbage?

Right solutions of half of the problems train a reference model; those of the other half are the corpus, with 0, 10 or
30 % of its tokens replaced at random. The baseline learns from all of its tokens, `rho1` from the k % with the highest
excess loss over the reference; both have one head, as in the paper, see the same rows for as many steps at a constant
learning rate, and are judged on clean solutions of other problems. The reference's training is no part of these steps,
and it has read clean data that the baseline never sees: that is the method's price.

Two arms bound what selection can do, at 30 %: `random` learns from as many tokens, chosen by lot; `intact` from as
many, but never a corrupted one, as nobody could in earnest.

The contrast to judge by, named before anything was run: `rho1` with k = 0.6 minus the baseline where 30 % are
corrupted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpora
from intervals import difference, over_seeds
from matplotlib.axes import Axes
from runs import Run, do
from selections import by_lot, score
from sizes import Size

from wmtp_ds.plots import read_series
from wmtp_ds.tracking_state import METRICS_FILE

TITLE = "Rho-1 against baseline on a corrupted corpus"
SHARES = (0.0, 0.1, 0.3)
K_PERCENT = 0.6  # the production config's
SWEEP = (0.3, 0.45, 0.6, 0.8, 1.0)
SWEPT = 0.3  # the share of corrupted tokens at which k is swept
_LOSS = "val/loss_head_1"


Arm = tuple[float, str, float]  # share of corrupted tokens, who selects, k
ARMS: tuple[Arm, ...] = (
    *((share, method, k) for share in SHARES for method, k in (("baseline", 1.0), ("rho1", K_PERCENT))),
    *((SWEPT, "rho1", k) for k in SWEEP if k != K_PERCENT),
    *((SWEPT, method, K_PERCENT) for method in ("random", "intact")),
)


def _name(share: float, method: str, k: float) -> str:
    return f"{round(100 * share)} %, {method}" + ("" if method == "baseline" else f" k={k}")


def study(size: Size, seeds: Sequence[int], workers: int) -> dict[str, Any]:
    """Train all arms; each one's final loss and its curve, one a seed."""
    files = corpora.problems(size)
    clean, own = corpora.halves(files, correct_only=True)
    models = {seed: corpora.policy(size, files, seed, 1) for seed in seeds}
    tokenizer = corpora.tokenizer_of(models[seeds[0]])
    corpus = {share: corpora.corrupted(own, tokenizer, share) for share in SHARES}
    references, arms = {}, {}
    for seed in seeds:
        settings = {
            "training.max_steps": size.reference_steps,
            "training.eval_interval": size.reference_steps,
            # Another one than the policy's: the same weights to begin with would make them alike.
            "models.policy.path": corpora.policy(size, files, 1000 + seed, 1),
            "runtime.seed": 1000 + seed,
        }
        references[seed] = Run(f"reference-{seed}", size, "baseline", settings | clean.settings())
    do(list(references.values()), workers)
    first = references[seeds[0]]
    scored, spoilt = score(first, corpus[SWEPT]), corpora.marks(corpus[SWEPT], tokenizer)
    marks = {"intact": spoilt, "random": [[False] * len(row) for row in spoilt]}
    for arm in ARMS:
        arms[_name(*arm)] = [
            _run(arm, models[seed], corpus[arm[0]], seed, first, by_lot(scored, arm[1], marks[arm[1]], seed))
            if arm[1] in marks
            else _run(arm, models[seed], corpus[arm[0]], seed, references[seed], {})
            for seed in seeds
        ]
    do([run for runs in arms.values() for run in runs], workers)
    figures = {arm: _figures(runs) for arm, runs in arms.items()}
    return {
        "figures": figures,
        "reference loss": [run.summary()[_LOSS] for run in references.values()],
        "intact": {f"{round(100 * share)} %": corpora.intact(found, tokenizer) for share, found in corpus.items()},
        "steps": size.corpus_steps,
        "commands": {arm: runs[0].command for arm, runs in arms.items()},
    }


def _run(arm: Arm, model: Path, files: corpora.Files, seed: int, reference: Run, lots: dict[str, object]) -> Run:
    share, method, k = arm
    size = reference.size
    settings: dict[str, object] = {
        "training.max_steps": size.corpus_steps,
        "training.eval_interval": max(1, size.corpus_steps // 12),
        "training.scheduler": "constant",  # or every curve would meet the baseline's end in its last steps
        "runtime.seed": seed,
        "models.policy.path": model,
    }
    name = f"corrupted-{round(100 * share)}-{method}-{k}-{seed}"
    if method == "baseline":
        return Run(name, size, "baseline", settings | files.settings())
    settings |= {"training.k_percent": k, "models.reference.path": reference.model}
    return Run(name, size, "rho1", settings | lots | files.settings(), (reference,))


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
        "| corpus | arm | clean held-out loss, head 1 | minus baseline | lowest on the way | "
        f"steps to the baseline's loss after {total} |",
        "|---|---|---|---|---|---|",
    ]
    for arm, own in figures.items():
        share, _, method = arm.partition(", ")
        baseline = figures[f"{share}, baseline"]
        apart = reached = ""
        if method != "baseline":
            apart = difference(own["loss"], baseline["loss"]).text(4)
            times = [
                steps_to(steps, losses, goal)
                for (steps, losses), goal in zip(own["curves"], baseline["loss"], strict=True)
            ]
            # Those that never arrive count as later than the end, so there is a median while most arrive.
            ordered = sorted(total + 1 if time is None else time for time in times)
            median = ordered[len(ordered) // 2]
            arrived = sum(time is not None for time in times)
            reached = f"{'never' if median > total else f'{median:.0f}'} ({arrived} of {len(times)} seeds arrive)"
        final = over_seeds(own["loss"]).text(4)
        lowest = over_seeds([min(losses) for _, losses in own["curves"]]).text(4)
        lines.append(f"| {share} corrupted | {method} | {final} | {apart} | {lowest} | {reached} |")
    damaged = ", ".join(f"{share}: {100 * (1 - found):.1f} %" for share, found in results["intact"].items())
    known = over_seeds(results["reference loss"]).text(4)
    lines.append(
        f"\nSteps are the median over seeds. The reference's own loss: {known}. "
        f"Tokens that hold something of what was put in, as the model reads the text ({damaged})."
    )
    return "\n".join(lines)


def draw(results: dict[str, Any], axis: Axes) -> None:
    """Clean held-out loss against steps, means over seeds."""
    colours: dict[str, Any] = {}
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
