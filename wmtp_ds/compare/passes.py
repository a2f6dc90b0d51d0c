"""pass@k of arms, and the differences: paired by problem, with bootstrap intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from wmtp_ds.compare.run import Run
from wmtp_ds.evaluate.estimator import bootstrap_interval, difference_interval
from wmtp_ds.evaluate.files import Finished

Arms = Sequence[tuple[str, Sequence[Run]]]


def compare_passes(arms: Arms) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Every arm against the first one, on every set of problems that both were evaluated on.

    Args:
        arms: name and runs of each.

    Returns:
        A record for each set, arm and k; warnings; and errors: what cannot be compared, and why.
    """
    records: list[dict[str, Any]] = []
    warnings: list[str] = []
    errors: list[str] = []
    (first_name, first), *others = arms
    for name, runs in others:
        shared = [one for one in _sets(first) if one in _sets(runs)]
        if not shared and _sets(first) and _sets(runs):
            sides = [f"{arm}: {', '.join(_sets(members))}" for arm, members in ((first_name, first), (name, runs))]
            errors.append(f"pass@k of {first_name} and {name}: evaluated on different problems ({'; '.join(sides)})")
        for problem_set in shared:
            pair = _alike(first, runs, problem_set)
            try:
                _check(pair)
            except ValueError as error:
                errors.append(f"pass@k of {first_name} and {name} on {problem_set}: {error}")
                continue
            warnings += [f"{first_name} and {name} on {problem_set}: {text}" for text in _doubts(pair, (first, runs))]
            records += _records(problem_set, (first_name, name), pair)
    return records, warnings, errors


def _sets(runs: Sequence[Run]) -> list[str]:
    """The sets of problems that any of the runs was evaluated on."""
    return list(dict.fromkeys(one.problem_set for run in runs for one in run.evaluations))


def _alike(first: Sequence[Run], second: Sequence[Run], problem_set: str) -> tuple[list[Finished], list[Finished]]:
    """One evaluation of each run that has any: of the problems and options that most runs have, else the newest."""
    found = [[one for one in run.evaluations if one.problem_set == problem_set] for run in (*first, *second)]

    def common(one: Finished) -> tuple[int, int]:
        problems = [[other for other in own if other.problems_key == one.problems_key] for own in found]
        options = [own for own in problems if any(other.options == one.options for other in own)]
        return sum(map(bool, problems)), len(options)

    def choose(runs: Sequence[Run]) -> list[Finished]:
        own = [[one for one in run.evaluations if one.problem_set == problem_set] for run in runs]
        return [max(some, key=common) for some in own if some]  # the first of equals: the newest

    return choose(first), choose(second)


def _check(pair: tuple[list[Finished], list[Finished]]) -> None:
    """Raise ValueError where the problems are others."""
    everything = [one for side in pair for one in side]
    ids = {one.place: set(one.counts) for one in everything}
    (place, expected), *rest = ids.items()
    for other, found in rest:
        if found != expected:
            missing, more = len(expected - found), len(found - expected)
            raise ValueError(
                f"different problems: {other} lacks {missing} of those in {place} and has {more} others. Evaluate both "
                "on the same ones"
            )
    if len({one.problems_key for one in everything}) > 1:
        raise ValueError(
            f"different problems: those of {', '.join(ids)} have the same names, but other texts or tests. Evaluate "
            "both on the same ones"
        )
    if not set.intersection(*(set(one.ks) for one in everything)):
        told = "; ".join(f"{one.place}: {', '.join(map(str, one.ks))}" for one in everything)
        raise ValueError(f"no k that all were evaluated at ({told}). Evaluate with the same --k")


def _doubts(pair: tuple[list[Finished], list[Finished]], runs: tuple[Sequence[Run], Sequence[Run]]) -> list[str]:
    everything = [one for side in pair for one in side]
    told = []
    for key in sorted({key for one in everything for key in one.options}):
        values = list(dict.fromkeys(str(one.options.get(key)) for one in everything))
        if len(values) > 1 and key != "n_samples":  # the estimate is unbiased for any number of samples
            told.append(f"samples were drawn with different options: {key} is {' or '.join(values)}")
    lacking = sum(len(side) for side in runs) - len(everything)
    if lacking:
        told.append(f"{lacking} of the runs have no evaluation on it")
    return told


def _records(
    problem_set: str, names: tuple[str, str], pair: tuple[list[Finished], list[Finished]]
) -> list[dict[str, Any]]:
    everything = [one for side in pair for one in side]
    order = list(everything[0].counts)
    records = []
    for k in sorted(set.intersection(*(set(one.ks) for one in everything))):
        first, second = (np.stack([_in_order(one, order, k) for one in side]) for side in pair)
        low, high = difference_interval(first, second)
        records.append(
            {
                "problems": problem_set,
                "problem_count": len(order),
                "k": k,
                "first": names[0],
                "second": names[1],
                "first_runs": len(first),
                "second_runs": len(second),
                "first_pass": float(first.mean()),
                "first_interval": list(bootstrap_interval(first.mean(0))),
                "second_pass": float(second.mean()),
                "second_interval": list(bootstrap_interval(second.mean(0))),
                "difference": float(second.mean() - first.mean()),
                "interval": [low, high],
                "level": 0.95,
                "better": int((second.mean(0) > first.mean(0)).sum()),
                "worse": int((second.mean(0) < first.mean(0)).sum()),
                "evaluations": [[one.place for one in side] for side in pair],
            }
        )
    return records


def _in_order(one: Finished, order: Sequence[str], k: int) -> np.ndarray:
    of_problem = dict(zip(one.counts, one.pass_at(k), strict=True))
    return np.array([of_problem[problem] for problem in order])
