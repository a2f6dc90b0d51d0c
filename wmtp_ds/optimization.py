"""Parameter groups and learning-rate schedules."""

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from torch import nn


def param_groups(
    module: nn.Module, *, learning_rate: float, value_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters: policy and value head, with decay for matrices and without for vectors.

    Norms and biases are not decayed, as is customary. Empty groups are left out.

    Args:
        module: a ``StageModel``; parameters of its ``value_head`` take ``value_lr``.
        learning_rate: of everything else.
        value_lr: of the value head.
        weight_decay: decoupled decay of matrices.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            groups.setdefault((name.startswith("value_head."), is_matrix), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": value_lr if is_value else learning_rate,
            "weight_decay": weight_decay if is_matrix else 0.0,
        }
        for (is_value, is_matrix), parameters in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def lr_schedule(name: str, total_steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """Optimizer step (from 0) -> factor of the learning rate.

    Warm-up is linear over ``⌈warmup_ratio · total_steps⌉`` steps and starts above zero, so that no step is wasted.
    After it: "constant" stays at 1, "linear" and "cosine" fall to 0 at ``total_steps``.

    Raises:
        ValueError: for another name.
    """
    # In decimal arithmetic, as it is written in the config: 0.07 of 100 is 7, not 8.
    warmup = math.ceil(Decimal(repr(warmup_ratio)) * total_steps)

    def decay(progress: float) -> float:
        if name == "constant":
            return 1.0
        if name == "linear":
            return 1.0 - progress
        return 0.5 * (1.0 + math.cos(math.pi * progress))

    if name not in ("constant", "linear", "cosine"):
        raise ValueError(f"scheduler must be constant, linear or cosine, not {name!r}")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return decay(min(1.0, (step - warmup) / max(1, total_steps - warmup)))

    return factor
