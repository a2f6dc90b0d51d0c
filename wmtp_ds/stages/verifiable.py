"""Verifiable: a token weighs ``clip(exp(δ/β))``, δ the TD error of a value head that was trained as a critic."""

from collections.abc import Sequence

from torch import Tensor

from wmtp_ds.data.batches import Batch
from wmtp_ds.distributed import max_over_ranks, sum_over_ranks
from wmtp_ds.stages.base import Output, Stage, StageModel, Totals, value_loss
from wmtp_ds.weighting.normalize import Standardisation, standardisation
from wmtp_ds.weighting.shuffle import shuffle_weights
from wmtp_kernels import TDWeights, decision_weights

UNCHANGED = Standardisation()


class Verifiable(Stage):
    """Advantage-weighted regression (Peng et al. 2019) at the level of tokens, on solutions checked by running them.

    A token after which success became likelier than it was before (δ > 0) weighs more than 1; one that spoilt the
    solution weighs less. The value head keeps learning beside the policy.
    """

    @property
    def needs_window(self) -> bool:
        """z-scores and mean-1 weights are over the global batch."""
        return self.training.td_normalize != "none" or self.training.weight_norm != "none"

    def weights(self, values_BS1: Tensor, batch: Batch, constants: Standardisation = UNCHANGED) -> TDWeights:
        """What the weights of a micro-batch are made of: TD errors, or GAE if ``td_lambda > 0``."""
        cfg = self.training
        return TDWeights(
            batch.by_sequence(values_BS1.detach().squeeze(-1)),
            batch.rewards,
            batch.by_sequence(batch.decisions),
            beta=cfg.beta,
            min_weight=cfg.weight_clip_min,
            max_weight=cfg.weight_clip_max,
            gamma=cfg.gamma,
            td_lambda=cfg.td_lambda,
            standardisation=constants,
        )

    def standardise(self, values: Sequence[Tensor], batches: Sequence[Batch]) -> Standardisation:
        """Mean and deviation of δ, and the mean of the exponentials, as the config asks for them."""
        return standardisation(
            [self.weights(v, batch).advantages() for v, batch in zip(values, batches, strict=True)],
            [batch.by_sequence(batch.decisions) for batch in batches],
            beta=self.training.beta,
            zscore=self.training.td_normalize == "zscore",
            mean1=self.training.weight_norm == "mean1",
            reduce_sum=sum_over_ranks,
            reduce_max=max_over_ranks,
        )

    def loss(self, model: StageModel, batch: Batch, totals: Totals, reference_BS: Tensor | None) -> Output:
        """The policy loss under TD weights, plus ``value_coef`` times the value loss."""
        cfg = self.training
        trunk_BSD = model.trunk(batch)
        values_BS1 = model.values(trunk_BSD if cfg.value_grad_to_trunk else trunk_BSD.detach())
        weights = self.weights(values_BS1, batch, totals.standardisation)

        value = value_loss(cfg, values_BS1.squeeze(-1), batch, totals)
        value.loss = cfg.value_coef * value.loss
        placed = shuffled(weights, batch) if cfg.shuffle_weights else weights
        return model.weighted_cross_entropy(trunk_BSD, batch, placed, totals) + value


def shuffled(weights: TDWeights, batch: Batch) -> Tensor:
    """The weights ``[B, S]``, each on another token of its solution."""
    _, weights_GL = decision_weights(weights)
    return batch.by_row(shuffle_weights(weights_GL, weights.decisions_BS, batch.row_ids))
