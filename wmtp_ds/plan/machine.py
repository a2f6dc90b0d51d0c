"""The machine that a plan is for, without torch: its GPUs as ``nvidia-smi`` tells them, its memory."""

import os
import shutil
import subprocess

import psutil

MIB = 2**20


def gpus() -> list[int]:
    """Bytes of each GPU that a run here would see; empty where there is none, or none can be asked."""
    try:
        found = [int(mebibytes) * MIB for mebibytes in ask_nvidia_smi("memory.total")]
    except ValueError:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return found[: len([name for name in visible.split(",") if name.strip()])]


def ask_nvidia_smi(field: str) -> list[str]:
    """What ``nvidia-smi`` says of each GPU, without units; empty where there is none, or it does not answer.

    Args:
        field: of ``nvidia-smi --help-query-gpu``.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


def memory() -> int:
    """Bytes of this machine's memory."""
    return int(psutil.virtual_memory().total)
