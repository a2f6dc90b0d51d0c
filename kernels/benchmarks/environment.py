"""Where and with what something was measured."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from wmtp_kernels import backend

_LIBRARIES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "deepspeed")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, devices and threads, for the results; no name of a machine or a user."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "backend": backend(device),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": {name: _version(name) for name in _LIBRARIES},
        "device": "CPU",
        "cuda": None,
    }
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found
