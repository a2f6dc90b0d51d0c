"""Rho-1: learn the tokens whose loss exceeds a frozen reference model's the most (Lin et al. 2024)."""

from functools import partial

from torch import Tensor

from wmtp_ds.data.batches import Batch
from wmtp_ds.stages.base import (
    Output,
    Stage,
    StageModel,
    Totals,
    batch_targets,
    head_scales,
    head_shares,
    target_counts,
)
from wmtp_ds.weighting.statistics import moments
from wmtp_ds.weighting.targets import per_head
from wmtp_kernels import IGNORE_INDEX, rho1_linear_cross_entropy
from wmtp_kernels.rho1 import excess_loss, kept_counts


class Rho1(Stage):
    """Selective language modelling: per head, the top ``k_percent`` of targets by excess loss; or soft weights."""

    def learned_targets(self, supervised_nG: Tensor) -> Tensor:
        """The number of targets that will be selected is known before any loss is: ``⌈k·M⌉`` of each group."""
        if self.training.weighting == "softmax":
            return supervised_nG.sum(1)
        if self.training.selection_scope == "batch":
            return kept_counts(supervised_nG.sum(1), self.training.k_percent)
        return kept_counts(supervised_nG, self.training.k_percent).sum(1)

    def look(self, model: StageModel, batch: Batch, reference_BS: Tensor | None) -> dict[str, Tensor]:
        """What head 1 selects, and the losses that say so."""
        assert reference_BS is not None, "rho1 needs the reference model's losses"
        targets_nBS, no_scales_n = batch_targets(batch, model.n), reference_BS.new_zeros(model.n)
        _, ce_nBS, weights_nBS = self._select(model, batch, targets_nBS, reference_BS, no_scales_n)
        own_BS = per_head(reference_BS, 1, first=1)[0]
        excess_BS = excess_loss(ce_nBS[0], own_BS, self.training.excess)
        return {"weight": weights_nBS[0], "excess": excess_BS, "loss": ce_nBS[0], "reference": own_BS}

    def _select(
        self, model: StageModel, batch: Batch, targets_nBS: Tensor, reference_BS: Tensor, scales_n: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the cross-entropy and the weight of every target, ``[n, B, S]``."""
        cfg = self.training
        found: tuple[Tensor, Tensor, Tensor] = model.policy.lm_head(
            model.head_states(model.trunk(batch), batch),
            loss=partial(
                rho1_linear_cross_entropy,
                targets_nBS=targets_nBS,
                reference_nBS=per_head(reference_BS, model.n, first=1),
                k_percent=cfg.k_percent,
                excess=cfg.excess,
                weighting=cfg.weighting,
                scope=cfg.selection_scope,
                temperature=cfg.temperature,
                scales_n=scales_n,
                counts_nB=target_counts(batch.host, model.n),
                sequences_BS=batch.sequence_ids,
            ),
        )
        return found

    def loss(self, model: StageModel, batch: Batch, totals: Totals, reference_BS: Tensor | None) -> Output:
        """``(1/n) Σ_k (1/M_k) Σ w·CE`` over selected targets, ``w`` from the excess ``CE_{i,k} − r_{i+k}``."""
        assert reference_BS is not None, "rho1 needs the reference model's losses"
        targets_nBS, scales_n = batch_targets(batch, model.n), head_scales(totals)
        loss, ce_nBS, weights_nBS = self._select(model, batch, targets_nBS, reference_BS, scales_n)
        supervised_nBS = targets_nBS != IGNORE_INDEX
        shares = head_shares(scales_n, (weights_nBS * ce_nBS).sum((1, 2)))
        shares["rho1/selected_ratio"] = (weights_nBS > 0).sum() / totals.supervised_n.sum().clamp(min=1)
        shares["rho1/reference_loss"] = (reference_BS * batch.supervised).sum() / totals.decisions.clamp(min=1)
        return Output(loss, shares, {"weight": moments(weights_nBS, supervised_nBS)})
