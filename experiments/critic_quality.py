"""What does the critic know, and when?

A value head is trained on the frozen trunk of the base model, with the discounted reward as its target (`return`,
γ = 0.95), the reward itself (γ = 1), or value plus advantage (`gae`, λ = 0.95, γ = 0.95), over the same rows for as
many steps. Its values on held-out solutions, right and wrong, are read at eleven places of each solution. The AUC is
the chance that a right solution has a higher value there than a wrong one; at 0 % it is the value before the first
token, which can know the problem alone.
"""

from collections.abc import Sequence
from typing import Any

import corpora
import numpy as np
import torch
from intervals import difference, over_seeds
from matplotlib.axes import Axes
from placement import GAMMA, base_run, critic_run
from preference import first_difference
from runs import Run, do
from sizes import Size

from wmtp_ds.data.index import build_index
from wmtp_ds.evaluation import area_under_roc
from wmtp_ds.launch import resolve_device
from wmtp_ds.look.columns import Chosen, Looker, Solution

TITLE = "The critic: where it knows, and how well it is calibrated"
# Name -> value_target and γ.
TARGETS = {"return, γ 1": ("return", 1.0), "return": ("return", GAMMA), "gae": ("gae", GAMMA)}
_PLACES = tuple(place / 10 for place in range(11))  # share of the solution's tokens that are read
_BINS = 10


def study(size: Size, seeds: Sequence[int], workers: int) -> dict[str, Any]:
    """Train critics with both targets; their AUC and calibration, one a seed."""
    files = corpora.problems(size)
    bases = {seed: base_run(size, files, seed) for seed in seeds}
    critics = {name: [critic_run(bases[seed], files, seed, *own) for seed in seeds] for name, own in TARGETS.items()}
    do([run for runs in critics.values() for run in runs], workers)
    figures = {}
    for target, runs in critics.items():
        found = [_figures(run, files) for run in runs]
        figures[target] = {name: [one[name] for one in found] for name in found[0]}
    return {"figures": figures, "commands": {target: runs[0].command for target, runs in critics.items()}}


def _figures(run: Run, files: corpora.Files) -> dict[str, Any]:
    index = build_index(files.validation)
    looker = Looker.load(run.model, torch.device(resolve_device(run.size.device)))
    chosen = [Chosen(place, int(index.line[place]), index.read_row(place)) for place in range(len(index))]
    solutions = looker.look(chosen)
    values = [[token.columns["value"] for token in solution.tokens] for solution in solutions]
    labels = np.array([solution.row.is_correct for solution in solutions])
    read = np.array([[own[round(place * (len(own) - 1))] for place in _PLACES] for own in values])
    difficulty = np.array([solution.row.difficulty for solution in solutions])
    last = read[:, -1]
    problems = np.array([solution.row.problem_id for solution in solutions])
    return {
        "within problems": [_within(read[:, place], labels, problems) for place in range(len(_PLACES))],
        "ceiling": ceiling(solutions),
        "auc by place": [_auc(read[:, place], labels) for place in range(len(_PLACES))],
        "auc by difficulty": {
            str(level): _auc(last[difficulty == level], labels[difficulty == level])
            for level in sorted(set(difficulty.tolist()))
            if len(set(labels[difficulty == level])) == 2
        },
        "calibration error": calibration_error(last, labels),
        "reliability": reliability(last, labels),
        "brier": float(np.mean((last - labels) ** 2)),
        "solutions": len(solutions),
    }


def _within(values: np.ndarray, labels: np.ndarray, problems: np.ndarray) -> float:
    """The mean over problems of the chance that a right solution has a higher value than a wrong one of the same."""
    found = [_auc(values[problems == one], labels[problems == one]) for one in sorted(set(problems.tolist()))
             if len(set(labels[problems == one])) == 2]  # fmt: skip
    return float(np.mean(found))


def ceiling(solutions: Sequence[Solution]) -> list[float]:
    """The AUC of somebody who sees each edit as soon as it is made: until then a wrong solution is like a right one."""
    shares = []
    for solution in solutions:
        if solution.row.is_correct:
            continue
        texts = [token.text for token in solution.tokens]
        right = [
            [token.text for token in other.tokens]
            for other in solutions
            if other.row.is_correct and other.row.problem_id == solution.row.problem_id
        ]
        shared = max((first_difference(texts, other) for other in right), default=0)
        # At place p the value has read round(p * (tokens - 1)) tokens.
        shares.append([round(place * (len(texts) - 1)) > shared for place in _PLACES])
    return [0.5 + 0.5 * float(share) for share in np.mean(np.array(shares, float), 0)]


def _auc(values: np.ndarray, labels: np.ndarray) -> float:
    found = area_under_roc(torch.from_numpy(np.stack([values, labels], 1)))
    assert found is not None, "there are solutions of both kinds"
    return found


def reliability(values: np.ndarray, labels: np.ndarray) -> list[list[float]]:
    """Of ten bins of equal width: how many solutions, their mean value, and the share of right ones. No empty bins."""
    bins = np.minimum((values * _BINS).astype(int), _BINS - 1)
    found = []
    for number in sorted(set(bins.tolist())):
        inside = bins == number
        found.append([float(inside.sum()), float(values[inside].mean()), float(labels[inside].mean())])
    return found


def calibration_error(values: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error (Naeini et al. 2015): mean |value − share of right ones| over those bins."""
    return sum(count * abs(mean - share) for count, mean, share in reliability(values, labels)) / len(values)


def table(results: dict[str, Any]) -> str:
    """AUC at the beginning, the middle and the end, and calibration."""
    figures = results["figures"]
    places = {f"{10 * place} % read": place for place in (0, 2, 5, 8, 10)}
    best = figures["return"]["ceiling"][0]
    lines = [
        "| target | " + " | ".join(f"AUC, {name}" for name in places) + " | calibration error | Brier |",
        "|---|" + "---|" * (len(places) + 2),
    ]
    for target, own in figures.items():
        aucs = [over_seeds([seed[place] for seed in own["within problems"]]).text() for place in places.values()]
        errors = [over_seeds(own[name]).text() for name in ("calibration error", "brier")]
        lines.append(f"| {target} | " + " | ".join(aucs + errors) + " |")
    lines.append("| best possible | " + " | ".join(f"{best[place]:.3f}" for place in places.values()) + " | | |")
    levels = list(figures["return"]["auc by difficulty"][0])
    lines += ["", "| target | " + " | ".join(f"AUC, difficulty {level}" for level in levels) + " |"]
    lines += ["|---|" + "---|" * len(levels)]
    for target, own in figures.items():
        aucs = [over_seeds([seed[level] for seed in own["auc by difficulty"]]).text() for level in levels]
        lines.append(f"| {target} | " + " | ".join(aucs) + " |")
    last = {target: [seed[-1] for seed in own["within problems"]] for target, own in figures.items()}
    lines.append(
        f"\n`gae` minus `return`, AUC at the end: {difference(last['gae'], last['return']).text()}. "
        f"{figures['return']['solutions'][0]} held-out solutions. A constant value of 0.5 has a Brier score of 0.25."
    )
    return "\n".join(lines)


def draw(results: dict[str, Any], axis: Axes) -> None:
    """AUC by relative place."""
    for target, own in results["figures"].items():
        found = [over_seeds([seed[place] for seed in own["within problems"]]) for place in range(len(_PLACES))]
        axis.errorbar(_PLACES, [one.mean for one in found], [one.half or 0 for one in found], label=target, capsize=3)
    axis.plot(_PLACES, results["figures"]["return"]["ceiling"][0], "--", color="grey", label="best possible")
    axis.axhline(0.5, color="grey", linewidth=1)
    axis.set_xlabel("share of the solution that is read")
    axis.set_ylabel("AUC of the value, within problems")
    axis.legend()
