"""pass@k and what is known of it."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
RESAMPLES = 10_000


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that at least one of k samples is correct, of n of which c are: unbiased.

    ``1 − C(n−c, k) / C(n, k)`` (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1), as
    a product that does not overflow.

    Raises:
        ValueError: unless 0 ≤ c ≤ n and 1 ≤ k ≤ n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, of which c are correct; there are n={n}, c={c}")
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def bootstrap_interval(
    values: Sequence[float] | Floats,
    *,
    level: float = 0.95,
    seed: int = 0,
    statistic: Callable[[Floats], Floats] = lambda resampled: resampled.mean(-1),
) -> tuple[float, float]:
    """A percentile bootstrap interval of the mean over problems (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: one a problem; what is paired is given as differences.
        level: of confidence.
        seed: of the resampling; the same values and seed give the same interval.
        statistic: of resampled values ``[resamples, problems]``, over the last axis.

    Raises:
        ValueError: there are no values.
    """
    found = np.asarray(values, np.float64)
    if not len(found):
        raise ValueError("there is nothing to resample")
    rng = np.random.default_rng(seed)
    # In parts: a large benchmark resampled at once would take gigabytes.
    part = max(1, 4_000_000 // len(found))
    statistics = []
    for begin in range(0, RESAMPLES, part):
        count = min(part, RESAMPLES - begin)
        statistics.append(statistic(found[rng.integers(len(found), size=(count, len(found)))]))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(statistics), [tail, 1 - tail])
    return float(low), float(high)


def difference_interval(first: Floats, second: Floats, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """As `bootstrap_interval`, of the mean over problems of ``second − first``, paired by problem.

    Where an arm has several runs (seeds), these are resampled, too, each arm's on their own: the interval is then about
    another set of problems and of seeds. Few runs make it too narrow, as with any bootstrap.

    Args:
        first: pass@k, ``[runs, problems]``.
        second: of the same problems in the same order, ``[runs, problems]``; another number of runs is allowed.
        level: of confidence.
        seed: of the resampling.

    Raises:
        ValueError: there are no problems or no runs, or one arm has other problems.
    """
    if first.shape[1] != second.shape[1] or not first.size or not second.size:
        raise ValueError(f"arms of {first.shape} and {second.shape} runs and problems are no pairs")
    if len(first) == len(second) == 1:
        return bootstrap_interval(second[0] - first[0], level=level, seed=seed)
    rng = np.random.default_rng(seed)
    problems = first.shape[1]
    part = max(1, 4_000_000 // problems)
    means = []
    for begin in range(0, RESAMPLES, part):
        count = min(part, RESAMPLES - begin)
        drawn = [_mean_of_drawn(arm, count, rng) for arm in (first, second)]  # [count, problems] each
        chosen = rng.integers(problems, size=(count, problems))
        means.append(np.take_along_axis(drawn[1] - drawn[0], chosen, 1).mean(1))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def _mean_of_drawn(runs: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Means over as many runs as there are, drawn with replacement: ``[runs, problems]`` -> ``[count, problems]``."""
    drawn = rng.integers(len(runs), size=(count, len(runs)))
    shares = (drawn[:, :, None] == np.arange(len(runs))).mean(1)
    means: Floats = shares @ runs
    return means
