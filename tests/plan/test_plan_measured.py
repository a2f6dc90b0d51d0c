"""The plan against the true peak of a step, through the real launcher."""

from typing import Any

import pytest
from measured_step import measure

# Moments of the plan and phases of the step that are the same.
PAIRS = {"reference": "reference", "loss": "forward", "backward": "backward", "optimizer": "optimizer"}
ONE_MICRO_BATCH = "training.gradient_accumulation_steps=1"


@pytest.fixture(autouse=True)
def _asked_for(request: pytest.FixtureRequest) -> None:
    """An hour of launches says no more than recorded.json does, until something changes: only who asks gets them."""
    if request.node.get_closest_marker("slow") and "slow" not in request.config.getoption("-m"):
        pytest.skip("takes minutes: pytest -m slow tests/plan")


def check(found: dict[str, Any]) -> None:
    planned = found["planned"]
    assert max(planned.values()) == pytest.approx(found["peak"], rel=0.15)
    for moment, phase in PAIRS.items():
        # Buffers of the backward pass are let go when its threads see to it: some are still there when the optimizer,
        # which takes the least, begins. Nothing that it is planned to take may be missing.
        if moment == "optimizer":
            assert planned[moment] <= 1.15 * found[phase]
        elif moment in planned:
            assert planned[moment] == pytest.approx(found[phase], rel=0.15), moment


@pytest.mark.launch
def test_two_ranks_with_a_reference() -> None:
    """Sharded states, gathered parameters, checkpoints, the loss's workspace and the reference, in one launch."""
    found = measure("rho1", "micro", 2, 256, [ONE_MICRO_BATCH])
    check(found)
    assert set(found["planned"]) == set(PAIRS)
    assert found["at_rest"] < found["peak"] / 2


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", ["baseline", "critic", "verifiable", "rho1"])
@pytest.mark.parametrize(("size", "length", "batch"), [("micro", 512, 4), ("160m", 256, 2)])
def test_every_stage(stage: str, size: str, length: int, batch: int, ranks: int, checkpointing: str) -> None:
    settings = [f"training.batch_size={batch}", f"training.gradient_checkpointing={checkpointing}"]
    check(measure(stage, size, ranks, length, [ONE_MICRO_BATCH, *settings]))


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("verifiable", 'training.td_normalize="zscore"'),
        ("baseline", 'training.optimizer="sgd"'),
        ("baseline", 'models.policy.dtype="bfloat16"'),
    ],
)
def test_other_settings(stage: str, override: str) -> None:
    check(measure(stage, "micro", 2, 256, [ONE_MICRO_BATCH, override]))
