"""With the Triton kernels no step waits for the device: nothing that the device computed is asked for by the host.

On a CPU there is nothing to wait for, but what would wait on a GPU is still an operation that can be seen.
"""

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp_kernels import (
    IGNORE_INDEX,
    Standardisation,
    TDWeights,
    decision_weights,
    reference_cross_entropy,
    rho1_linear_cross_entropy,
    rows_triton,
    td_triton,
    td_weighted_linear_cross_entropy,
    weighted_linear_cross_entropy,
)

# What reads a number, or makes a tensor whose size depends on numbers.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "bincount", "histc")


class NoWaiting(TorchDispatchMode):
    """Fails at the first operation that would make the host wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        assert not any(index is not None and index.dtype == torch.bool for index in indices), "a mask as an index waits"
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMTP_KERNELS", "triton")
    for module in (rows_triton, td_triton):  # what a kernel does is not the question
        monkeypatch.setattr(module, "launch", lambda *args, **options: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


N_HEADS, BATCH, LENGTH, DIM, VOCABULARY = 3, 2, 5, 8, 11


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(N_HEADS, BATCH, LENGTH, DIM, requires_grad=True)
    weight = torch.randn(VOCABULARY, DIM, requires_grad=True)
    targets = torch.randint(VOCABULARY, (N_HEADS, BATCH, LENGTH))
    targets[:, 0, 3:] = IGNORE_INDEX
    return hidden, weight, targets, (targets != IGNORE_INDEX).sum(-1)


def test_the_watch_sees_what_waits():
    for wait in (lambda x: x.item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: bool(x.any())):
        with pytest.raises(AssertionError, match="waits"), NoWaiting():
            wait(torch.ones(1))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("td_lambda", [0.0, 0.5])
def test_td_weighted(known, td_lambda):
    hidden, weight, targets, counts = inputs()
    constants = Standardisation(torch.tensor(0.1, dtype=torch.float64), torch.tensor(2.0), 0.3)
    td = TDWeights(
        torch.rand(BATCH, LENGTH), torch.ones(BATCH), targets[0] >= 0, td_lambda=td_lambda, standardisation=constants
    )
    with NoWaiting():
        decision_weights(td)
        for weights in (td, torch.ones(BATCH, LENGTH)):
            result = td_weighted_linear_cross_entropy(
                hidden, weight, targets, weights, scales_n=torch.ones(N_HEADS), counts_nB=counts if known else None
            )
            result.loss.backward()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("chunk", [6, 1000])
@pytest.mark.parametrize(
    "options", [{"k_percent": 0.55}, {"k_percent": 0.5, "scope": "sequence"}, {"weighting": "softmax"}]
)
def test_rho1(known, chunk, options, monkeypatch):
    monkeypatch.setattr(rows_triton, "chunk_rows", lambda *_: chunk)
    hidden, weight, targets, counts = inputs()
    with NoWaiting():
        loss, *_ = rho1_linear_cross_entropy(
            hidden, weight, targets, torch.rand(targets.shape), counts_nB=counts if known else None, **options
        )
        loss.backward()


@pytest.mark.parametrize("count", [None, 11, 15])
def test_flat_rows(count):
    hidden, weight, targets, _ = inputs()
    flat = hidden[0].flatten(0, 1), weight, targets[0].flatten()
    with NoWaiting():
        loss, _ = weighted_linear_cross_entropy(*flat, torch.ones(BATCH * LENGTH), count=count)
        loss.backward()
        reference_cross_entropy(*flat, count=count)


def test_the_number_of_rows_is_what_the_host_was_told(monkeypatch):
    """Rows without a target are left out of the products where the host knows how many have one."""
    seen: list[int] = []
    operations = rows_triton.workspace
    monkeypatch.setattr(rows_triton, "workspace", lambda rows, *more: (seen.append(rows), operations(rows, *more))[1])
    hidden, weight, targets, counts = inputs()
    for counts_nB, options in itertools.product((None, counts), ({}, {"k_percent": 0.5})):
        if options:
            rho1_linear_cross_entropy(
                hidden, weight, targets, torch.rand(targets.shape), counts_nB=counts_nB, **options
            )
        else:
            td_weighted_linear_cross_entropy(hidden, weight, targets, torch.ones(BATCH, LENGTH), counts_nB=counts_nB)
    assert seen == [30, 30, 24, 24]
