"""The machine that a plan is for, without torch: its GPUs as ``nvidia-smi`` tells them, its memory."""

import os
import shutil
import subprocess

import psutil

MIB = 2**20


def gpus() -> list[int]:
    """Bytes of each GPU that a run here would see; empty where there is none, or none can be asked."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        found = [int(line) * MIB for line in done.stdout.split()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return found[: len([name for name in visible.split(",") if name.strip()])]


def memory() -> int:
    """Bytes of this machine's memory."""
    return int(psutil.virtual_memory().total)
