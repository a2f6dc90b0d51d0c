"""Verifiable: a token weighs ``clip(exp(δ/β))``, δ the TD error of a value head that was trained as a critic."""

from collections.abc import Sequence

from torch import Tensor

from wmtp_ds.data.batches import Batch
from wmtp_ds.distributed import max_over_ranks, sum_over_ranks
from wmtp_ds.stages.base import Output, Stage, StageModel, Totals, value_loss, weight_statistics
from wmtp_ds.weighting.normalize import Standardisation, standardisation
from wmtp_ds.weighting.statistics import moments
from wmtp_ds.weighting.td import compute_gae, compute_td_errors


class Verifiable(Stage):
    """Advantage-weighted regression (Peng et al. 2019) at the level of tokens, on solutions checked by running them.

    A token after which success became likelier than it was before (δ > 0) weighs more than 1; one that spoilt the
    solution weighs less. The value head keeps learning beside the policy.
    """

    @property
    def needs_window(self) -> bool:
        """z-scores and mean-1 weights are over the global batch."""
        return self.training.td_normalize != "none" or self.training.weight_norm != "none"

    def advantages(self, values_BS1: Tensor, batch: Batch) -> Tensor:
        """TD errors, or GAE if ``td_lambda > 0``: ``[B, S]``, detached."""
        values = values_BS1.detach()
        if self.training.td_lambda > 0:
            return compute_gae(values, batch.rewards, self.training.gamma, self.training.td_lambda, batch.decisions)
        return compute_td_errors(values, batch.rewards, self.training.gamma, batch.decisions)

    def standardise(self, values: Sequence[Tensor], batches: Sequence[Batch]) -> Standardisation:
        """Mean and deviation of δ, and the mean of the exponentials, as the config asks for them."""
        return standardisation(
            [self.advantages(v, batch) for v, batch in zip(values, batches, strict=True)],
            [batch.decisions for batch in batches],
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
        td_BS = self.advantages(values_BS1, batch)
        weights_BS = totals.standardisation.weights(td_BS, cfg.beta, cfg.weight_clip_min, cfg.weight_clip_max)
        weights_BS = (weights_BS * batch.decisions).float()

        policy = model.weighted_cross_entropy(trunk_BSD, batch, weights_BS, totals)
        value = value_loss(cfg, values_BS1.squeeze(-1), batch, totals)
        value.loss = cfg.value_coef * value.loss
        output = policy + value + weight_statistics(weights_BS, batch, totals)
        output.moments["td"] = moments(td_BS, batch.decisions)
        return output
