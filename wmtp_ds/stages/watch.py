"""What a stage weighs, found by watching it compute its loss: no stage has to say it twice."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from wmtp_ds.data.batches import Batch
from wmtp_ds.weighting.td import compute_td_errors
from wmtp_kernels import TDWeights, decision_weights

if TYPE_CHECKING:
    from wmtp_ds.stages.base import Output, Stage, StageModel, Totals


class _Watched:
    """A model that notes the values that a stage asks it for, and the weights that it is given."""

    def __init__(self, model: StageModel, seen: dict[str, Tensor]):
        self._model, self._seen = model, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def values(self, trunk_BSD: Tensor) -> Tensor:
        values_BS1 = self._model.values(trunk_BSD)
        self._seen["value"] = values_BS1.detach().squeeze(-1)
        return values_BS1

    def weighted_cross_entropy(
        self, trunk_BSD: Tensor, batch: Batch, weights: Tensor | TDWeights, totals: Totals
    ) -> Output:
        if isinstance(weights, TDWeights):
            td_GL, weights_GL = decision_weights(weights)
            self._seen["td"], self._seen["weight"] = batch.by_row(td_GL), batch.by_row(weights_GL)
        else:
            self._seen["weight"] = weights
        return self._model.weighted_cross_entropy(trunk_BSD, batch, weights, totals)


def watch(stage: Stage, model: StageModel, batch: Batch, reference_BS: Tensor | None) -> dict[str, Tensor]:
    """The columns ``weight``, ``value`` and ``td``, as far as the stage has them; see `Stage.look`."""
    seen: dict[str, Tensor] = {}
    totals = stage.counts(batch, model.n)
    if stage.needs_window:
        totals = replace(totals, standardisation=stage.standardise([model.values(model.trunk(batch))], [batch]))
    stage.loss(_Watched(model, seen), batch, totals, reference_BS)  # type: ignore[arg-type]
    if "value" in seen and "td" not in seen:
        values_GL1 = batch.by_sequence(seen["value"])[..., None]
        decisions_GL = batch.by_sequence(batch.decisions)
        td_GL = compute_td_errors(values_GL1, batch.rewards, stage.training.gamma, decisions_GL)
        seen["td"] = batch.by_row(td_GL)
    return seen
