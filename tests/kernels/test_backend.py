"""Which implementation is chosen, and that it is said once."""

import importlib
import importlib.util
import logging
from types import ModuleType

import pytest
import torch

import wmtp_kernels
from wmtp_kernels import reference_cross_entropy

# The function of that name hides the module as an attribute of the package.
module = importlib.import_module("wmtp_kernels.backend")


@pytest.fixture(autouse=True)
def nothing_chosen_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_choose", module.functools.cache(module._choose.__wrapped__))
    for name in ("WMTP_KERNELS", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "triton" else find(name, *more)
    )


@pytest.mark.parametrize(("device", "expected"), [("cpu", "torch"), ("cuda", "triton"), ("mps", "torch")])
def test_by_default_triton_runs_on_gpus_alone(device, expected, monkeypatch):
    pytest.importorskip("triton")
    assert wmtp_kernels.backend(torch.device(device)) == wmtp_kernels.backend(device) == expected


def test_where_triton_is_not_installed_it_is_torch(monkeypatch):
    without_triton(monkeypatch)
    assert wmtp_kernels.backend("cuda") == "torch"
    monkeypatch.setenv("WMTP_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"WMTP_KERNELS=triton, but triton is not installed"):
        wmtp_kernels.backend("cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_torch_can_be_forced(device, monkeypatch):
    monkeypatch.setenv("WMTP_KERNELS", "torch")
    assert wmtp_kernels.backend(device) == "torch"
    without_triton(monkeypatch)
    assert wmtp_kernels.backend(device) == "torch"


def test_triton_can_be_forced(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("WMTP_KERNELS", "triton")
    assert wmtp_kernels.backend("cuda") == "triton"
    with pytest.raises(ValueError, match=r"does not run on device 'cpu': unset it, or set TRITON_INTERPRET=1 as well"):
        wmtp_kernels.backend("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert wmtp_kernels.backend("cpu") == "triton"
    with pytest.raises(ValueError, match="does not run on device 'mps'"):
        wmtp_kernels.backend("mps")


def test_float64_is_torchs_in_any_case(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("WMTP_KERNELS", "triton")
    assert wmtp_kernels.backend("cuda", torch.bfloat16) == "triton"
    assert wmtp_kernels.backend("cuda", torch.float64) == "torch"


@pytest.mark.parametrize("wrong", ["Triton", "cuda", "1"])
def test_anything_else_is_refused(wrong, monkeypatch):
    monkeypatch.setenv("WMTP_KERNELS", wrong)
    with pytest.raises(ValueError, match=f"WMTP_KERNELS='{wrong}': must be 'torch' or 'triton', or unset"):
        wmtp_kernels.backend("cpu")
    with pytest.raises(ValueError, match="must be 'torch' or 'triton'"):
        reference_cross_entropy(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.int64))


def test_the_choice_is_logged_once_for_each_kind_of_device(monkeypatch, caplog):
    pytest.importorskip("triton")
    with caplog.at_level(logging.INFO, logger="wmtp_kernels"):
        for device in ("cpu", "cuda:1", "cuda:0", "cpu"):
            wmtp_kernels.backend(torch.device(device))
        monkeypatch.setenv("WMTP_KERNELS", "torch")
        wmtp_kernels.backend("cuda")
    assert [record.getMessage() for record in caplog.records] == [
        "loss kernels on cpu: torch (there is no GPU)",
        "loss kernels on cuda: triton (the default on GPUs)",
        "loss kernels on cuda: torch (WMTP_KERNELS)",
    ]


def test_both_implementations_offer_the_same(arm):
    """The loops over chunks know neither: each has all that they ask for."""
    shared = {"chunk_rows", "workspace", "visited_rows", "selected_count", "cross_entropy", "weighted_", "selected_"}
    found = module.row_operations(torch.empty(0, device=arm.device))
    assert isinstance(found, ModuleType)
    assert found is arm.rows
    assert shared | {"scaled_rows"} <= set(vars(found))
