"""Baseline: every token of a correct solution weighs 1."""

from torch import Tensor

from wmtp_ds.data.batches import Batch
from wmtp_ds.stages.base import Output, Stage, StageModel, Totals


class Baseline(Stage):
    """Plain multi-token prediction (Gloeckle et al. 2024, eq. 2), the control for every weighting."""

    def loss(self, model: StageModel, batch: Batch, totals: Totals, reference_BS: Tensor | None) -> Output:
        """``(1/n) Σ_k (1/M_k) Σ CE_{i,k}``."""
        return model.weighted_cross_entropy(model.trunk(batch), batch, batch.decisions.float(), totals)
