"""On a GPU a step waits for the device once, for its metrics: forward and backward ask nothing of it.

On a CPU there is nothing to wait for, but what would wait on a GPU is still an operation that can be seen.
"""

import traceback
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp_ds import distributed
from wmtp_ds.metrics import WindowMetrics
from wmtp_ds.models.reference import ReferenceModel
from wmtp_ds.stages.base import Output, Totals
from wmtp_kernels import rows_triton, td_triton

# What reads a number, or makes a tensor whose size depends on numbers.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "bincount", "histc")


class NoWaiting(TorchDispatchMode):
    """Fails at the first operation that would make the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # The batch is on the host as well, where its numbers may be read.
        assert name not in WAITS or _asks_the_host(), f"{name} waits for the device"
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        assert not any(index is not None and index.dtype == torch.bool for index in indices), "a mask as an index waits"
        return func(*args, **(kwargs or {}))


def _asks_the_host() -> bool:
    return any(frame.filename != __file__ and ".host" in (frame.line or "") for frame in traceback.extract_stack())


@pytest.fixture(autouse=True)
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMTP_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in (rows_triton, td_triton):  # what a kernel does is not the question
        monkeypatch.setattr(module, "launch", lambda *args, **options: None)


@pytest.mark.parametrize(
    ("stage", "training"),
    [
        ("baseline", {}),
        ("critic", {}),
        ("critic", {"value_target": "gae"}),
        ("verifiable", {}),
        ("verifiable", {"td_lambda": 0.9, "td_normalize": "zscore", "weight_norm": "mean1"}),
        ("rho1", {}),
        ("rho1", {"selection_scope": "sequence", "excess": "absolute"}),
    ],
)
@pytest.mark.parametrize("rows", [None, [[0, 2, 1], [3]]], ids=["unpacked", "packed"])
def test_a_micro_batch_waits_for_nothing(make_model, batch, packed, stage, training, rows):
    batch = batch if rows is None else packed(batch, rows)
    model = make_model(stage, dtype=torch.float32, **training)
    found = torch.rand(batch.input_ids.shape) if stage == "rho1" else None
    counted = model.stage.counts(batch.host, model.n).pack()  # on the host
    window = WindowMetrics()
    with NoWaiting():
        totals = Totals.unpack(distributed.sum_over_ranks(counted), model.n)
        if model.stage.needs_window:
            with torch.no_grad():
                values = [model(batch, mode="values")]
            totals = Totals(**vars(totals) | {"standardisation": model.stage.standardise(values, [batch])})
        output = Output(*model(batch, totals, found))
        output.loss.backward()
        window.add(output)


def test_the_reference_waits_for_nothing(make_model, batch, packed):
    policy = make_model("baseline", n=1, dtype=torch.float32).policy
    both = packed(batch, [[0, 2, 1], [3]])
    with NoWaiting(), torch.no_grad():
        ReferenceModel(policy)(batch)
        ReferenceModel(policy)(both)


def test_the_watch_sees_what_waits():
    x = torch.rand(3)
    for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 0.5], lambda: bool((x > 0.5).all())):
        with pytest.raises(AssertionError, match="waits"), NoWaiting():
            wait()
