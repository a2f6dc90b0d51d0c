"""Where the kernels' tests run: with torch and with Triton's interpreter on the CPU, with Triton on a GPU.

Triton decides whether a kernel is interpreted when it is defined, and those of its own library when it is imported.
Where there is no GPU both are imported here as interpreted ones. The environment is left as it was: other tests and
the programs that they start see nothing of it.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_cases import Arm

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_GPU:
    # Without it torch's deterministic mode, which fills new memory with NaN, refuses products on GPUs.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _import_interpreted() -> None:
    """Import the kernels as interpreted ones, even if Triton was imported before."""
    compiled = ("wmtp_kernels.rows_triton", "wmtp_kernels.td_triton")
    for name in list(sys.modules):
        # The library in C++ stays; it can be loaded once.
        if name in compiled or (name.split(".")[0] == "triton" and not name.startswith("triton._C")):
            del sys.modules[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in (*compiled, "interpreter_probe"):
            importlib.import_module(name)


if HAS_TRITON and not HAS_GPU:
    _import_interpreted()


def _unusable_interpreter() -> str:
    """Why Triton's interpreter cannot run kernels here; empty if it can."""
    from interpreter_probe import probe
    from triton.runtime.errors import InterpreterError

    try:
        probe[(1,)](torch.zeros(1), 3)
    except InterpreterError as error:
        import numpy
        import triton

        return f"the interpreter of triton {triton.__version__} does not run with numpy {numpy.__version__}: {error}"
    return ""


@pytest.fixture(
    params=[
        pytest.param("torch"),
        pytest.param("interpreter"),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def arm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Arm:
    """What computes: each test that asks for it runs with torch, with Triton's interpreter, and on a GPU."""
    if request.param == "torch":
        monkeypatch.setenv("WMTP_KERNELS", "torch")
        return Arm("torch", torch.device("cpu"))
    if not HAS_TRITON:
        pytest.skip("triton is not installed")
    monkeypatch.setenv("WMTP_KERNELS", "triton")
    if request.param == "cuda":
        if not HAS_GPU:
            pytest.skip("there is no CUDA device")
        return Arm("triton", torch.device("cuda"))
    if HAS_GPU:
        pytest.skip("there is a GPU: the kernels run on it, not in Triton's interpreter")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if problem := _unusable_interpreter():
        pytest.skip(problem)
    return Arm("triton", torch.device("cpu"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written to reads as NaN: in its deterministic mode torch fills it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small products are slower on many threads, by far where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def chunk_of(arm: Arm, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the number of rows that a chunk holds."""
    return lambda rows: monkeypatch.setattr(arm.rows, "chunk_rows", lambda *_: rows)


@pytest.fixture(params=["whole rows", "blocks"])
def row_layout(request: pytest.FixtureRequest, arm: Arm, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows of logits that are taken whole, or by blocks as those of large vocabularies are."""
    if request.param == "blocks":
        take_blocks(arm, monkeypatch)
    return request.param


def take_blocks(arm: Arm, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"_BLOCK_ELEMENTS": 100}
    if arm.backend == "triton":
        sizes = {"_WHOLE_ROW": 16, "_BLOCK": arm.size(32, 4096)}
    for name, value in sizes.items():
        monkeypatch.setattr(arm.rows, name, value)


@pytest.fixture
def by_blocks(arm: Arm, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``row_layout``, by blocks alone."""
    take_blocks(arm, monkeypatch)
