"""Validation during training: unweighted loss on correct solutions, and how well values tell right from wrong."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wmtp_ds import distributed
from wmtp_ds.data.batches import Batch
from wmtp_ds.engine import Engine


def evaluate(engine: Engine, batches: Sequence[Batch], device: torch.device) -> dict[str, float]:
    """Run a validation set through the engine; every rank has as many batches and gets the same numbers.

    Returns:
        ``val/loss``: the MTP cross-entropy in nats, ``(1/n) Σ_k (1/M_k) Σ CE`` over correct solutions; for a stage that
        trains the value head alone it is ``val/value_loss``. ``val/loss_head_k`` of each head. With a value head
        ``val/value_loss`` (mean over decisions) and, if there are solutions of both kinds, ``val/auc``: the area under
        the ROC curve of the value at a solution's last decision, 0.5 for a coin and 1 for a perfect critic.
    """
    sums: dict[str, Tensor] = {}
    scored: list[Tensor] = []
    with engine.without_gradient(evaluate=True):
        for batch in batches:
            batch = batch.to(device)
            found = engine(batch, mode="evaluate")
            values_BS = found.pop("values_BS", None)
            if values_BS is not None:
                scored.append(_final_values(values_BS, batch))
            for name, value in found.items():
                sums[name] = sums[name] + value if name in sums else value
    sums = {name: distributed.sum_over_ranks(value).cpu() for name, value in sorted(sums.items())}
    metrics: dict[str, float] = {}
    if scored:
        metrics["val/value_loss"] = (sums["value_loss"] / sums["decisions"].clamp(min=1)).item()
        metrics["val/loss"] = metrics["val/value_loss"]
        auc = area_under_roc(distributed.gather_arrays(torch.cat(scored)))
        if auc is not None:
            metrics["val/auc"] = auc
    if "ce_n" in sums:
        losses_n = sums["ce_n"] / sums["targets_n"].clamp(min=1)
        metrics |= {f"val/loss_head_{k}": loss for k, loss in enumerate(losses_n.tolist(), start=1)}
        metrics["val/loss"] = losses_n.mean().item()
    return metrics


def _final_values(values_BS: Tensor, batch: Batch) -> Tensor:
    """``[b, 2]``: value at the last decision and is_correct, of the sequences that have decisions."""
    values_GL, decisions_GL = batch.by_sequence(values_BS), batch.by_sequence(batch.decisions)
    positions_L = torch.arange(values_GL.shape[1], device=values_GL.device)
    last_G = torch.where(decisions_GL, positions_L, -1).amax(-1)
    final_G = values_GL.gather(1, last_G.clamp(min=0)[:, None]).squeeze(1)
    return torch.stack([final_G, batch.correct.to(final_G.dtype)], 1)[last_G >= 0].double().cpu()


def area_under_roc(scores_and_labels: Tensor) -> float | None:
    """AUC of scores at telling labels of 1 from those of 0, ``[N, 2]``; None if all are alike or not finite.

    The share of pairs, one of each label, whose score is higher for the label 1; half of those that are level.
    """
    correct = scores_and_labels[:, 1] >= 0.5
    if correct.all() or not correct.any() or not scores_and_labels.isfinite().all():
        return None
    high, low = scores_and_labels[correct, 0], scores_and_labels[~correct, 0].sort().values
    below, not_above = torch.searchsorted(low, high), torch.searchsorted(low, high, right=True)
    return (below + not_above).double().mean().item() / (2 * len(low))
