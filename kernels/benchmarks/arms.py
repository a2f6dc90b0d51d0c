"""What is compared: the floor, plain torch and torch's own chunked loss here; ours and other libraries' beside.

An arm takes a set of inputs and does one step: the loss forward and, where it trains, backward into ``.grad`` of the
hidden states and of the unembedding. All heads are stacked as rows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import Inputs
from .oracle import IGNORE_INDEX


class UnavailableError(Exception):
    """The arm cannot run here; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What a step computes besides the gradients; None where it computes no such thing.

    Attributes:
        loss: scalar.
        losses_N: cross-entropy of each row.
        weights_nBS: the weights that it chose.
    """

    loss: Tensor | None = None
    losses_N: Tensor | None = None
    weights_nBS: Tensor | None = None


Step = Callable[[Inputs], Outcome]


@dataclass(frozen=True)
class Arm:
    """One way to compute a loss.

    Attributes:
        name: for ``--arms``.
        title: what it is, in a few words.
        task: what it computes, and so what it is checked against: "weighted" (row weights), "mean" (none),
            "products" (the floor), "losses" (no gradient), "rho1-sequence" or "rho1-batch".
        make: the step on a device and in a dtype; raises :class:`UnavailableError` where it cannot run.
        ours: whether it is one of ``wmtp_kernels`` (a failure there is a bug, not a missing extra).
        prepare: what it needs of a set of inputs before the clock runs.
    """

    name: str
    title: str
    task: str
    make: Callable[[torch.device, torch.dtype], Step]
    ours: bool = False
    prepare: Callable[[Inputs], Any] | None = None

    @property
    def trains(self) -> bool:
        """Whether it forms gradients."""
        return self.task != "losses"


FLOOR, PLAIN = "floor", "torch"


def step_of_loss(loss_of: Callable[[Inputs], Tensor]) -> Step:
    """A step that computes a scalar and goes backward from it."""

    def step(inputs: Inputs) -> Outcome:
        loss = loss_of(inputs)
        loss.backward()
        return Outcome(loss.detach())

    return step


def step_of_rows(losses_of: Callable[[Inputs], Tensor]) -> Step:
    """A step that computes each row's cross-entropy with gradient, and multiplies by the weights afterwards."""

    def step(inputs: Inputs) -> Outcome:
        losses_N = losses_of(inputs)
        loss = (losses_N.float() * inputs.coefficient_rows).sum()
        loss.backward()
        return Outcome(loss.detach(), losses_N.detach())

    return step


def always(step: Step) -> Callable[[torch.device, torch.dtype], Step]:
    """An arm that runs anywhere."""
    return lambda device, dtype: step


# Rows whose logits the floor holds at once; what it multiplies for the gradients is ready before.
_FLOOR_ROWS = {"cuda": 8192, "cpu": 1024}


def _products(inputs: Inputs) -> Outcome:
    hidden_ND, weight_VD = inputs.hidden_rows.detach(), inputs.weight_VD.detach()
    gradient_NV = inputs.logit_gradient
    rows = min(_FLOOR_ROWS[hidden_ND.device.type], len(hidden_ND))
    logits_RV = gradient_NV.new_empty(rows, len(weight_VD))
    for hidden_RD in hidden_ND.split(rows):
        torch.mm(hidden_RD, weight_VD.T, out=logits_RV[: len(hidden_RD)])
    inputs.hidden_nBSD.grad = (gradient_NV @ weight_VD).view_as(inputs.hidden_nBSD)
    inputs.weight_VD.grad = gradient_NV.T @ hidden_ND
    return Outcome()


def _plain_losses(inputs: Inputs) -> Tensor:
    logits_NV = F.linear(inputs.hidden_rows, inputs.weight_VD)
    if logits_NV.dtype in (torch.bfloat16, torch.float16):
        logits_NV = logits_NV.float()
    return F.cross_entropy(logits_NV, inputs.target_rows, reduction="none", ignore_index=IGNORE_INDEX)


def _make_chunked(reduction: str) -> Callable[[torch.device, torch.dtype], Step]:
    def make(device: torch.device, dtype: torch.dtype) -> Step:
        if not (hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")):
            raise UnavailableError(f"torch {torch.__version__} has no chunked linear_cross_entropy")
        options = torch.nn.LinearCrossEntropyOptions()

        def loss_of(inputs: Inputs) -> Tensor:
            return F.linear_cross_entropy(
                inputs.hidden_rows, inputs.weight_VD, inputs.target_rows, reduction=reduction, options=options
            )

        return step_of_loss(loss_of) if reduction == "mean" else step_of_rows(loss_of)

    return make


TORCH_ARMS = (
    Arm(
        FLOOR,
        "F: the three matrix products alone",
        "products",
        always(_products),
        prepare=lambda inputs: inputs.logit_gradient,
    ),
    Arm(PLAIN, "plain torch, float32 logits materialised", "weighted", always(step_of_rows(_plain_losses))),
    Arm("torch-chunked-mean", "torch linear_cross_entropy, mean", "mean", _make_chunked("mean")),
    Arm("torch-chunked-none", "torch linear_cross_entropy, none x weights", "weighted", _make_chunked("none")),
)


def all_arms() -> tuple[Arm, ...]:
    """Every arm, in the order of the table."""
    from .ours import OUR_ARMS
    from .peers import PEER_ARMS

    return (*TORCH_ARMS, *OUR_ARMS, *PEER_ARMS)


def choose(names: Iterable[str] | None) -> tuple[Arm, ...]:
    """The arms of those names, with the floor and plain torch; all of them if None.

    Raises:
        KeyError: with the first name that is none.
    """
    arms = {arm.name: arm for arm in all_arms()}
    if names is None:
        return tuple(arms.values())
    wanted = {FLOOR, PLAIN}
    for name in names:
        if name not in arms:
            raise KeyError(name)
        wanted.add(name)
    return tuple(arm for arm in arms.values() if arm.name in wanted)
