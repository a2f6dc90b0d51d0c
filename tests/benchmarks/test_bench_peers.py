"""Other libraries are called as they want to be, and skipped where they cannot run."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from wmtp_kernel_benchmarks import arms, checks, peers
from wmtp_kernel_benchmarks.inputs import Inputs, Sizes, make_inputs

CPU = torch.device("cpu")
TINY = Sizes(heads=3, sequences=2, length=12, dim=32, vocabulary=50)
arm_named = {arm.name: arm for arm in arms.all_arms()}.__getitem__


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, sizes: Sizes = TINY, k_percent: float = 0.6) -> Inputs:
    return make_inputs(sizes, dtype, CPU, seed, k_percent)


def test_the_exact_variant_of_cut_cross_entropy_is_asked_for_as_its_version_wants():
    def old(e, c, targets, reduction="mean", filter_eps="high", impl="cce"): ...

    def new(e, c, targets, reduction="mean", filter_eps="auto", accum_e_fp32=False, impl="cce"): ...

    assert peers._cut_options(old, exact=False) == peers._cut_options(new, exact=False) == {"impl": "cce"}
    assert peers._cut_options(old, exact=True) == {"impl": "cce", "filter_eps": None}
    assert peers._cut_options(new, exact=True) == {"impl": "cce_exact"}


@pytest.mark.parametrize(
    ("name", "module", "dtype", "reason"),
    [
        ("liger-none", "", torch.bfloat16, "Liger is not installed; install it with: pip install 'wmtp-ds[bench]'"),
        ("liger-none", "liger_kernel", torch.bfloat16, "Liger needs a GPU"),
        (
            "liger-mean-float32",
            "liger_kernel",
            torch.float32,
            "accumulates in float32 already: the same as the default",
        ),
        (
            "cut",
            "",
            torch.bfloat16,
            "cut cross-entropy is not installed; install it with: pip install 'wmtp-ds[bench]'",
        ),
        ("cut", "cut_cross_entropy", torch.bfloat16, "cut cross-entropy needs a GPU"),
        ("cut", "cut_cross_entropy", torch.float32, "cut cross-entropy has gradients in bfloat16 and float16 alone"),
        ("deepspeed-none", "", torch.float32, "DeepSpeed is not installed; install it with: pip install deepspeed"),
    ],
)
def test_why_a_library_is_skipped(monkeypatch, name, module, dtype, reason):
    installed = lambda wanted: SimpleNamespace() if wanted == module else None  # noqa: E731
    monkeypatch.setattr(peers, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=installed)))
    monkeypatch.setenv("TRITON_INTERPRET", "1" if "GPU" not in reason else "0")
    with pytest.raises(arms.UnavailableError) as error:
        arm_named(name).make(CPU, dtype)
    assert str(error.value) == reason


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **names: Any) -> None:
    """A module that is not installed, for the arms that import it."""
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**names))
    monkeypatch.setattr(peers, "_require", lambda *_: None)
    monkeypatch.setattr(peers, "_require_triton_device", lambda *_: None)


@pytest.mark.parametrize(
    ("name", "reduction", "accumulation"),
    [
        ("liger-none", "none", None),
        ("liger-none-float32", "none", torch.float32),
        ("liger-mean", "mean", None),
        ("liger-mean-float32", "mean", torch.float32),
    ],
)
def test_liger_is_called_with_stacked_heads(monkeypatch, name, reduction, accumulation):
    def loss(input, weight, target, *, ignore_index, reduction, accum_dtype):
        seen.append((input.shape, reduction, accum_dtype))
        logits = (input @ weight.T).float()
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)

    seen: list[Any] = []
    stand_in(monkeypatch, "liger_kernel.transformers.functional", liger_fused_linear_cross_entropy=loss)
    arm, inputs = arm_named(name), tiny(dtype=torch.bfloat16)
    assert checks.check(arm, arm.make(CPU, torch.bfloat16), inputs)[1] is None
    assert seen == [((TINY.rows, TINY.dim), reduction, accumulation)]


@pytest.mark.parametrize(("name", "impl"), [("cut", "cce"), ("cut-exact", "cce_exact")])
def test_cut_cross_entropy_is_weighted_by_rows(monkeypatch, name, impl):
    def loss(e, c, targets, *, ignore_index, reduction, impl, accum_e_fp32=False):
        seen.append((e.shape, reduction, impl))
        return F.cross_entropy((e @ c.T).float(), targets, ignore_index=ignore_index, reduction=reduction)

    seen: list[Any] = []
    stand_in(monkeypatch, "cut_cross_entropy", linear_cross_entropy=loss)
    arm, inputs = arm_named(name), tiny(dtype=torch.bfloat16)
    assert checks.check(arm, arm.make(CPU, torch.bfloat16), inputs)[1] is None
    assert seen == [((TINY.rows, TINY.dim), "none", impl)]


def test_liger_itself_in_tritons_interpreter(tmp_path, alone):
    pytest.importorskip("liger_kernel")
    names = "liger-none,liger-mean"
    command = ["--quick", "--no-sweep", "--device=cpu", "--rounds=1", "--arms", names, f"--output={tmp_path}"]
    done = alone(command, environment={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())["sizes"][0]["results"]
    assert [results[name]["status"] for name in names.split(",")] == ["measured", "measured"]
