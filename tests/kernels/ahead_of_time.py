"""Compile for GPUs that are not there every kernel variant that the package launches at real sizes; report as JSON.

Run as a program, since what is compiled must not be interpreted, and Triton decides on import::

    python ahead_of_time.py [CAPABILITY ...]     # 90 by default

The package runs on fake tensors, which have a shape and no memory, so at the sizes of real training. Its launches
are handed to Triton's own specialisation and compiler; a driver that only names the device stands in for a GPU.
Whatever would wait for a device (``.item()``, ``nonzero``) is an error on fake tensors.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["WMTP_KERNELS"] = "triton"
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from wmtp_kernels import (
    TDWeights,
    backend,
    decision_weights,
    reference_cross_entropy,
    rho1_linear_cross_entropy,
    rows_triton,
    td_triton,
    td_weighted_linear_cross_entropy,
    weighted_linear_cross_entropy,
)

HEADS, BATCH, LENGTH = 4, 4, 2048


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    vocabulary: int


class NamedDevice:
    """What Triton's compiler asks a driver for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class OnHost(Tensor):
    """A real tensor amid fake ones: what the host knows without asking a device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with unset_fake_temporarily():
            return super().__torch_function__(func, types, args, kwargs or {})


def registers_and_spills(ptx: str, arch: str) -> tuple[int, int]:
    """Registers a thread, and bytes spilled, as ptxas tells; of the two that come with Triton, one accepts the file."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        complaints = []
        for tool in ("ptxas", "ptxas-blackwell"):
            command = [tools / tool, "-v", f"-arch={arch}", source, "-o", Path(folder, "kernel.cubin")]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                registers = re.search(r"Used (\d+) registers", done.stderr)
                spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
                assert registers, done.stderr
                assert spills, done.stderr
                return int(registers[1]), int(spills[1]) + int(spills[2])
            complaints.append(done.stderr)
    raise RuntimeError("\n".join(complaints))


def compile_ahead(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What Triton makes of one launch; the same object for the same variant."""
    # A dtype stands for a pointer to it, aligned as fresh memory is.
    return kernel.warmup(*(a.dtype if isinstance(a, Tensor) else a for a in arguments), grid=(1,), **options)


def describe(launch: Launch, compiled: Any, capability: str) -> dict[str, Any]:
    """What the tests ask about a compiled kernel."""
    kernel, arguments, options, vocabulary = launch
    ptx, ttir = compiled.asm["ptx"], compiled.asm["ttir"]
    arch = re.search(r"\.target (sm_\w+)", ptx)
    assert arch
    registers, spills = registers_and_spills(ptx, arch[1])
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "vocabulary": vocabulary,
        "dtype": str(arguments[0].dtype).removeprefix("torch."),
        **{name: value for name, value in options.items() if name != "IGNORED"},
        "registers": registers,
        "spills": spills,
        "wide_loads": len(re.findall(r"ld\.global\.(?:\w+\.)*(?:v4\.[bfu]32|v2\.[bfu]64|b128)", ptx)),
        "wide_stores": len(re.findall(r"st\.global\.(?:\w+\.)*(?:v4\.[bfu]32|v2\.[bfu]64|b128)", ptx)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "products": sorted(set(re.findall(r"arith\.muli .* : (\w+)", ttir))),
        "double_precision": "f64" in ttir,
    }


def operations(vocabulary: int, dim: int, dtype: torch.dtype, *, brief: bool) -> Iterator[Callable[[], Any]]:
    """Every way in which the package is used, or the most frequent ones, on the tensors of one size."""
    hidden = torch.empty(HEADS, BATCH, LENGTH, dim, dtype=dtype, requires_grad=True)
    unembedding = torch.empty(vocabulary, dim, dtype=dtype, requires_grad=True)
    targets, reference = torch.empty(HEADS, BATCH, LENGTH, dtype=torch.int64), torch.empty(HEADS, BATCH, LENGTH)
    of_layer = (hidden, unembedding, targets)
    rows = (hidden.view(-1, dim), unembedding, targets.view(-1))
    values, rewards = torch.empty(BATCH, LENGTH), torch.empty(BATCH)
    decisions, scales = torch.empty(BATCH, LENGTH, dtype=torch.bool), torch.empty(HEADS)
    with unset_fake_temporarily():
        known = torch.full((HEADS, BATCH), 1000).as_subclass(OnHost)

    def learn(operation: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        operation(*arguments, **options)[0].backward()

    for counts in (None,) if brief else (None, known):
        options = {"scales_n": scales, "counts_nB": counts}
        count = None if counts is None else 1000
        for td_lambda in (0.0,) if brief else (0.0, 0.95):
            td = TDWeights(values, rewards, decisions, td_lambda=td_lambda)
            yield partial(learn, td_weighted_linear_cross_entropy, *of_layer, td, **options)
            yield partial(decision_weights, td)
            yield td.advantages
        yield partial(learn, rho1_linear_cross_entropy, *of_layer, reference, k_percent=0.6, **options)
        yield partial(reference_cross_entropy, *rows, count=count)
        if not brief:
            yield partial(learn, td_weighted_linear_cross_entropy, *of_layer, values, **options)
            for choice in ({"scope": "sequence"}, {"weighting": "softmax"}):
                yield partial(learn, rho1_linear_cross_entropy, *of_layer, reference, **choice, **options)
            yield partial(learn, weighted_linear_cross_entropy, *rows, reference.view(-1), count=count)


def launches(sizes: list[tuple[int, int, torch.dtype]]) -> list[Launch]:
    """Launches at the first of these sizes in every way, at the others in the most frequent ones."""
    found: dict[str, Launch] = {}
    size = sizes[0]

    def record(kernel: Any, programs: int, where: Tensor, *arguments: Any, **options: Any) -> None:
        assert all(isinstance(a, FakeTensor) for a in arguments if isinstance(a, Tensor))
        # Triton compiles anew for other types, and for integers that are 1 or no multiples of 16.
        key = [a.dtype if isinstance(a, Tensor) else (type(a), a == 1, a and a % 16 == 0) for a in arguments]
        found.setdefault(f"{kernel.__name__} {key} {options}", Launch(kernel, arguments, options, size[0]))

    rows_triton.launch = td_triton.launch = record
    sys.modules[backend.__module__]._interpreted = lambda: True  # so that the CPU's fake tensors are taken
    with FakeTensorMode():
        for size in sizes:
            for operation in operations(*size, brief=size is not sizes[0]):
                operation()
    return list(found.values())


def main() -> None:
    sizes = [
        (32_000, 4096, torch.bfloat16),
        (32_001, 4096, torch.bfloat16),
        (32_000, 4096, torch.float16),
        (32_000, 4096, torch.float32),
        (128_256, 4096, torch.bfloat16),
        (50_257, 768, torch.bfloat16),
    ]
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    report = []
    all_launches = launches(sizes)
    thorough, *others = sys.argv[1:] or ["90"]
    for capability in (thorough, *others):
        driver.set_active(NamedDevice(int(capability)))
        # Of other devices, one variant of each kernel.
        chosen = all_launches if capability == thorough else {x.kernel: x for x in reversed(all_launches)}.values()
        seen = {}
        for launch in chosen:
            compiled = compile_ahead(*launch[:3])
            seen.setdefault(id(compiled), (launch, compiled))
        report += [describe(*pair, capability) for pair in seen.values()]
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
