"""The kernels compiled for GPUs, where there may be none: they compile, spill nothing and move whole vectors."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import wmtp_kernels

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SOURCES = [Path(wmtp_kernels.__file__).with_name(name) for name in ("rows_triton.py", "td_triton.py")]
LOGITS = ("_weighted_kernel", "_cross_entropy_kernel", "_selected_kernel")
Report = list[dict[str, Any]]


@pytest.fixture(scope="module")
def report() -> Report:
    """Every variant that the package launches, for Hopper; one of each kernel for Ampere and Blackwell."""
    program = Path(__file__).with_name("ahead_of_time.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, program, "90", "80", "100"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found: Report = json.loads(done.stdout)
    for kernel in found:
        print(json.dumps(kernel))  # shown with -rP, or where a test fails
    return found


def test_every_kernel_is_compiled_for_every_device(report):
    kernels = {name for source in SOURCES for name in re.findall(r"def (_\w+_kernel)\(", source.read_text())}
    assert len(kernels) >= 6
    for capability in ("90", "80", "100"):
        assert {k["kernel"] for k in report if k["capability"] == capability} == kernels


def test_every_variant_is_compiled(report):
    def variants(kernel: str, *names: str) -> set[tuple[Any, ...]]:
        return {tuple(k[name] for name in names) for k in report if k["kernel"] == kernel}

    assert variants("_weighted_kernel", "SOURCE", "GATHERED") == {
        (0, False),
        (1, False),
        (1, True),
        (2, False),
        (2, True),
    }
    both = {(False,), (True,)}
    for kernel in LOGITS[:2]:
        assert variants(kernel, "dtype") == {("bfloat16",), ("float16",), ("float32",)}
        assert variants(kernel, "WHOLE") == both
    assert variants("_scaled_kernel", "GATHERED") == variants("_statistics_kernel", "TD") == both
    assert variants("_advantage_kernel", "SCAN", "WEIGHTS") == {(a, b) for a in (False, True) for b in (False, True)}


def test_nothing_spills(report):
    """What does not fit the registers of a thread goes to memory and back, at the price of the logits themselves."""
    for kernel in report:
        assert kernel["spills"] == 0, kernel
        assert kernel["registers"] * kernel["num_warps"] * 32 <= 65_536, kernel


@pytest.mark.parametrize("vocabulary", [32_000, 32_001, 50_257, 128_256])
def test_logits_are_moved_in_vectors(report, vocabulary):
    """128 bits a thread at once, also where the vocabulary is no multiple of anything."""
    seen = set()
    for kernel in report:
        if kernel["kernel"] in LOGITS and kernel["vocabulary"] == vocabulary:
            assert kernel["wide_loads"] > 0, kernel
            assert kernel["wide_stores"] > 0 or kernel["kernel"] == "_cross_entropy_kernel", kernel
            seen.add(kernel["kernel"])
    assert "_weighted_kernel" in seen


def test_a_whole_row_is_read_once(report):
    """32,768 bfloat16 in vectors of 16 bytes: every thread loads its share once, and stores it once."""
    for kernel in report:
        if kernel["kernel"] == "_weighted_kernel" and kernel["vocabulary"] == 32_000 and kernel["dtype"] == "bfloat16":
            share = kernel["BLOCK"] * 2 // (kernel["num_warps"] * 32 * 16)
            assert kernel["WHOLE"]
            assert kernel["wide_loads"] == kernel["wide_stores"] == share


def test_hidden_states_are_moved_in_vectors(report):
    scaled = [k for k in report if k["kernel"] == "_scaled_kernel"]
    assert all(k["wide_loads"] and k["wide_stores"] for k in scaled)


def test_offsets_of_rows_are_64_bit(report):
    """N·V exceeds 2^31."""
    for kernel in report:
        if kernel["kernel"] != "_advantage_kernel":  # which multiplies within one sequence, too
            assert kernel["products"] == ["i64"], kernel
        assert "i64" in kernel["products"], kernel


def test_no_atomics_and_no_double_precision(report):
    """Two runs give the same bits; and only statistics are worth 64 bits."""
    for kernel in report:
        assert not kernel["atomics"], kernel
        assert kernel["double_precision"] == (kernel["kernel"] == "_statistics_kernel"), kernel
