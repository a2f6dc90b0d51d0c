"""How a token is chosen from logits: the likeliest, or at random; and how drafted tokens are accepted."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token always.
        top_p: only the likeliest tokens are drawn from, as few as have this much probability together (Holtzman et
            al. 2020, "The Curious Case of Neural Text Degeneration").
        seed: of the random numbers.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number >= 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")

    @property
    def is_greedy(self) -> bool:
        """Whether there is nothing random in it."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn with, float64, like ``logits`` (``[..., V]``); of no use where it is greedy."""
        probabilities = (logits.double() / self.temperature).softmax(-1)
        if self.top_p == 1:
            return probabilities
        ordered, places = probabilities.sort(-1, descending=True)
        # A token is left out if those before it have enough probability already.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
        kept = torch.zeros_like(probabilities).scatter_(-1, places, ordered)
        return kept / kept.sum(-1, keepdim=True)


class RowRandom:
    """A stream of random numbers for each row, so that what a row becomes depends on no other.

    Args:
        seed: of all.
        rows: a number for each row, which tells its stream from others.
    """

    def __init__(self, seed: int, rows: Sequence[int]):
        self._generators = [torch.Generator().manual_seed(_mixed(seed, row)) for row in rows]

    def draw(self, count: int, device: torch.device) -> Tensor:
        """The next ``count`` numbers in [0, 1) of each row, float64 ``[B, count]``."""
        drawn = [torch.rand(count, dtype=torch.float64, generator=generator) for generator in self._generators]
        return torch.stack(drawn).to(device)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows alone."""
        self._generators = [self._generators[row] for row in rows]


def _mixed(seed: int, row: int) -> int:
    """A seed of its own for each pair (SplitMix64, Steele et al. 2014): near numbers give unlike streams."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + (row + 1) * 0xD1B54A32D192ED03) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


def choose(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative probability passes a number in [0, 1): ``[..., V]``, ``[...]`` -> ``[...]``."""
    cumulative = probabilities.cumsum(-1)
    total = cumulative[..., -1:]
    # Less than the total, whatever is rounded: so a token of probability 0 is never chosen.
    threshold = torch.minimum(uniform[..., None] * total, total.nextafter(torch.zeros_like(total)))
    return (cumulative <= threshold).sum(-1)


def accept(
    drafted_Bm: Tensor, drafted_probabilities_BmV: Tensor, probabilities_BpV: Tensor, uniform_Bu: Tensor
) -> tuple[Tensor, Tensor]:
    """Speculative sampling (Leviathan et al. 2023, algorithm 1): what comes out is distributed as without drafts.

    Draft ``j`` is accepted with probability ``min(1, p/q)``; the first that is not is drawn anew from what ``p`` has
    more than ``q``; if all are accepted, one more token is drawn from ``p``.

    Args:
        drafted_Bm: the drafts, drawn from q.
        drafted_probabilities_BmV: q, of each draft.
        probabilities_BpV: p, at each draft and behind the last: p = m + 1.
        uniform_Bu: m + 1 numbers in [0, 1) that nothing else depends on.

    Returns:
        How many drafts are accepted ``[B]``, and the token behind them ``[B]``.
    """
    count = drafted_Bm.shape[1]
    p_Bm = probabilities_BpV[:, :count].gather(-1, drafted_Bm[..., None]).squeeze(-1)
    q_Bm = drafted_probabilities_BmV.gather(-1, drafted_Bm[..., None]).squeeze(-1)
    # Where q has more than p by rounding alone, there is nothing to draw anew from.
    excess_Bm = (drafted_probabilities_BmV - probabilities_BpV[:, :count]).clamp(min=0).sum(-1)
    is_accepted_Bm = (uniform_Bu[:, :count] * q_Bm < p_Bm) | (excess_Bm < 1e-12)
    accepted_B = is_accepted_Bm.long().cumprod(1).sum(1)
    rest_BpV = probabilities_BpV.clone()
    rest_BpV[:, :count] = (probabilities_BpV[:, :count] - drafted_probabilities_BmV).clamp(min=0)
    rest_BV = rest_BpV[torch.arange(len(accepted_B), device=accepted_B.device), accepted_B]
    return accepted_B, choose(rest_BV, uniform_Bu[:, count])
