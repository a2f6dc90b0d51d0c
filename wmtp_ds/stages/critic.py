"""Critic: a value head learns, on a frozen trunk, whether a solution will turn out correct."""

from torch import Tensor

from wmtp_ds.data.batches import Batch
from wmtp_ds.stages.base import Output, Stage, StageModel, Totals, value_loss


class Critic(Stage):
    """Regression of ``V_i`` onto the return (or GAE target) of each decision."""

    trains_policy = False

    def loss(self, model: StageModel, batch: Batch, totals: Totals, reference_BS: Tensor | None) -> Output:
        """The mean value loss over the global batch's decisions."""
        values_BS = model.values(model.trunk(batch)).squeeze(-1)
        return value_loss(self.training, values_BS, batch, totals)
