"""Whole plans: what must hold whatever the sizes, and what is said where it does not fit."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from plan_setups import SHAPE, big, frozen, setup

from wmtp_ds.plan.plan import GIB, Fit, Plan
from wmtp_ds.plan.setup import Setup
from wmtp_ds.plan.shape import NAMED
from wmtp_ds.plan.step import COMPONENTS, MOMENTS, Step
from wmtp_ds.plan.zero import ZeroSettings

STAGES = {
    "baseline": {},
    "critic": {"trains_policy": False, "value_head": "linear"},
    "verifiable": {"value_head": "mlp"},
    "zscore": {"value_head": "mlp", "needs_window": True},
    "rho1": {"selects": True, "reference": frozen()},
    "reward": {"value_head": "mlp", "reward": frozen()},
}
stages = st.sampled_from(sorted(STAGES))


def total(chosen: Setup) -> int:
    return Fit(chosen).total


def at_loss(chosen: Setup) -> int:
    return next(moment.total for moment in Step(chosen).moments() if moment.name == "loss")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("is_leaf", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_moments_are_those_of_the_stage(stage: str, is_leaf: bool, checkpointing: bool) -> None:
    zero = replace(setup().zero, block_is_leaf=is_leaf)
    moments = Step(setup(checkpointing=checkpointing, zero=zero, **STAGES[stage])).moments()
    wanted = {"loss", "backward", "optimizer"}
    wanted |= {"reference"} if stage == "rho1" else set()
    wanted |= {"value pass"} if stage == "zscore" else set()
    wanted |= {"scoring"} if stage == "reward" else set()
    assert [moment.name for moment in moments] == [name for name in MOMENTS if name in wanted]
    for moment in moments:
        assert set(moment.bytes) <= set(COMPONENTS)
        assert all(size > 0 for size in moment.bytes.values())


@given(
    stage=stages,
    ranks=st.integers(1, 16),
    batch=st.integers(1, 8),
    length=st.integers(16, 512),
    checkpointing=st.booleans(),
    b=st.sampled_from([2, 4]),
    device=st.sampled_from(["cuda", "cpu"]),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_more_work_takes_more_and_more_ranks_less(
    stage: str, ranks: int, batch: int, length: int, checkpointing: bool, b: int, device: str
) -> None:
    kernels = "triton" if device == "cuda" else "torch"
    chosen = setup(
        ranks=ranks, batch=batch, length=length, checkpointing=checkpointing, b=b, device=device, kernels=kernels
    )
    chosen = replace(chosen, **STAGES[stage])
    least = Step(chosen).states.at_rest()[0]
    assert Fit(chosen).peak.total > 0
    assert all(moment.total >= sum(least.values()) for moment in Fit(chosen).moments if moment.name != "scoring")
    assert total(replace(chosen, batch=batch + 1)) >= total(chosen)
    assert total(replace(chosen, length=length * 2)) >= total(chosen)
    assert at_loss(replace(chosen, length=length * 2)) > at_loss(chosen)
    if ranks > 1:  # beyond one rank parameters are gathered
        assert Step(replace(chosen, ranks=ranks * 2)).states.at_rest()[0]["parameters"] <= least["parameters"]
    if STAGES[stage].get("trains_policy", True):
        assert total(replace(chosen, checkpointing=True)) <= total(replace(chosen, checkpointing=False))


@given(stage=stages, ranks=st.integers(1, 8))
@hypothesis_settings(max_examples=30, deadline=None)
def test_offload_moves_states_to_the_host(stage: str, ranks: int) -> None:
    chosen = replace(setup(ranks=ranks), **STAGES[stage])
    none, optimizer, both = (variant.fit for variant in Plan(chosen, GIB).variants)
    assert none.host == 0 < optimizer.host < both.host
    states = Step(chosen).states
    assert both.host - optimizer.host == ranks * (states.trained + states.frozen) * 2
    assert optimizer.total < none.total or stage == "reward"


def test_a_trained_model_of_7b_on_four_gpus() -> None:
    """16 bytes a parameter over four GPUs are 25.1 GiB, without work and framework."""
    plan = Plan(big(), 80 * GIB)
    assert plan.fits
    assert plan.advice() == []
    states = 16 * NAMED["7b"].parameters / 4
    assert states < plan.configured.total < states + 15 * GIB
    assert not Plan(big(), 24 * GIB).fits


def test_advice_says_what_each_change_gives() -> None:
    plan = Plan(big("70b", ranks=8, checkpointing=False), 80 * GIB)
    advice = {variant.label: variant.fit for variant in plan.advice()}
    assert list(advice) == [
        "training.gradient_checkpointing = true",
        "training.batch_size = 1, training.gradient_accumulation_steps = 8",
        "optimizer offload",
        "optimizer and parameter offload",
        "--num_gpus 64",
        "all of these but the ranks, with training.batch_size = 1",
    ]
    assert all(fit.total < plan.configured.total for fit in advice.values())
    assert not advice["--num_gpus 64"].fits(plan.capacity)  # activations are not sharded
    checkpointed = Plan(big("70b", ranks=8), 80 * GIB)
    ranks = {variant.label: variant.fit for variant in checkpointed.advice()}
    assert ranks["--num_gpus 32"].fits(80 * GIB)
    assert not Fit(big("70b", ranks=16)).fits(80 * GIB)
    last = list(advice.values())[-1]
    assert last.total == min(fit.total for fit in advice.values())
    assert last.fits(plan.capacity)


def test_advice_names_a_batch_that_fits() -> None:
    heavy = setup(policy=NAMED["1b"], batch=64, length=2048, ranks=8)
    capacity = Fit(replace(heavy, batch=16)).total
    labels = [variant.label for variant in Plan(heavy, capacity).advice()]
    assert "training.batch_size = 16, training.gradient_accumulation_steps = 8" in labels


def test_advice_leaves_out_what_is_done() -> None:
    tiny = big("70b", ranks=1, batch=1).offloaded(optimizer=True, parameters=True)
    labels = [variant.label for variant in Plan(tiny, GIB).advice()]
    assert not any("offload" in label or "checkpointing" in label or "batch_size =" in label for label in labels[:-2])
    on_cpu = setup(device="cpu", kernels="torch")
    assert not any("offload" in variant.label for variant in Plan(on_cpu, 1).advice())


def test_variants_name_the_configured_one() -> None:
    ways = ((False, False), (True, False), (True, True))
    for way in ways:
        variants = Plan(setup().offloaded(optimizer=way[0], parameters=way[1]), GIB).variants
        assert [v.is_configured for v in variants] == [way == other for other in ways]
    other = Plan(setup().offloaded(optimizer=False, parameters=True), GIB).variants
    assert [v.label for v in other if v.is_configured] == ["parameter offload"]
    assert [v.label for v in Plan(setup(device="cpu"), GIB).variants] == ["as configured"]


def test_a_window_of_several_micro_batches_is_traced() -> None:
    """With one micro-batch a step, passes of two kinds alternate, and DeepSpeed keeps nothing for later."""
    window = {"value_head": "mlp", "needs_window": True}
    alternating = setup(accumulation=1, **window)
    assert total(alternating) < total(replace(alternating, accumulation=2))


def test_the_embeddings_tied_are_held_once() -> None:
    assert total(setup(policy=replace(SHAPE, tied=True))) < total(setup())


def test_overhead_is_of_the_device() -> None:
    one, two = Fit(setup(ranks=1)), Fit(setup(ranks=2))
    assert two.overhead(two.peak) - one.overhead(one.peak) > 500 * 2**20
    assert one.total == one.peak.total + one.overhead(one.peak)
    assert Fit(setup(device="cpu", kernels="torch")).overhead(one.peak) == Fit(setup(device="cpu")).overhead(two.peak)


def test_sgd_with_decay_takes_a_copy() -> None:
    def optimizer(**changes: object) -> int:
        return next(m.total for m in Step(setup(b=4, ranks=1, **changes)).moments() if m.name == "optimizer")

    part = Step(setup(b=4, ranks=1)).states.trained * 4
    assert optimizer(adam=False, decays=True) - optimizer(adam=False, decays=False) == part
    assert optimizer() - optimizer(adam=False, decays=False) == 2 * part


def test_prefetching_is_in_the_plan() -> None:
    far = ZeroSettings(block_is_leaf=True, reduce_bucket=1000, prefetch_bucket=10**8)
    near = replace(far, prefetch_bucket=0, max_reuse=0)
    assert total(big(zero=far)) > total(big(zero=near))


def test_what_is_beside_the_tensors_must_fit_too() -> None:
    fit = Fit(setup())
    assert fit.fits(fit.total)
    assert not fit.fits(fit.total - 1)
    assert fit.total > fit.peak.total + 10**9
