"""What does a ready critic save?

Seconds of a run (models, data, steps, evaluations, exports; not the imports, which all runs share): the critic and then
the verifiable stage, against the verifiable stage alone with the critic that is there. The runs are those of
`placement`. What is saved follows from how many steps each takes, so seconds a step are shown, too.
"""

from collections.abc import Sequence
from typing import Any

import corpora
from intervals import over_seeds
from matplotlib.axes import Axes
from placement import arm_run, base_run, critic_run
from runs import Run, do
from sizes import Size

TITLE = "Critic plus verifiable against verifiable with a ready critic"


def study(size: Size, seeds: Sequence[int], workers: int) -> dict[str, Any]:
    """Seconds of each, one a seed."""
    files = corpora.problems(size)
    bases = [base_run(size, files, seed) for seed in seeds]
    critics = [critic_run(base, files, seed) for base, seed in zip(bases, seeds, strict=True)]
    runs = [arm_run("TD, β 0.9", critic, files, seed, {}) for critic, seed in zip(critics, seeds, strict=True)]
    do(runs, workers)
    return {
        "figures": {"critic": _seconds(critics), "verifiable": _seconds(runs)},
        "step": {"critic": _step(critics), "verifiable": _step(runs)},
        "steps": {"critic": size.critic_steps, "verifiable": size.steps},
        "workers": workers,
        "commands": {"critic": critics[0].command, "verifiable": runs[0].command},
    }


def _seconds(runs: Sequence[Run]) -> list[float]:
    return [run.summary()["wall_seconds"] for run in runs]


def _step(runs: Sequence[Run]) -> list[float]:
    return [run.summary()["seconds"] / run.summary()["steps"] for run in runs]


def table(results: dict[str, Any]) -> str:
    """Seconds and shares."""
    figures, steps = results["figures"], results["steps"]
    both = [sum(pair) for pair in zip(figures["critic"], figures["verifiable"], strict=True)]
    share = [alone / together for alone, together in zip(figures["verifiable"], both, strict=True)]
    return "\n".join(
        [
            "| | steps | seconds | share of both |",
            "|---|---|---|---|",
            f"| critic, then verifiable | {steps['critic']} + {steps['verifiable']} | {over_seeds(both).text(1)} | 1 |",
            f"| verifiable with a ready critic | {steps['verifiable']} | {over_seeds(figures['verifiable']).text(1)} | "
            f"{over_seeds(share).text(3)} |",
            f"\nSeconds a step: critic {over_seeds(results['step']['critic']).text(3)}, verifiable "
            f"{over_seeds(results['step']['verifiable']).text(3)}. {results['workers']} runs at a time.",
        ]
    )


def draw(results: dict[str, Any], axis: Axes) -> None:
    """Seconds of both, one above the other."""
    critic, verifiable = (over_seeds(results["figures"][name]).mean for name in ("critic", "verifiable"))
    labels = ["critic, then verifiable", "with a ready critic"]
    axis.barh(labels, [critic, 0], label="critic")
    axis.barh(labels, [verifiable, verifiable], left=[critic, 0], label="verifiable")
    axis.set_xlabel("seconds")
    axis.legend()
