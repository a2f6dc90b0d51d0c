"""Which implementation runs: Triton on a GPU, torch elsewhere; ``WMTP_KERNELS`` forces one."""

import functools
import importlib.util
import logging
import os
from types import ModuleType
from typing import Literal

import torch

Backend = Literal["torch", "triton"]

logger = logging.getLogger("wmtp_kernels")


def backend(device: torch.device | str, dtype: torch.dtype = torch.float32) -> Backend:
    """What computes on this device: chosen once for each kind of device, and logged.

    ``WMTP_KERNELS=torch`` or ``WMTP_KERNELS=triton`` in the environment forces one. The kernels compute in float32:
    float64 is torch's in any case.

    Raises:
        ValueError: if ``WMTP_KERNELS`` is something else, or asks for Triton where it cannot run.
    """
    chosen = _choose(torch.device(device).type, os.environ.get("WMTP_KERNELS", ""))
    return "torch" if dtype == torch.float64 else chosen


@functools.cache
def _choose(device: str, wanted: str) -> Backend:
    chosen, reason = _decide(device, wanted)
    logger.info("loss kernels on %s: %s (%s)", device, chosen, reason)
    return chosen


def _decide(device: str, wanted: str) -> tuple[Backend, str]:
    if wanted not in ("", "torch", "triton"):
        raise ValueError(f"WMTP_KERNELS={wanted!r}: must be 'torch' or 'triton', or unset")
    if wanted == "torch":
        return "torch", "WMTP_KERNELS"
    if importlib.util.find_spec("triton") is None:
        if wanted:
            raise ValueError("WMTP_KERNELS=triton, but triton is not installed: pip install triton, or unset it")
        return "torch", "triton is not installed"
    if device == "cuda":
        return "triton", "WMTP_KERNELS" if wanted else "the default on GPUs"
    if not wanted:
        return "torch", "there is no GPU"
    if device != "cpu" or not _interpreted():
        raise ValueError(
            f"WMTP_KERNELS=triton, but Triton does not run on device {device!r}: unset it, or set TRITON_INTERPRET=1 "
            "as well to have Triton's interpreter run the kernels on a CPU, slowly"
        )
    return "triton", "WMTP_KERNELS, in Triton's interpreter"


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def row_operations(hidden: torch.Tensor) -> ModuleType:
    """:mod:`wmtp_kernels.rows_torch` or :mod:`wmtp_kernels.rows_triton`: the same functions, by device and dtype."""
    return importlib.import_module(f"wmtp_kernels.rows_{backend(hidden.device, hidden.dtype)}")
