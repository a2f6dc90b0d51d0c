"""Model states, DeepSpeed's settings and the loss's workspace: against their definitions elsewhere."""

import json
from pathlib import Path

import pytest
import torch
from plan_setups import LEAF, SHAPE, frozen, setup

from wmtp_ds.errors import UserError
from wmtp_ds.plan.states import States, frozen_at_rest, parameters_of, partition
from wmtp_ds.plan.workspace import Workspace, chunk_rows
from wmtp_ds.plan.zero import ZeroSettings
from wmtp_kernels import rows_torch

REPOSITORY = Path(__file__).resolve().parents[2]


def read(**zero: object) -> ZeroSettings:
    return ZeroSettings.from_json({"zero_optimization": {"stage": 3} | zero}, "ds.json")


# --- states ---


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_each_parameter_is_cut_on_its_own(ranks: int) -> None:
    assert partition([10, 11, 1], ranks) == sum(-(-size // ranks) for size in (10, 11, 1))


def test_mixed_precision_takes_sixteen_bytes_a_parameter() -> None:
    """Rajbhandari et al. 2020, section 3.1: 2 + 2 + 12 bytes, over the ranks."""
    on_device, on_host = States(setup(ranks=1)).at_rest()
    assert on_host == {}
    p = SHAPE.parameters
    assert on_device == {
        "parameters": 2 * p,
        "gradients": 2 * p,
        "masters": 4 * p,
        "moments": 8 * p,
        "reduce bucket": 2 * LEAF.reduce_bucket,
    }
    halved, _ = States(setup(ranks=2)).at_rest()
    assert halved["moments"] == pytest.approx(4 * p, rel=1e-3)


def test_float32_keeps_a_copy_as_masters() -> None:
    on_device, _ = States(setup(ranks=1, b=4)).at_rest()
    assert {name: size / SHAPE.parameters for name, size in on_device.items() if name != "reduce bucket"} == {
        "parameters": 4,
        "gradients": 4,
        "masters": 4,
        "moments": 8,
    }


def test_sgd_has_no_moments_and_a_frozen_policy_no_gradients() -> None:
    assert States(setup(adam=False)).at_rest()[0]["moments"] == 0
    critic = setup(ranks=1, trains_policy=False, value_head="mlp")
    head = 64 + 64 * 64 + 64 + 64 + 1
    on_device, _ = States(critic).at_rest()
    assert on_device["parameters"] == 2 * (SHAPE.parameters + head)
    assert on_device["gradients"] == 2 * head
    assert States(setup(ranks=1, trains_policy=False, value_head="linear")).trained == 64 + 64 + 1
    assert States(setup(ranks=1, value_head="mlp")).trained == SHAPE.parameters + head


def test_offloaded_states_lie_in_host_memory() -> None:
    p = SHAPE.parameters
    on_device, on_host = States(setup(ranks=1).offloaded(optimizer=True, parameters=False)).at_rest()
    assert set(on_device) == {"parameters", "reduce bucket"}
    assert on_host == {"gradients": (2 + 4) * p, "masters": 4 * p, "moments": 8 * p}
    on_device, on_host = States(setup(ranks=1).offloaded(optimizer=True, parameters=True)).at_rest()
    assert set(on_device) == {"reduce bucket"}
    assert on_host["parameters"] == 2 * p


def test_on_a_cpu_all_memory_is_one() -> None:
    on_device, on_host = States(setup(ranks=1, device="cpu").offloaded(optimizer=True, parameters=True)).at_rest()
    assert on_host == {}
    assert on_device["gradients"] == 6 * SHAPE.parameters
    assert on_device["parameters"] == 2 * SHAPE.parameters


def test_gradients_may_be_accumulated_in_another_dtype() -> None:
    zero = ZeroSettings.from_json(
        {"zero_optimization": {"stage": 3}, "data_types": {"grad_accum_dtype": "fp32"}}, "ds.json"
    )
    assert States(setup(zero=zero)).gradient_bytes == 4
    assert States(setup()).gradient_bytes == 2


def test_the_optimizer_steps_through_groups() -> None:
    whole = setup(ranks=1)
    assert States(whole).sub_group == States(whole).trained
    small = setup(ranks=1, zero=ZeroSettings(sub_group=1000))
    assert 1000 <= States(small).sub_group <= 1000 + max(parameters_of(SHAPE))


def test_a_frozen_engine_is_cut_and_may_be_offloaded() -> None:
    model = frozen()
    whole = 2 * model.shape.parameters
    assert frozen_at_rest(model, setup(ranks=1)) == (whole, 0)
    offloaded = frozen(zero=LEAF.offloaded(optimizer=False, parameters=True))
    assert frozen_at_rest(offloaded, setup(ranks=1)) == (0, whole)
    assert frozen_at_rest(offloaded, setup(ranks=1, device="cpu")) == (whole, 0)
    assert sum(frozen_at_rest(model, setup(ranks=4))) == pytest.approx(whole / 4, rel=1e-3)


# --- DeepSpeed's settings ---


def test_defaults_are_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs, ours = DeepSpeedZeroConfig(stage=3), read()
    assert ours.prefetch_bucket == theirs.prefetch_bucket_size
    assert ours.persistence_threshold == theirs.param_persistence_threshold
    assert ours.max_live == theirs.max_live_parameters
    assert ours.max_reuse == theirs.max_reuse_distance
    assert ours.reduce_bucket == theirs.reduce_bucket_size
    assert ours.sub_group == theirs.sub_group_size
    assert ours.contiguous == theirs.contiguous_gradients
    assert ours.overlap == theirs.overlap_comm
    assert (ours.offload_optimizer, ours.offload_parameters, ours.block_is_leaf) == (False, False, False)


def test_settings_are_read() -> None:
    assert read(
        reduce_bucket_size=1e6,
        stage3_prefetch_bucket_size=2,
        stage3_param_persistence_threshold=3,
        stage3_max_live_parameters=4,
        stage3_max_reuse_distance=5,
        sub_group_size=6,
        contiguous_gradients=False,
        overlap_comm=False,
        offload_optimizer={"device": "cpu"},
        offload_param={"device": "none"},
        leaf_module={"classes": ["transformers.models.llama.modeling_llama.LlamaDecoderLayer"]},
    ) == ZeroSettings(2, 3, 4, 5, 1_000_000, 6, False, False, True, True, False)


def test_settings_of_the_files() -> None:
    found = {
        file.stem: ZeroSettings.from_json(json.loads(file.read_text()), "") for file in REPOSITORY.glob("ds_configs/*")
    }
    assert found["zero3"].block_is_leaf
    assert found["zero3_offload"].offload_optimizer
    assert found["zero3_offload"].offload_parameters
    assert found["zero3_cpu"].reduce_bucket == 1_000_000


@pytest.mark.parametrize(
    ("zero", "said"),
    [({"stage": 2}, "stage 3"), ({"offload_optimizer": {"device": "nvme"}}, "offload_optimizer.*nvme")],
)
def test_what_cannot_be_planned_is_said(zero: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(**zero)


# --- the loss's workspace ---


@pytest.mark.parametrize("vocabulary", [100, 32_000, 32_001, 128_256, 400_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_are_the_kernels(vocabulary: int, dtype: torch.dtype) -> None:
    b = dtype.itemsize
    for device in ("cpu", "cuda"):
        theirs = rows_torch.chunk_rows(vocabulary, dtype, torch.device(device))
        assert chunk_rows(vocabulary, b, device, "torch") == theirs
    rows_triton = pytest.importorskip("wmtp_kernels.rows_triton")
    assert chunk_rows(vocabulary, b, "cuda", "triton") == rows_triton.chunk_rows(vocabulary, dtype, torch.device("cpu"))


def test_a_chunk_is_no_larger_than_the_batch() -> None:
    few = Workspace(SHAPE, 10, 2, "cuda", "triton")
    assert few.chunk(learns=False) == 10 * 320 * 2 + 10 * 64 * 2
    assert few.hidden == 10 * 64 * 2
    assert few.weight_gradient == 320 * 64 * 4
    # In torch the losses are computed in float32, from a product of 16 bits.
    assert Workspace(SHAPE, 10, 2, "cpu", "torch").chunk(learns=False) == 10 * 320 * (4 + 2) + 10 * 64 * 4
    assert Workspace(SHAPE, 10, 4, "cpu", "torch").chunk(learns=True) == 10 * 320 * 4 + 3 * 10 * 64 * 4
    many = Workspace(SHAPE, 10**9, 2, "cuda", "triton")
    assert many.chunk(learns=False) == chunk_rows(320, 2, "cuda", "triton") * (320 + 64) * 2
