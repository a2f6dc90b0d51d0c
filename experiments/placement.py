"""Does it help to weigh tokens by TD errors, and is it their placement that helps?

Half of the solutions are wrong. A base model and a critic on its trunk learn from the solutions of one half of the
problems; each arm goes on from the base model with those of the other half, over the same rows for as many steps:

- `uniform`: every token weighs 1 (`baseline`);
- `uniform, value loss`: `verifiable` with all weights clipped to 1, so that only its value loss is added;
- `TD, β 0.9`: its production config, but for γ;
- `GAE, β 0.3`: advantages over many tokens (λ = 0.95), weighing more;
- `… shuffled`: the same weights dealt to other tokens of the same solution;
- `known edits left out`: what a perfect critic could know: of a wrong solution all tokens but those in which it differs
  from the nearest right one;
- `as many left out by lot`: its control;
- `correct only`: the labels as a filter: no wrong solution is read, and twice as many right ones;
- `correct only, half`: the same for half of the steps, with as many right ones as the others.

The contrast to judge by, named before any arm was run: `GAE, β 0.3` minus its shuffled twin, in the share of held-out
pairs whose right solution is likelier than its nearest wrong one. γ is 0.95, where the configs have 1: with 1 the
critic learned less in its first trials, in which no arm was trained (`critic_quality` shows both).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpora
from intervals import difference, over_seeds
from matplotlib.axes import Axes
from preference import edits, preference
from runs import Run, do
from selections import by_lot, score
from sizes import Size
from solving import solve_all

from wmtp_ds.plots import read_series
from wmtp_ds.tracking_state import METRICS_FILE

TITLE = "Verifiable against baseline and shuffled weights"
CONTROL, BASE = "uniform", "base model"
PRIMARY = ("GAE, β 0.3", "GAE, β 0.3, shuffled")
GAMMA = 0.95
_GAE: dict[str, object] = {"training.beta": 0.3, "training.td_lambda": 0.95}
_SHUFFLED: dict[str, object] = {"training.shuffle_weights": True}
_ONES: dict[str, object] = {"training.weight_clip_min": 1.0, "training.weight_clip_max": 1.0}
KNOWN, LOT = "known edits left out", "as many left out by lot"
# Stage, share of right solutions, what differs from its config, and steps as a share of the others'.
ARMS: dict[str, tuple[str, float, dict[str, object], float]] = {
    "uniform": ("baseline", 0.5, {}, 1.0),
    "uniform, value loss": ("verifiable", 0.5, _ONES, 1.0),
    "TD, β 0.9": ("verifiable", 0.5, {}, 1.0),
    "GAE, β 0.3": ("verifiable", 0.5, _GAE, 1.0),
    "GAE, β 0.3, shuffled": ("verifiable", 0.5, _GAE | _SHUFFLED, 1.0),
    KNOWN: ("rho1", 0.5, {}, 1.0),
    LOT: ("rho1", 0.5, {}, 1.0),
    "correct only": ("baseline", 1.0, {}, 1.0),
    "correct only, half": ("baseline", 1.0, {}, 0.5),
}
_FIGURES = {"preference": 4, "log odds": 3, "loss, head 1": 4, "pass@1": 3}


def base_run(size: Size, files: corpora.Files, seed: int) -> Run:
    """The model that has read right and wrong solutions of one half of the problems."""
    first, _ = corpora.halves(files)
    settings = {
        "training.max_steps": size.base_steps,
        "training.eval_interval": size.base_steps,
        "runtime.seed": seed,
        "models.policy.path": corpora.policy(size, files, seed, size.heads),
        "data_sampling.correct_ratio": 0.5,
    }
    return Run(f"base-{seed}", size, "baseline", settings | first.settings())


def critic_run(base: Run, files: corpora.Files, seed: int, target: str = "return", gamma: float = GAMMA) -> Run:
    """A value head on that model's trunk, from the same half."""
    first, _ = corpora.halves(files)
    settings = {
        "training.max_steps": base.size.critic_steps,
        "training.eval_interval": base.size.critic_steps,
        "training.value_target": target,
        "training.gamma": gamma,
        "runtime.seed": seed,
        "models.policy.path": base.model,
    }
    return Run(f"critic-{target}-{gamma}-{seed}", base.size, "critic", settings | first.settings(), (base,))


def arm_run(arm: str, critic: Run, files: corpora.Files, seed: int, more: dict[str, object]) -> Run:
    """What goes on from the base model, with the other half."""
    stage, ratio, own, share = ARMS[arm]
    [base] = critic.needs
    _, second = corpora.halves(files)
    steps = round(share * base.size.steps)
    settings = {
        "training.max_steps": steps,
        "training.eval_interval": steps,
        "runtime.seed": seed,
        "models.policy.path": base.model,
        "data_sampling.correct_ratio": ratio,
    }
    needs = [base]
    if stage == "verifiable":
        settings |= {"experiment.critic_checkpoint": critic.model, "training.gamma": GAMMA}
        needs.append(critic)
    name = re.sub("[^A-Za-z0-9.]+", "-", arm)
    return Run(f"{name}-{seed}", base.size, stage, settings | own | more | second.settings(), tuple(needs))


def leaving_out(base: Run, files: corpora.Files, seeds: Sequence[int]) -> dict[tuple[str, int], dict[str, object]]:
    """Settings of the two arms that leave tokens out, by arm and seed: as many as were edited in all the training set.

    The scores of the base model only lend their form to the lot.
    """
    _, second = corpora.halves(files)
    scored = score(base, second)
    edited = edits(corpora.read_rows(second.train), corpora.tokenizer_of(base.model))
    every = [one for row in edited for one in row]
    fixed = {"training.k_percent": 1 - sum(every) / len(every), "models.reference.path": base.model}
    marked = {KNOWN: edited, LOT: [[False] * len(row) for row in edited]}
    names = {KNOWN: "edits", LOT: "lot"}
    return {
        (arm, seed): fixed | by_lot(scored, names[arm], marked[arm], seed) for arm in (KNOWN, LOT) for seed in seeds
    }


def study(size: Size, seeds: Sequence[int], workers: int) -> dict[str, Any]:
    """Train and evaluate all arms; figures of each, one a seed."""
    files = corpora.problems(size)
    problems = corpora.held_out(size, files) if size.evaluated else None
    bases = {seed: base_run(size, files, seed) for seed in seeds}
    critics = {seed: critic_run(bases[seed], files, seed) for seed in seeds}
    do(list(critics.values()), workers)
    more = leaving_out(bases[seeds[0]], files, seeds)
    arms = {
        arm: [arm_run(arm, critics[seed], files, seed, more.get((arm, seed), {})) for seed in seeds] for arm in ARMS
    }
    do([run for own in arms.values() for run in own], workers)
    arms = {BASE: list(bases.values())} | arms
    return {
        "figures": {arm: _figures(own, files, problems) for arm, own in arms.items()},
        "left out": 1 - float(str(more[KNOWN, seeds[0]]["training.k_percent"])),
        "steps": {arm: own[0].summary()["steps"] for arm, own in arms.items()},
        "commands": {arm: own[0].command for arm, own in arms.items()},
    }


def _figures(runs: Sequence[Run], files: corpora.Files, problems: Path | None) -> dict[str, Any]:
    liked = [preference(run.model, files.validation, run.size.device) for run in runs]
    figures: dict[str, Any] = {
        "preference": [found["share"] for found in liked],
        "log odds": [found["log odds"] for found in liked],
        "pairs": liked[0]["pairs"],
        "loss, head 1": [run.summary()["val/loss_head_1"] for run in runs],
    }
    if problems is not None:
        solved = solve_all([run.model for run in runs], problems, corpora.TEMPLATE)
        figures["pass@1"] = [found["pass@1"] for found in solved]
        figures["problems"] = solved[0]["problems"]
        figures["cut off"] = [found["cut_off"] for found in solved]
    for name in ("weight/std", "td/std"):
        series = [read_series(run.folder / METRICS_FILE, name)[1] for run in runs]
        if all(series):
            figures[name] = [sum(values) / len(values) for values in series]
    return figures


def table(results: dict[str, Any]) -> str:
    """Means over seeds, and differences from the uniform arm, paired by seed."""
    figures, steps = results["figures"], results["steps"]
    lines = [
        "| arm | steps | right likelier than nearest wrong | minus uniform | log odds (nats) | loss, head 1 | "
        "minus uniform | pass@1 | std of weights |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, own in figures.items():
        apart = {
            name: "" if arm in (CONTROL, BASE) else difference(own[name], figures[CONTROL][name]).text(4)
            for name in ("preference", "loss, head 1")
        }
        means = {name: over_seeds(own[name]).text(digits) for name, digits in _FIGURES.items() if name in own}
        spread = over_seeds(own["weight/std"]).text(2) if "weight/std" in own else ""
        lines.append(
            f"| {arm} | {steps[arm]} | {means['preference']} | {apart['preference']} | {means['log odds']} | "
            f"{means['loss, head 1']} | {apart['loss, head 1']} | {means.get('pass@1', 'not measured')} | {spread} |"
        )
    placed, dealt = (figures[arm] for arm in PRIMARY)
    contrast = {name: difference(placed[name], dealt[name]).text(4) for name in ("preference", "loss, head 1")}
    own = figures[CONTROL]
    counted = f"{own['pairs']:.0f} pairs" + (f", {own['problems']} problems" if "problems" in own else "")
    omitted = f"{100 * results['left out']:.1f} %"
    lines.append(
        f"\nPlacement alone (`{PRIMARY[0]}` minus its shuffled twin): {contrast['preference']} in the share of pairs, "
        f"{contrast['loss, head 1']} in the loss. Where tokens are left out, they are {omitted} of all. {counted}."
    )
    return "\n".join(lines)


def draw(results: dict[str, Any], axis: Axes) -> None:
    """Each arm's share of pairs minus the uniform one's."""
    figures = results["figures"]
    arms = [arm for arm in figures if arm not in (CONTROL, BASE)]
    found = [difference(figures[arm]["preference"], figures[CONTROL]["preference"]) for arm in arms]
    axis.axvline(0, color="grey", linewidth=1)
    axis.errorbar([one.mean for one in found], arms, xerr=[one.half or 0 for one in found], fmt="o", capsize=4)
    axis.invert_yaxis()
    axis.set_xlabel("share of pairs whose right solution is likelier, minus uniform")
