"""Whether an arm computes what it should: its loss and gradients against float64, before it is timed."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import oracle
from .arms import Arm, Outcome, Step
from .inputs import Inputs

# Relative errors from which on an arm counts as wrong: far above what rounding does (16-bit logits of a peaked softmax
# make about 0.01), far below what a forgotten weight or a lost row does.
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class Errors:
    """Relative errors: of the loss and of the rows' losses, of the hidden states' gradient, of the unembedding's.

    A gradient's is the Frobenius norm of the difference over the norm of the truth. None where there is none.
    """

    loss: float | None
    grad_hidden: float | None = None
    grad_weight: float | None = None

    def largest(self) -> float:
        """NaN if any is."""
        return _largest(self.loss, self.grad_hidden, self.grad_weight)


def _largest(*errors: float | None) -> float:
    known = [error for error in errors if error is not None]
    return math.nan if any(math.isnan(error) for error in known) else max(known)


def _relative(found: Tensor | None, truth: Tensor) -> float:
    if found is None or found.shape != truth.shape:
        return math.inf
    difference = (found.double() - truth).norm()
    return (difference / truth.norm().clamp(min=1e-300)).item()


def _coefficients(task: str, inputs: Inputs, outcome: Outcome) -> Tensor:
    """``[N]`` float64: the weight times scale of each row that the arm's task means."""
    if task == "mean":
        supervised_N = inputs.target_rows != oracle.IGNORE_INDEX
        return supervised_N.double() / supervised_N.sum()
    if task.startswith("rho1"):
        assert outcome.weights_nBS is not None
        scales_n = inputs.selected_scales(task.removeprefix("rho1-"))
        return (outcome.weights_nBS * scales_n[:, None, None]).double().flatten()
    return inputs.weight_rows.double() * inputs.scale_rows.double()


def _selection_problem(task: str, inputs: Inputs, weights_nBS: Tensor | None, tolerance: float) -> str | None:
    """What is wrong with Rho-1's weights: they must be 0 or 1, the exact number, and the highest.

    An arm's cross-entropy is rounded, so at the threshold it may choose otherwise, within ``tolerance`` nats.
    """
    if weights_nBS is None or weights_nBS.shape != inputs.targets_nBS.shape:
        return "it returns no weights"
    losses_N = oracle.cross_entropy(inputs.hidden_rows.detach(), inputs.weight_VD.detach(), inputs.target_rows)
    excess_nBS = losses_N.view_as(inputs.targets_nBS) - inputs.reference_nBS
    groups = (len(inputs.targets_nBS), 1, -1) if task == "rho1-batch" else inputs.targets_nBS.shape
    supervised_nGM = (inputs.targets_nBS != oracle.IGNORE_INDEX).reshape(groups)
    excess_nGM, weights_nGM = excess_nBS.reshape(groups), weights_nBS.reshape(groups)
    if not bool(((weights_nGM == 0) | (weights_nGM == 1)).all()):
        return "its weights are not 0 or 1"
    chosen_nGM = weights_nGM == 1
    for excess_M, supervised_M, chosen_M in zip(
        excess_nGM.flatten(0, 1), supervised_nGM.flatten(0, 1), chosen_nGM.flatten(0, 1), strict=True
    ):
        expected = oracle.kept(int(supervised_M.sum()), inputs.k_percent)
        if bool((chosen_M & ~supervised_M).any()):
            return "it selects what has no target"
        if int(chosen_M.sum()) != expected:
            return f"it selects {int(chosen_M.sum())} targets of a group instead of {expected}"
        left_M = supervised_M & ~chosen_M
        if chosen_M.any() and left_M.any() and excess_M[left_M].max() > excess_M[chosen_M].min() + tolerance:
            return "it selects targets that are not the highest"
    return None


def check(arm: Arm, step: Step, inputs: Inputs) -> tuple[Errors, str | None]:
    """Run one step and compare.

    Args:
        arm: says what is to be computed.
        step: the arm's step.
        inputs: a small set; its gradients are left empty.

    Returns:
        The relative errors, and what is wrong with the arm, or None.
    """
    inputs.drop_gradients()
    outcome = step(inputs)
    limit = LIMITS[inputs.weight_VD.dtype]
    hidden_ND, weight_VD = inputs.hidden_rows.detach(), inputs.weight_VD.detach()
    grad_hidden, grad_weight = inputs.hidden_nBSD.grad, inputs.weight_VD.grad
    inputs.drop_gradients()
    if arm.task.startswith("rho1"):
        # A logit of about 10 is rounded to as many digits as its dtype has.
        tolerance = 40 * torch.finfo(weight_VD.dtype).eps
        problem = _selection_problem(arm.task, inputs, outcome.weights_nBS, tolerance)
        if problem is not None:
            return Errors(math.inf), problem
    of_losses = None
    if outcome.losses_N is not None:
        of_losses = _relative(outcome.losses_N, oracle.cross_entropy(hidden_ND, weight_VD, inputs.target_rows))
    if arm.task == "losses":
        errors = Errors(math.inf if of_losses is None else of_losses)
    else:
        truth = oracle.weighted_loss(hidden_ND, weight_VD, inputs.target_rows, _coefficients(arm.task, inputs, outcome))
        errors = Errors(
            None if arm.task == "products" else _largest(_relative(outcome.loss, truth.loss), of_losses),
            _relative(None if grad_hidden is None else grad_hidden.view_as(hidden_ND), truth.grad_hidden_ND),
            _relative(grad_weight, truth.grad_weight_VD),
        )
    if not errors.largest() <= limit:
        return errors, f"wrong result: relative error {errors.largest():.2g}, more than {limit:g}"
    return errors, None
