"""What every stage shares: the model that the engine runs, and the losses that stages are made of.

A stage says what to train and how to weigh; its file holds that and nothing else. Its loss runs inside
:class:`StageModel`'s forward, because only there has ZeRO-3 gathered the parameters.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmtp_ds.data.batches import Batch
from wmtp_ds.models.mtp import MTPLlamaForCausalLM
from wmtp_ds.models.value_head import ValueHead
from wmtp_ds.stages.watch import watch
from wmtp_ds.weighting.normalize import Standardisation
from wmtp_ds.weighting.statistics import moments
from wmtp_ds.weighting.targets import mtp_targets
from wmtp_ds.weighting.td import compute_gae, discounted_returns
from wmtp_kernels import (
    IGNORE_INDEX,
    TDWeights,
    WeightedLoss,
    decision_weights,
    reference_cross_entropy,
    td_weighted_linear_cross_entropy,
)
from wmtp_kernels.statistics import Statistics, decision_statistics


@dataclass(frozen=True)
class Totals:
    """What losses are divided by: counts over the *global batch*, every rank and accumulation step.

    Counts of micro-batches add up, so they are exchanged as one float64 vector before the first backward.
    """

    targets_n: Tensor  # M_k: the targets that head k learns from
    supervised_n: Tensor  # all supervised targets of head k
    decisions: Tensor  # scalar
    tokens: Tensor  # scalar: tokens that are not padding
    sequences: Tensor  # scalar: sequences with decisions
    places: Tensor  # scalar: tokens, padding included
    standardisation: Standardisation = field(default_factory=Standardisation)

    def pack(self) -> Tensor:
        """All counts as one float64 vector ``[2n + 4]``."""
        scalars = [self.decisions, self.tokens, self.sequences, self.places]
        parts = [self.targets_n, self.supervised_n, torch.stack(scalars)]
        return torch.cat([part.double() for part in parts])

    @classmethod
    def unpack(cls, packed: Tensor, n: int) -> Totals:
        """The inverse of :meth:`pack`."""
        return cls(packed[:n], packed[n : 2 * n], *packed[2 * n :])


@dataclass
class Output:
    """A micro-batch's share of the global batch's loss, and what to log about it."""

    loss: Tensor
    # Scalars that add up over micro-batches and ranks to the global batch's value.
    shares: dict[str, Tensor] = field(default_factory=dict)
    # Moments (see weighting.statistics) of a quantity over this micro-batch's decisions.
    moments: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: Output) -> Output:
        return Output(self.loss + other.loss, self.shares | other.shares, self.moments | other.moments)


class Stage:
    """What to train and how to weigh. Subclass it in ``wmtp_ds/stages/<stage>.py``; see ``docs/fifth_weighting.md``.

    Args:
        training: the stage's ``[training]`` table, validated.
    """

    # Whether the policy is trained; if not, its trunk runs without gradient and its heads not at all.
    trains_policy: ClassVar[bool] = True

    def __init__(self, training: Any):
        self.training = training

    @property
    def needs_window(self) -> bool:
        """Whether weights depend on the advantages of the whole global batch (a value pass before the first loss)."""
        return False

    def standardise(self, values: Sequence[Tensor], batches: Sequence[Batch]) -> Standardisation:
        """Constants of the weights over the global batch, from the values of this rank's window (collective)."""
        raise NotImplementedError

    def learned_targets(self, supervised_nG: Tensor) -> Tensor:
        """``M_k`` of a micro-batch: how many targets each head learns from, int64 ``[n]``.

        Args:
            supervised_nG: int64 ``[n, G]``, the supervised targets of each head in each sequence.
        """
        return supervised_nG.sum(1)

    def loss(self, model: StageModel, batch: Batch, totals: Totals, reference_BS: Tensor | None) -> Output:
        """This micro-batch's share of the loss; runs inside the engine's forward."""
        raise NotImplementedError

    def look(self, model: StageModel, batch: Batch, reference_BS: Tensor | None) -> dict[str, Tensor]:
        """What the stage sees in each decision, to be shown to people: columns ``[B, S]``, without gradient.

        A column's entry at a position is about the token that it emits, the next one. ``weight`` is the token's weight
        in the loss, of head 1 where heads differ; others are the stage's own (``value``, ``td``, ``excess`` …). Weights
        that depend on the global batch are those of this batch alone. A stage whose loss goes through
        `StageModel.weighted_cross_entropy` need not say any of this: it is watched.
        """
        return watch(self, model, batch, reference_BS)

    def counts(self, batch: Batch, n: int) -> Totals:
        """This micro-batch's counts; their sums over the global batch are what :meth:`loss` is given."""
        supervised_nG = target_counts(batch, n)
        return Totals(
            self.learned_targets(supervised_nG),
            supervised_nG.sum(1),
            batch.decisions.sum(),
            (batch.segment_ids > 0).sum(),
            batch.by_sequence(batch.decisions).any(-1).sum(),
            torch.tensor(batch.input_ids.numel(), device=batch.input_ids.device),
        )


def make_stage(name: str, training: Any) -> Stage:
    """The stage defined in ``wmtp_ds/stages/<name>.py``: its subclass of :class:`Stage`."""
    module = importlib.import_module(f"wmtp_ds.stages.{name}")
    classes = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Stage) and kind.__module__ == module.__name__
    ]
    assert len(classes) == 1, f"{module.__name__} must define exactly one Stage, not {len(classes)}"
    return classes[0](training)


class StageModel(nn.Module):
    """The policy, its value head if the stage has one, and the stage's loss, as one module for the engine."""

    def __init__(self, policy: MTPLlamaForCausalLM, value_head: ValueHead | None, stage: Stage):
        super().__init__()
        self.policy = policy
        self.value_head = value_head
        self.stage = stage

    @property
    def n(self) -> int:
        """Number of prediction heads."""
        return self.policy.n_future_tokens

    def forward(
        self, batch: Batch, totals: Totals | None = None, reference_BS: Tensor | None = None, mode: str = "loss"
    ) -> Any:
        """The stage's loss of a micro-batch; or its values ``[B, S, 1]``, its evaluation, its look, by ``mode``."""
        if mode == "values":
            return self.values(self.trunk(batch))
        if mode == "evaluate":
            return self.evaluate(batch)
        if mode == "look":
            return self.stage.look(self, batch, reference_BS)
        assert totals is not None
        output = self.stage.loss(self, batch, totals, reference_BS)
        # A plain tuple: DeepSpeed's hooks look for tensors in tuples and dicts, not in classes of ours.
        return output.loss, output.shares, output.moments

    def trunk(self, batch: Batch) -> Tensor:
        """The trunk's output ``[B, S, D]``; without gradient where the stage does not train the policy."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage.trains_policy):
            return self.policy.trunk(batch.input_ids, batch.packing)

    def head_states(self, trunk_BSD: Tensor, batch: Batch) -> Tensor:
        """What the unembedding reads, ``[n, B, S, D]``."""
        states: Tensor = self.policy.head_states(trunk_BSD, batch.packing)
        return states

    def values(self, trunk_BSD: Tensor) -> Tensor:
        """``V`` after the activation, ``[B, S, 1]`` float32."""
        assert self.value_head is not None, "this stage has no value head"
        values: Tensor = self.value_head(trunk_BSD)
        return values

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over a validation batch, without gradient; see ``evaluation.py`` for what becomes of them."""
        trunk_BSD = self.trunk(batch)
        sums: dict[str, Tensor] = {}
        if self.stage.trains_policy:
            # Validation loss is the policy's on correct solutions, whatever it trains on.
            targets_nBS = batch_targets(batch, self.n)
            targets_nBS = targets_nBS.masked_fill(~batch.by_row(batch.correct[:, None])[None], IGNORE_INDEX)
            count = int(target_counts(batch.host, self.n).sum())
            ce_nBS = self._unembed(self.head_states(trunk_BSD, batch), targets_nBS, count)
            sums["ce_n"] = ce_nBS.double().sum(-1)
            sums["targets_n"] = (targets_nBS != IGNORE_INDEX).sum((1, 2)).double()
        if self.value_head is not None:
            values_BS = self.values(trunk_BSD).squeeze(-1)
            sums["value_loss"] = value_errors(self.stage.training, values_BS, batch).double().sum()
            sums["decisions"] = batch.decisions.sum().double()
            sums["values_BS"] = values_BS
        return sums

    def _unembed(self, hidden_nBSD: Tensor, targets_nBS: Tensor, count: int) -> Tensor:
        losses: Tensor = self.policy.lm_head(
            hidden_nBSD.flatten(0, -2),
            loss=partial(reference_cross_entropy, targets_N=targets_nBS.reshape(-1), count=count),
        )
        return losses.view(self.n, -1)

    def weighted_cross_entropy(
        self, trunk_BSD: Tensor, batch: Batch, weights: Tensor | TDWeights, totals: Totals
    ) -> Output:
        """``(1/n) Σ_k (1/M_k) Σ w_{i+k−1}·CE_{i,k}``: the policy loss with one weight for each decision.

        Args:
            trunk_BSD: the trunk's output.
            batch: the micro-batch.
            weights: the weight of each decision, ``[B, S]``, 0 elsewhere; or what TD weights are made of, sequence by
                sequence (`Batch.by_sequence`). No gradient flows to either.
            totals: counts over the global batch.

        Returns:
            The loss, each head's loss, and the statistics of the weights (and of the TD errors).
        """
        scales_n = head_scales(totals)
        found: Statistics | None = None
        if batch.packing is not None:
            weights, found = _weights_of_packed(batch, weights)
        result: WeightedLoss = self.policy.lm_head(
            self.head_states(trunk_BSD, batch),
            loss=partial(
                td_weighted_linear_cross_entropy,
                targets_nBS=batch_targets(batch, self.n),
                weights=weights,
                scales_n=scales_n,
                counts_nB=(batch_targets(batch.host, self.n) != IGNORE_INDEX).sum(-1),
            ),
        )
        found = found or result.statistics
        shares = head_shares(scales_n, result.losses_n)
        shares["weight/entropy"] = found.entropy[0] / totals.sequences.clamp(min=1)
        quantities = {"weight": found.weights} if found.td is None else {"weight": found.weights, "td": found.td}
        return Output(result.loss, shares, quantities)


def batch_targets(batch: Batch, n: int) -> Tensor:
    """Targets of all heads, ``[n, B, S]``."""
    return mtp_targets(batch.input_ids, batch.supervised, batch.segment_ids, n)


def target_counts(batch: Batch, n: int) -> Tensor:
    """How many targets each head has in each sequence: int64 ``[n, G]``. Of ``batch.host``, known to the host."""
    supervised_nBS = batch_targets(batch, n) != IGNORE_INDEX
    return torch.stack([batch.by_sequence(supervised_BS).sum(-1) for supervised_BS in supervised_nBS])


def _weights_of_packed(batch: Batch, weights: Tensor | TDWeights) -> tuple[Tensor, Statistics]:
    """The weight of each decision, ``[B, S]``, and statistics, of rows that hold several sequences each."""
    decisions_GL = batch.by_sequence(batch.decisions)
    if isinstance(weights, Tensor):
        return weights, decision_statistics(batch.by_sequence(weights), decisions_GL)
    td_GL, weights_GL = decision_weights(weights)
    return batch.by_row(weights_GL), decision_statistics(weights_GL, decisions_GL, td_GL)


def head_scales(totals: Totals) -> Tensor:
    """``1/(n·M_k)``, 0 for a head without targets: ``[n]`` float32."""
    n = totals.targets_n.numel()
    return torch.where(totals.targets_n > 0, 1.0 / (n * totals.targets_n.clamp(min=1)), 0.0).float()


def head_shares(scales_n: Tensor, losses_n: Tensor) -> dict[str, Tensor]:
    """This micro-batch's share of each head's loss, ``(1/M_k) Σ w·CE``, by name."""
    shares_n = len(scales_n) * scales_n * losses_n
    return {f"train/loss_head_{k}": share for k, share in enumerate(shares_n, start=1)}


def value_errors(training: Any, values_BS: Tensor, batch: Batch) -> Tensor:
    """The value loss of each decision by sequence, ``[G, L]``, 0 elsewhere: mse, huber or mae against the target."""
    values_GL, decisions_GL = batch.by_sequence(values_BS), batch.by_sequence(batch.decisions)
    if training.value_target == "return":
        targets_GL = discounted_returns(decisions_GL, batch.rewards, training.gamma)
    else:
        fixed_GL1 = values_GL.detach()[..., None]
        gae_GL = compute_gae(fixed_GL1, batch.rewards, training.gamma, training.gae_lambda, decisions_GL)
        targets_GL = values_GL.detach() + gae_GL
    losses: dict[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "huber": F.huber_loss, "mae": F.l1_loss}
    errors_GL = losses[training.loss_type](values_GL, targets_GL, reduction="none")
    return torch.where(decisions_GL, errors_GL, 0.0)


def value_loss(training: Any, values_BS: Tensor, batch: Batch, totals: Totals) -> Output:
    """The mean value loss over the global batch's decisions: this micro-batch's share."""
    loss = value_errors(training, values_BS, batch).sum() / totals.decisions.clamp(min=1).to(values_BS.dtype)
    return Output(loss, {"train/value_loss": loss.detach()}, {"value": moments(values_BS, batch.decisions)})
