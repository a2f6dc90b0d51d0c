"""The arm that the kernels are compared with: the same model, with the float32 logits of all heads in memory.

Plain torch, as one would write it first: the unembedding multiplies every head's hidden states at every position,
``F.cross_entropy`` takes the losses, and autograd makes the gradients. :func:`install` puts these functions in the
places of the kernels', under the same names and signatures; everything else of the step stays what it is.

A stage that does not train the policy has no use for logits; its plain form runs the whole model's forward pass all the
same, as calling the model does, and holds the logits until the loss is there.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wmtp_ds.stages.base import StageModel
from wmtp_kernels import IGNORE_INDEX, TDWeights, WeightedLoss, decision_weights
from wmtp_kernels.rho1 import excess_loss, softmax_weights, topk_weights
from wmtp_kernels.statistics import decision_statistics
from wmtp_kernels.td_linear_cross_entropy import per_head


def _cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = F.linear(hidden_ND, weight_VD).float()
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="none")


def _head_losses(hidden_nBSD: Tensor, weight_VD: Tensor, targets_nBS: Tensor) -> Tensor:
    return _cross_entropy(hidden_nBSD.flatten(0, -2), weight_VD, targets_nBS.flatten()).view_as(targets_nBS)


def _scaled(losses_n: Tensor, scales_n: Tensor | None) -> Tensor:
    return losses_n.sum() if scales_n is None else (scales_n * losses_n).sum()


@torch.no_grad()
def reference_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, **_: Any) -> Tensor:
    """As the kernel of that name."""
    return _cross_entropy(hidden_ND, weight_VD, targets_N)


def td_weighted_linear_cross_entropy(
    hidden_nBSD: Tensor,
    weight_VD: Tensor,
    targets_nBS: Tensor,
    weights: TDWeights | Tensor,
    *,
    scales_n: Tensor | None = None,
    **_: Any,
) -> WeightedLoss:
    """As the kernel of that name."""
    td_BS, weights_BS = (None, weights.detach()) if isinstance(weights, Tensor) else decision_weights(weights)
    ce_nBS = _head_losses(hidden_nBSD, weight_VD, targets_nBS)
    losses_n = (per_head(weights_BS, len(ce_nBS)) * ce_nBS).sum((1, 2))
    statistics = decision_statistics(weights_BS, targets_nBS[0] != IGNORE_INDEX, td_BS)
    return WeightedLoss(_scaled(losses_n, scales_n), losses_n.detach(), statistics, weights_BS, td_BS)


def rho1_linear_cross_entropy(
    hidden_nBSD: Tensor,
    weight_VD: Tensor,
    targets_nBS: Tensor,
    reference_nBS: Tensor,
    *,
    k_percent: float = 1.0,
    excess: str = "signed",
    weighting: str = "topk",
    scope: str = "batch",
    temperature: float = 1.0,
    scales_n: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernel of that name: one forward pass is enough where all logits are kept."""
    ce_nBS, mask_nBS = _head_losses(hidden_nBSD, weight_VD, targets_nBS), targets_nBS != IGNORE_INDEX
    score_nBS = excess_loss(ce_nBS.detach(), reference_nBS, excess)
    if weighting == "topk":
        weights_nBS = topk_weights(score_nBS, mask_nBS, k_percent, scope)
    else:
        weights_nBS = softmax_weights(score_nBS, mask_nBS, temperature)
    return _scaled((weights_nBS * ce_nBS).sum((1, 2)), scales_n), ce_nBS.detach(), weights_nBS


_REPLACEMENTS = {
    function.__name__: function
    for function in (reference_cross_entropy, td_weighted_linear_cross_entropy, rho1_linear_cross_entropy)
}


def install(model: StageModel) -> None:
    """Let everything in this process compute its losses from materialised logits."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("wmtp_ds.stages.", "wmtp_ds.models.")):
            for function in _REPLACEMENTS.keys() & vars(module).keys():
                setattr(module, function, _REPLACEMENTS[function])
    if not model.stage.trains_policy:
        _hold_logits(model)


def _hold_logits(model: StageModel) -> None:
    trunk = model.trunk
    held: list[Tensor] = []

    def with_logits(batch: Any) -> Tensor:
        trunk_BSD = trunk(batch)
        with torch.no_grad():
            held.append(model.policy.lm_head(model.policy.head_states(trunk_BSD)).float())
        return trunk_BSD

    model.__dict__["trunk"] = with_logits
    model.register_forward_hook(lambda *_: held.clear())
