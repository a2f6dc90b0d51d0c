"""From a reward model's score to a reward: the scores that rows carry, and what brings scores into [0, 1]."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wmtp_ds.data.rows import Row
from wmtp_ds.errors import UserError

Scores = npt.NDArray[np.float32]
SCORE_KEY = "reward_score"  # in a row's metadata


@dataclass(frozen=True)
class Squash:
    """Brings scores into [0, 1]: the logistic function, of z-scores if ``how`` is "zscore_sigmoid".

    Attributes:
        mean, std: of the scores of the training rows that a run reads (population); used for z-scores.
    """

    how: str
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, how: str, scores: Scores) -> "Squash":
        """With the statistics of these scores."""
        known = scores.astype(np.float64)
        return cls(how, float(known.mean()), float(known.std())) if len(known) else cls(how)

    def __call__(self, scores: Scores) -> Scores:
        """Rewards in [0, 1], float32; NaN stays NaN."""
        z = scores.astype(np.float64)
        if self.how == "zscore_sigmoid":
            z = (z - self.mean) / (self.std or 1.0)
        # The form that overflows for neither sign.
        small = np.exp(-np.abs(z))
        rewards: Scores = (np.where(z >= 0, 1.0, small) / (1.0 + small)).astype(np.float32)
        return rewards


def stored_score(row: Row, where: str) -> float:
    """The score that a row carries in its metadata.

    Args:
        row: of a data file.
        where: it is, for the message.

    Raises:
        UserError: it has none, or one that is no finite number.
    """
    score = row.metadata.get(SCORE_KEY)
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < 1e38:
        raise UserError(
            f"{where}: metadata.{SCORE_KEY} is {score!r}, and models.reward.source = "
            '"scores" needs a number there: run wmtp-ds data label --reward-model, or set source = "model"'
        )
    return score
