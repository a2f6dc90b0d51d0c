"""A fifth weighting, as docs/fifth_weighting.md tells a user to write one: a config class and a stage."""

from pydantic import Field

from wmtp_ds.config.training import TrainingConfig
from wmtp_ds.stages.base import Stage


class FocalTraining(TrainingConfig, stage="focal"):
    """Tokens weigh more the later they come in the solution."""

    late_weight: float = Field(default=2.0, ge=0, description="weight of a solution's last token; its first weighs 1")


class Focal(Stage):
    """A linear ramp over the decisions of a solution."""

    def loss(self, model, batch, totals, reference_BS):
        """``(1/n) Σ_k (1/M_k) Σ w·CE``, w rising from 1 to ``late_weight``."""
        decisions_GL = batch.by_sequence(batch.decisions)
        done_GL = decisions_GL.cumsum(-1) / decisions_GL.sum(-1, keepdim=True).clamp(min=1)
        weights_GL = (1 + (self.training.late_weight - 1) * done_GL) * decisions_GL
        return model.weighted_cross_entropy(model.trunk(batch), batch, batch.by_row(weights_GL).float(), totals)
