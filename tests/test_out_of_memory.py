"""Out of memory: told from other errors, and said with the plan's numbers."""

import re
from pathlib import Path

import pytest
import torch

import wmtp_ds.train
from wmtp_ds.config import load_config
from wmtp_ds.errors import RunError
from wmtp_ds.out_of_memory import explain, is_out_of_memory
from wmtp_ds.plan import machine
from wmtp_ds.plan.plan import Fit
from wmtp_ds.plan.reading import Sizes, read_setup


def of_the_cpu() -> Exception:
    try:
        torch.empty(1 << 58)
    except RuntimeError as error:
        return error
    raise AssertionError


GPU = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 GiB is free."
)
NCCL = RuntimeError("NCCL Error 1: unhandled cuda error: Failed to CUDA calloc: out of memory")


@pytest.mark.parametrize("error", [of_the_cpu(), GPU, NCCL, MemoryError()])
def test_failed_allocations(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), KeyError("out of memory"), OSError(12, "mmap")])
def test_other_errors(error):
    assert not is_out_of_memory(error)


def resolved_of(name: str, *overrides: str):
    return load_config(Path("stage_configs") / name, overrides, checks=False)


@pytest.fixture(autouse=True)
def here(checkout, monkeypatch):
    monkeypatch.chdir(checkout)


def total(setting: str) -> float:
    """GiB by plan, with the setting laid over the config."""
    resolved = resolved_of("rho1.toml", *([setting.replace(" = ", "=")] if setting else []))
    setup = read_setup(resolved, ranks=4, device="cuda", sizes=Sizes(), kernels="triton").setup
    return Fit(setup).total / 2**30


def test_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 * 2**30, 80 * 2**30))
    monkeypatch.delenv("WMTP_KERNELS", raising=False)
    monkeypatch.setattr("wmtp_ds.out_of_memory.kernels_on", lambda device: "triton")
    said = explain(GPU, resolved_of("rho1.toml"), "cuda", 4).splitlines()
    assert said[0] == "out of memory on the GPU: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert said[1].startswith(f"wmtp-ds plan: {total(''):.1f} GiB on each rank at the peak")
    assert "of 80.0; most of it" in said[1]
    settings = [re.fullmatch(r"  (.*)  \(([\d.]+)\)", line).groups() for line in said[3:]]
    assert [name.split(" = ")[0] for name, _ in settings] == [
        "training.batch_size",
        "deepspeed.config",
        "dataset.max_length",
    ]
    for name, size in settings:
        if not name.startswith("training.batch_size"):  # two settings
            assert total(name) <= float(size) + 0.06
        assert float(size) < total("")


def test_on_a_cpu_no_rank_is_advised(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: 24 * 2**30)
    said = explain(of_the_cpu(), resolved_of("local/rho1.toml"), "cpu", 2).splitlines()
    assert "DefaultCPUAllocator: can't allocate memory" in said[0]
    assert "of 12.0;" in said[1]
    assert [line.split()[0] for line in said[3:]] == [
        "training.gradient_checkpointing",
        "training.batch_size",
        "dataset.max_length",
    ]


def test_a_model_that_cannot_be_planned():
    named = ['models.policy.name="mine"', 'models.policy.path="storage/mine"', 'experiment.name="mine"']
    resolved = resolved_of("rho1.toml", *named, 'experiment.tags.model="mine"')
    said = explain(GPU, resolved, "cuda", 1)
    assert said.startswith("out of memory on the GPU: CUDA out of memory.")
    assert "cannot be planned: " in said


def test_a_run_says_so(monkeypatch):
    def fail(*_):
        raise of_the_cpu()

    resolved = load_config(Path("stage_configs/local/baseline.toml"), ['mlflow.tracking_uri=""'])
    monkeypatch.setattr(wmtp_ds.train, "fill_rewards", fail)
    monkeypatch.setattr(wmtp_ds.train.engine, "start", lambda *_: torch.device("cpu"))
    with pytest.raises(RunError, match="out of memory on the CPU") as raised:
        wmtp_ds.train.train(resolved)
    assert "training.gradient_checkpointing" in str(raised.value)
