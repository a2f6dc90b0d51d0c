"""Does it help to weigh tokens by TD errors, and is it their placement that helps?

Half of the solutions are wrong. A base model learns from all of them; a critic learns on its trunk; then each arm
goes on from the base model for as many steps, over the same rows:

- `uniform`: every token weighs 1;
- `TD`: the verifiable stage with the weights that its production config has (β = 0.9);
- `TD, z-scores`: δ as z-scores, β = 1, mean weight 1: weights that differ more;
- `TD, z-scores, shuffled`: the same weights dealt to other tokens of the same solution;
- `correct only`: every token weighs 1, and no wrong solution is read. The labels are used as a filter.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpora
from intervals import difference, over_seeds
from matplotlib.axes import Axes
from runs import Run, do
from sizes import Size
from solving import solve

TITLE = "Verifiable against baseline and shuffled weights"
CONTROL = "uniform"
_MIXED: dict[str, object] = {"data_sampling.correct_ratio": 0.5}
_ZSCORES = _MIXED | {"training.td_normalize": "zscore", "training.weight_norm": "mean1", "training.beta": 1.0}
ARMS: dict[str, tuple[str, dict[str, object]]] = {
    "uniform": ("baseline", _MIXED),
    "TD": ("verifiable", _MIXED),
    "TD, z-scores": ("verifiable", _ZSCORES),
    "TD, z-scores, shuffled": ("verifiable", _ZSCORES | {"training.shuffle_weights": True}),
    "correct only": ("baseline", {"data_sampling.correct_ratio": 1.0}),
}


def base_run(size: Size, files: corpora.Files, seed: int) -> Run:
    """The model that has read all solutions, right and wrong."""
    model = corpora.policy(size, files, seed, size.heads)
    settings = {"training.max_steps": size.base_steps, "runtime.seed": seed, "models.policy.path": model}
    return Run(f"base-{seed}", size, "baseline", settings | _MIXED | files.settings())


def critic_run(base: Run, files: corpora.Files, seed: int, target: str = "return") -> Run:
    """A value head on that model's trunk."""
    settings = {
        "training.max_steps": base.size.critic_steps,
        "training.value_target": target,
        "runtime.seed": seed,
        "models.policy.path": base.model,
    }
    return Run(f"critic-{target}-{seed}", base.size, "critic", settings | files.settings(), (base,))


def arm_run(arm: str, base: Run, critic: Run, files: corpora.Files, seed: int) -> Run:
    """What goes on from the base model."""
    stage, own = ARMS[arm]
    settings = {"training.max_steps": base.size.steps, "runtime.seed": seed, "models.policy.path": base.model}
    if stage == "verifiable":
        settings["experiment.critic_checkpoint"] = critic.model
    name = "".join(letter if letter.isalnum() else "-" for letter in arm)
    return Run(f"{name}-{seed}", base.size, stage, settings | own | files.settings(), (base, critic))


def study(size: Size, seeds: Sequence[int], workers: int) -> dict[str, Any]:
    """Train and evaluate all arms; figures of each, one a seed."""
    files = corpora.problems(size)
    problems = corpora.held_out(size, files)
    bases = {seed: base_run(size, files, seed) for seed in seeds}
    critics = {seed: critic_run(bases[seed], files, seed) for seed in seeds}
    arms = {arm: [arm_run(arm, bases[seed], critics[seed], files, seed) for seed in seeds] for arm in ARMS}
    do([run for own in arms.values() for run in own], workers)
    arms = {"base model": list(bases.values())} | arms
    figures = {arm: _figures(own, problems) for arm, own in arms.items()}
    return {"figures": figures, "commands": {arm: own[0].command for arm, own in arms.items()}}


def _figures(runs: Sequence[Run], problems: Path) -> dict[str, list[float]]:
    summaries = [run.summary() for run in runs]
    solved = [solve(run.model, problems, corpora.TEMPLATE) for run in runs]
    return {
        "loss, head 1": [summary["val/loss_head_1"] for summary in summaries],
        "loss, all heads": [summary["val/loss"] for summary in summaries],
        "pass@1": [found["pass@1"] for found in solved],
    }


def table(results: dict[str, Any]) -> str:
    """Means over seeds, and differences from the uniform arm, paired by seed."""
    figures = results["figures"]
    lines = [
        "| arm | loss, head 1 | minus uniform | loss, all heads | pass@1 | minus uniform |",
        "|---|---|---|---|---|---|",
    ]
    for arm, own in figures.items():
        apart = {
            name: "" if arm in (CONTROL, "base model") else difference(own[name], figures[CONTROL][name]).text(4)
            for name in ("loss, head 1", "pass@1")
        }
        lines.append(
            f"| {arm} | {over_seeds(own['loss, head 1']).text(4)} | {apart['loss, head 1']} | "
            f"{over_seeds(own['loss, all heads']).text(4)} | {over_seeds(own['pass@1']).text(3)} | {apart['pass@1']} |"
        )
    placed, shuffled = figures["TD, z-scores"], figures["TD, z-scores, shuffled"]
    found = {name: difference(placed[name], shuffled[name]).text(4) for name in ("loss, head 1", "pass@1")}
    lines.append(
        f"\nPlacement alone (`TD, z-scores` minus shuffled): loss of head 1 {found['loss, head 1']}, "
        f"pass@1 {found['pass@1']}."
    )
    return "\n".join(lines)


def draw(results: dict[str, Any], axis: Axes) -> None:
    """Each arm's loss minus the uniform one's."""
    figures = results["figures"]
    arms = [arm for arm in figures if arm not in (CONTROL, "base model")]
    found = [difference(figures[arm]["loss, head 1"], figures[CONTROL]["loss, head 1"]) for arm in arms]
    axis.axvline(0, color="grey", linewidth=1)
    axis.errorbar([one.mean for one in found], arms, xerr=[one.half or 0 for one in found], fmt="o", capsize=4)
    axis.invert_yaxis()
    axis.set_xlabel("held-out loss of head 1 on correct solutions, minus uniform (nats)")
