"""The reward of a solution as a run had it, where that is not its label."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from wmtp_ds.config import Resolved
from wmtp_ds.data.rows import Row
from wmtp_ds.data.templates import get_template
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.models.loading import load_tokenizer
from wmtp_ds.models.reward import RewardEncoder, RewardModel, load_reward_model, padded
from wmtp_ds.reward_values import Squash, stored_score


@dataclass(frozen=True)
class Rewarder:
    """Scores of solutions, brought into [0, 1].

    Attributes:
        squash: of the run.
        model, encoder: the reward model and its tokens; None where rows carry their scores.
    """

    squash: Squash
    model: RewardModel | None
    encoder: RewardEncoder | None
    device: torch.device

    @classmethod
    def of(cls, resolved: Resolved, device: torch.device) -> "Rewarder | None":
        """As ``models.reward`` of a run says; None where the label is the reward, or the stage needs none.

        Raises:
            UserError: the reward model is gone, or the rewards cannot be known.
        """
        config = resolved.config
        reward = config.models.reward
        if not config.training.uses_rewards or reward.source == "is_correct":
            return None
        if reward.squash == "zscore_sigmoid":
            raise UserError(
                f'{resolved.path}: models.reward.squash = "zscore_sigmoid": mean and deviation of the scores that the '
                "run has read are not kept, so its rewards of other solutions are not known. The pages of its "
                "evaluations (weights/ in the run's folder) show its weights"
            )
        if reward.source == "scores":
            return cls(Squash(reward.squash), None, None, device)
        assert reward.path is not None
        folder = Path(reward.path)
        model = load_reward_model(folder, dtype=getattr(torch, reward.dtype))
        torch.nn.Module.to(model, device)
        template = get_template(config.dataset.template)
        encoder = RewardEncoder(load_tokenizer(folder), template, config.dataset.max_length)
        return cls(Squash(reward.squash), model, encoder, device)

    def __call__(self, row: Row, line: int) -> float:
        """The reward of a row of a data file.

        Raises:
            UserError: it carries no score.
            RunError: the reward model's score is not finite.
        """
        if self.model is None or self.encoder is None:
            score = stored_score(row, f"line {line}")
        else:
            input_ids_BS, lengths_B, pad_id = padded([self.encoder(row)], self.model.vocabulary)
            with torch.no_grad():
                score = self.model(input_ids_BS.to(self.device), lengths_B.to(self.device), pad_id).item()
            if not np.isfinite(score):
                raise RunError(f"line {line}: the reward model's score is {score}: its weights are damaged")
        return float(self.squash(np.array([score], np.float32))[0])
