"""The losses of ``wmtp_kernels``, in the shapes in which the training stages call them."""

from collections.abc import Callable

import torch

from wmtp_kernels import (
    TDWeights,
    reference_cross_entropy,
    rho1_linear_cross_entropy,
    td_weighted_linear_cross_entropy,
    weighted_linear_cross_entropy,
)

from .arms import Arm, Outcome, Step, always
from .inputs import BETA, WEIGHT_MAX, WEIGHT_MIN, Inputs


def _weighted(inputs: Inputs) -> Outcome:
    loss, losses_N = weighted_linear_cross_entropy(
        inputs.hidden_rows, inputs.weight_VD, inputs.target_rows, inputs.weight_rows, scales_N=inputs.scale_rows
    )
    loss.backward()
    return Outcome(loss.detach(), losses_N)


def _td(inputs: Inputs) -> Outcome:
    weights = TDWeights(
        inputs.values_BS,
        inputs.rewards_B,
        inputs.decisions_BS,
        beta=BETA,
        min_weight=WEIGHT_MIN,
        max_weight=WEIGHT_MAX,
    )
    found = td_weighted_linear_cross_entropy(
        inputs.hidden_nBSD, inputs.weight_VD, inputs.targets_nBS, weights, scales_n=inputs.scales_n
    )
    found.loss.backward()
    return Outcome(found.loss.detach())


def _rho1(scope: str) -> Callable[[torch.device, torch.dtype], Step]:
    def step(inputs: Inputs) -> Outcome:
        loss, losses_nBS, weights_nBS = rho1_linear_cross_entropy(
            inputs.hidden_nBSD,
            inputs.weight_VD,
            inputs.targets_nBS,
            inputs.reference_nBS,
            k_percent=inputs.k_percent,
            scope=scope,
            scales_n=inputs.selected_scales(scope),
        )
        loss.backward()
        return Outcome(loss.detach(), losses_nBS.reshape(-1), weights_nBS)

    return always(step)


def _reference(inputs: Inputs) -> Outcome:
    return Outcome(losses_N=reference_cross_entropy(inputs.hidden_rows, inputs.weight_VD, inputs.target_rows))


OUR_ARMS = (
    Arm("weighted", "ours, ready weights", "weighted", always(_weighted), ours=True),
    Arm("td", "ours, TD weights inside", "weighted", always(_td), ours=True),
    Arm("rho1-sequence", "ours, Rho-1, a group is a sequence", "rho1-sequence", _rho1("sequence"), ours=True),
    Arm("rho1-batch", "ours, Rho-1, a group is the batch", "rho1-batch", _rho1("batch"), ours=True),
    Arm("reference", "ours, losses alone (forward)", "losses", always(_reference), ours=True),
)
