"""Other libraries' losses. Each is an extra: where it is missing, or cannot run, its arm is skipped with the reason.

Where a loss has no row weights it is measured twice: as it is, a mean, and with ``reduction="none"`` times the weights.
"""

import contextlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .arms import Arm, Step, UnavailableError, step_of_loss, step_of_rows
from .inputs import Inputs
from .oracle import IGNORE_INDEX

_INSTALL = "install it with: pip install 'wmtp-ds[bench]'"


def _require(module: str, name: str, advice: str = _INSTALL) -> None:
    if importlib.util.find_spec(module) is None:
        raise UnavailableError(f"{name} is not installed; {advice}")


def _require_triton_device(device: torch.device, name: str) -> None:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnavailableError(f"{name} needs a GPU")


def _step(reduction: str, loss_of: Callable[[Inputs], Tensor]) -> Step:
    return step_of_loss(loss_of) if reduction == "mean" else step_of_rows(loss_of)


# --- Liger ---


def _make_liger(reduction: str, accumulation: torch.dtype | None, device: torch.device, dtype: torch.dtype) -> Step:
    _require("liger_kernel", "Liger")
    _require_triton_device(device, "Liger")
    if accumulation == dtype:
        raise UnavailableError(f"accumulates in {str(dtype).removeprefix('torch.')} already: the same as the default")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss_of(inputs: Inputs) -> Tensor:
        loss: Tensor = liger_fused_linear_cross_entropy(
            inputs.hidden_rows,
            inputs.weight_VD,
            inputs.target_rows,
            ignore_index=IGNORE_INDEX,
            reduction=reduction,
            accum_dtype=accumulation,
        )
        return loss

    return _step(reduction, loss_of)


# --- Apple's cut cross-entropy ---


def _cut_options(loss: Callable[..., Any], exact: bool) -> dict[str, Any]:
    """Exact means: no gradient is filtered out, and sums are compensated where the version can do that."""
    if not exact:
        return {"impl": "cce"}
    if "accum_e_fp32" in inspect.signature(loss).parameters:
        return {"impl": "cce_exact"}
    return {"impl": "cce", "filter_eps": None}


def _make_cut(exact: bool, device: torch.device, dtype: torch.dtype) -> Step:
    _require("cut_cross_entropy", "cut cross-entropy")
    _require_triton_device(device, "cut cross-entropy")
    if dtype not in (torch.bfloat16, torch.float16):
        raise UnavailableError("cut cross-entropy has gradients in bfloat16 and float16 alone")
    from cut_cross_entropy import linear_cross_entropy

    options = _cut_options(linear_cross_entropy, exact)

    def loss_of(inputs: Inputs) -> Tensor:
        losses_N: Tensor = linear_cross_entropy(
            inputs.hidden_rows,
            inputs.weight_VD,
            inputs.target_rows,
            ignore_index=IGNORE_INDEX,
            reduction="none",
            **options,
        )
        return losses_N

    return step_of_rows(loss_of)


# --- DeepSpeed ---


def _import_deepspeed() -> None:
    _require("deepspeed", "DeepSpeed", "install it with: pip install deepspeed")
    # It logs to stdout, from the first import on, where only results may go.
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed.comm  # noqa: F401


def _make_deepspeed(reduction: str, device: torch.device, dtype: torch.dtype) -> Step:
    _import_deepspeed()
    try:
        from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy
    except ImportError:
        raise UnavailableError("this DeepSpeed has no linear cross-entropy") from None

    def loss_of(inputs: Inputs) -> Tensor:
        loss: Tensor = vocab_parallel_linear_cross_entropy(
            inputs.hidden_rows, inputs.weight_VD, inputs.target_rows, ignore_index=IGNORE_INDEX, reduction=reduction
        )
        return loss

    return _step(reduction, loss_of)


class _Head(torch.nn.Module):
    """The unembedding as DeepSpeed's tiled loss wants it: a module."""

    def __init__(self, weight_VD: Tensor) -> None:
        super().__init__()
        self.weight_VD = weight_VD


def _tile_loss(head: _Head, hidden_RD: Tensor, targets_R: Tensor, coefficients_R: Tensor) -> Tensor:
    logits_RV = torch.nn.functional.linear(hidden_RD, head.weight_VD)
    if logits_RV.dtype in (torch.bfloat16, torch.float16):
        logits_RV = logits_RV.float()
    losses_R = torch.nn.functional.cross_entropy(logits_RV, targets_R, reduction="none", ignore_index=IGNORE_INDEX)
    return (losses_R * coefficients_R).sum()


def _make_deepspeed_tiled(device: torch.device, dtype: torch.dtype) -> Step:
    _import_deepspeed()
    try:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss
    except ImportError:
        raise UnavailableError("this DeepSpeed has no tiled loss") from None

    def loss_of(inputs: Inputs) -> Tensor:
        # Tiles of 1 GiB of float32 logits, as is usual with it, but two at least. The weights travel as its mask,
        # which is cut like the targets.
        tiles = max(2, -(-4 * inputs.sizes.rows * inputs.sizes.vocabulary // 2**30))
        loss: Tensor = TiledFusedLogitsLoss.apply(
            _tile_loss,
            _Head(inputs.weight_VD),
            inputs.hidden_rows[None],
            inputs.target_rows[None],
            inputs.coefficient_rows[None],
            tiles,
            [inputs.weight_VD],
            "sum",
        )
        return loss

    return step_of_loss(loss_of)


PEER_ARMS = (
    Arm("liger-none", "Liger, none x weights", "weighted", partial(_make_liger, "none", None)),
    Arm(
        "liger-none-float32",
        "Liger, none x weights, float32 sums",
        "weighted",
        partial(_make_liger, "none", torch.float32),
    ),
    Arm("liger-mean", "Liger, mean", "mean", partial(_make_liger, "mean", None)),
    Arm("liger-mean-float32", "Liger, mean, float32 sums", "mean", partial(_make_liger, "mean", torch.float32)),
    Arm("cut", "cut cross-entropy, none x weights", "weighted", partial(_make_cut, False)),
    Arm("cut-exact", "cut cross-entropy, exact, none x weights", "weighted", partial(_make_cut, True)),
    Arm(
        "deepspeed-none", "DeepSpeed linear cross-entropy, none x weights", "weighted", partial(_make_deepspeed, "none")
    ),
    Arm("deepspeed-mean", "DeepSpeed linear cross-entropy, mean", "mean", partial(_make_deepspeed, "mean")),
    Arm("deepspeed-tiled", "DeepSpeed tiled logits loss, weights inside", "weighted", _make_deepspeed_tiled),
)
