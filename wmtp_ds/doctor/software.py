"""Interpreter, libraries, GPUs, compilers and kernels."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement

from wmtp_ds.doctor.finding import Finding
from wmtp_ds.launch import cxx_compiler
from wmtp_ds.plan.machine import ask_nvidia_smi

_SHOWN = ("torch", "deepspeed", "transformers", "triton", "mlflow", "pydantic-settings")
_OLDEST = (3, 11)
_BUILD = "sudo apt-get install build-essential (or your system's)"


def python() -> Iterator[Finding]:
    """The interpreter and the system."""
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < _OLDEST:
        yield Finding("python", "failure", text, "Install Python 3.11 or newer.")
    elif platform.system() != "Linux":
        yield Finding("python", "warning", text, "Train on Linux: DeepSpeed and Triton are at home there.")
    else:
        yield Finding("python", "ok", text)


def libraries(required: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """Each dependency is there, in a version that is new enough; the main ones are shown.

    Args:
        required: name -> specifier ("torch" -> ">=2.11"); None takes what this package declares.
    """
    wanted = _declared() if required is None else required
    for name, specifier in wanted.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "failure", "not installed", f"pip install '{name}{specifier}'")
            continue
        # A build's own tag (2.13.0+cpu) is no part of the version that is asked for.
        if not Requirement(f"{name}{specifier}").specifier.contains(version.split("+")[0], prereleases=True):
            yield Finding(name, "failure", f"{version}, but {specifier} is needed", f"pip install '{name}{specifier}'")
        elif name in _SHOWN:
            yield Finding(name, "ok", version)


def _declared() -> dict[str, str]:
    found = {}
    for line in importlib.metadata.requires("wmtp-ds") or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found[requirement.name] = str(requirement.specifier)
    return found


def gpus(device: str) -> Iterator[Finding]:
    """The GPUs that torch sees, or why it sees none.

    Args:
        device: ``runtime.device``: where there must be one.
    """
    import torch

    count = torch.cuda.device_count()
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        text = (
            f"{properties.name}, {total / 2**30:.0f} GiB ({free / 2**30:.0f} free), "
            f"compute capability {properties.major}.{properties.minor}"
        )
        status, mend = "ok", ""
        if properties.major < 8:
            status, mend = "warning", "bfloat16 is slow before 8.0: set models.policy.dtype to float16 or float32."
        elif free < 0.9 * total:
            status, mend = "warning", "Another process holds its memory (nvidia-smi shows which)."
        yield Finding(f"gpu {number}", status, text, mend)  # type: ignore[arg-type]
    if count:
        yield Finding("cuda", "ok", f"{torch.version.cuda}, nccl {'.'.join(map(str, torch.cuda.nccl.version()))}")
        return
    driver = next(iter(ask_nvidia_smi("driver_version")), "")
    if driver and torch.version.cuda is None:
        mend = f"pip install --force-reinstall torch (this is the CPU's build; the driver is {driver})"
        yield Finding("gpu", "failure", "there are GPUs, but this build of torch cannot use them", mend)
    elif driver:
        mend = f"Update the driver ({driver}), or install torch for its CUDA; check CUDA_VISIBLE_DEVICES."
        yield Finding("gpu", "failure", f"there are GPUs, but torch (CUDA {torch.version.cuda}) finds none", mend)
    elif device == "cuda":
        yield Finding("gpu", "failure", "there is none, and runtime.device is cuda", "Set runtime.device to cpu.")
    else:
        yield Finding("gpu", "ok", "there is none: stages run on the CPU, over gloo")


def deepspeed() -> Iterator[Finding]:
    """It can be imported, in a process of its own: an import that fails halfway leaves torch in no good state."""
    code = "import deepspeed; print('version', deepspeed.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    if done.returncode == 0 and "version" in done.stdout:
        yield Finding("deepspeed import", "ok", "works")
        return
    last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    mend = "Set CUDA_HOME to your CUDA toolkit." if "CUDA_HOME" in done.stderr else "pip install --upgrade deepspeed"
    yield Finding("deepspeed import", "failure", last[:300], mend)


def compilers(offload: bool, device: str) -> Iterator[Finding]:
    """What DeepSpeed's CPU Adam and Triton's launchers are compiled with, on first use.

    Args:
        offload: whether optimizer states go to host memory.
        device: ``runtime.device``.
    """
    compiler = cxx_compiler()
    needed = offload or device == "cuda"
    if compiler is None:
        yield Finding("c++ compiler", "failure" if needed else "warning", "there is none", _BUILD)
    else:
        yield Finding("c++ compiler", "ok", _first_line([compiler, "--version"]))
    ninja = shutil.which("ninja", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if ninja is None:
        yield Finding("ninja", "failure" if offload else "warning", "not on the PATH", "pip install ninja")
    else:
        yield Finding("ninja", "ok", _first_line([ninja, "--version"]))
    import torch

    if not torch.cuda.is_available():
        return
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        mend = "Offload to the CPU needs CUDA's toolkit; without offload nothing does. Install it, or set CUDA_HOME."
        yield Finding("nvcc", "failure" if offload else "warning", "there is none", mend)
        return
    said = _output([nvcc, "--version"])
    release = re.search(r"release ([\d.]+)", said)
    version = release[1] if release else "of unknown version"
    wanted = str(torch.version.cuda)
    if offload and version.split(".")[0] != wanted.split(".")[0]:
        mend = f"Set CUDA_HOME to a toolkit of CUDA {wanted}: DeepSpeed compiles for no other major version."
        yield Finding("nvcc", "failure", f"{version}, but torch is built for CUDA {wanted}", mend)
    else:
        yield Finding("nvcc", "ok", version)


def _first_line(command: list[str]) -> str:
    return (_output(command).splitlines() or ["it says nothing"])[0]


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"it does not run: {error}"


def kernels() -> Iterator[Finding]:
    """The loss kernels that would be chosen, compared with plain torch on a small input."""
    import torch

    from wmtp_kernels import backend, weighted_linear_cross_entropy

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = backend(device)
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(14, 16, generator=generator).to(device)
    weight_VD = torch.randn(50, 16, generator=generator).to(device)
    targets_N = torch.randint(50, (14,), generator=generator).to(device)
    weights_N = torch.rand(14, generator=generator).to(device)
    found, _ = weighted_linear_cross_entropy(hidden_ND, weight_VD, targets_N, weights_N)
    losses_N = torch.nn.functional.cross_entropy(hidden_ND @ weight_VD.T, targets_N, reduction="none")
    expected = float((losses_N * weights_N).sum())
    off = abs(float(found) - expected)
    if not off <= 1e-3 * abs(expected):
        mend = "Set WMTP_KERNELS=torch, and report this with the versions above."
        yield Finding("loss kernels", "failure", f"{chosen} on {device.type} is off by {off:.3g}", mend)
    else:
        yield Finding("loss kernels", "ok", f"{chosen} on {device.type}, equal to plain torch")
