"""Peak memory of a stretch of a process, beyond what it held when the stretch began."""

import ctypes
import gc
import resource
from pathlib import Path

import psutil
import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """What a step takes at its peak, beyond what is there between two steps.

    Between two steps there are weights, float32 masters, optimizer states, gradient buffers that are kept, and the
    program itself. On a GPU both are the allocator's count of bytes. On a CPU they are the process's resident memory
    and its high-water mark, which Linux lets a process reset; where it does not, it is the mark since the process began
    (``exact`` is 0 then).
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._at_rest = 0
        self.exact = True

    def start(self) -> None:
        """What is held now is what there is between two steps."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._at_rest = torch.cuda.memory_allocated(self._device)
            return
        _return_freed_memory()
        try:
            _CLEAR.write_text("5")  # resets the high-water mark (proc(5))
        except OSError:
            self.exact = False
        self._at_rest = psutil.Process().memory_info().rss

    def stop(self) -> dict[str, float]:
        """Bytes ``at_rest``, at the ``peak``, and ``extra``, their difference."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        elif self.exact:
            peak = _high_water_mark()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"at_rest": self._at_rest, "peak": peak, "extra": peak - self._at_rest, "exact": float(self.exact)}


def _high_water_mark() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _return_freed_memory() -> None:
    """Let the C library hand back what it keeps of freed memory, where it is one that can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
