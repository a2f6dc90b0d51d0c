"""A further stage is one subclass: everything else about the configuration follows from it."""

from collections.abc import Iterator
from typing import ClassVar

import pytest
from pydantic import Field

from wmtp_ds.config import TrainingConfig, stage_names, training_class
from wmtp_ds.config.training import unregister_stage


@pytest.fixture
def entropy() -> Iterator[type[TrainingConfig]]:
    class EntropyTraining(TrainingConfig, stage="entropy"):
        needs_reference = True
        uses_rewards = True
        default_correct_ratio = 0.25
        default_early_stopping: ClassVar = {"monitor": "loss", "patience": 3, "min_delta": 0.5}

        sharpness: float = Field(gt=0, description="how much the weights differ", examples=[2.0])
        floor: float = Field(default=0.125, ge=0, description="the lowest weight")

    yield EntropyTraining
    unregister_stage("entropy")


def write(workspace, *edits):
    """rho1's config is this stage's but for the name and the fields of `training`."""
    fields = ("temperature = 1.0\nk_percent = 0.6\n", "sharpness = 3.0\n")
    return workspace.write_config("rho1", ('stage = "rho1"', 'stage = "entropy"'), fields, *edits)


def test_a_fifth_stage_is_validated_like_the_others(workspace, entropy):
    assert stage_names() == ("baseline", "critic", "verifiable", "rho1", "entropy")
    write(workspace)
    resolved = workspace.load("training.floor=0.5", environ={"WMTP_MODELS__REWARD__SQUASH": "zscore_sigmoid"})
    config = resolved.config
    assert type(config.training) is entropy is training_class("entropy")
    assert (config.training.sharpness, config.training.floor) == (3.0, 0.5)
    assert config.models.reference is not None
    assert config.models.reward.squash == "zscore_sigmoid"
    assert config.data_sampling.correct_ratio == 0.25
    assert config.early_stopping.patience == 3
    assert resolved.flat()["training.sharpness"] == 3.0
    workspace.write("run.toml", resolved.toml())
    assert workspace.load().flat() == resolved.flat()


def test_its_fields_are_checked_and_named(workspace, entropy):
    write(workspace, ("sharpness = 3.0", "sharpnes = 3.0"))
    missing, unknown = workspace.problems()
    assert missing.key == "training.sharpness"
    assert missing.message == "is required by stage entropy: how much the weights differ"
    assert missing.mend == "write sharpness = 2.0 under [training]"
    assert unknown.mend == 'did you mean "training.sharpness"?'

    write(workspace, ("sharpness = 3.0", "sharpness = 0.0\nbeta = 1.0"))
    found = {problem.key: problem.message for problem in workspace.problems("value_head.type=mlp")}
    assert found == {
        "training.sharpness": "must be a number above 0, not 0.0",
        "training.beta": "belongs to stage verifiable, not to entropy",
        "value_head": "belongs to stages critic and verifiable, not to entropy",
    }


def test_the_other_stages_know_it(workspace, entropy):
    workspace.write_config("baseline", ('stage = "baseline"', 'stage = "entropi"'))
    assert workspace.problems()[0].mend == 'did you mean "entropy"?'
    workspace.write_config("baseline")
    (problem,) = workspace.problems("training.sharpness=1")
    assert problem.message == "belongs to stage entropy, not to baseline"
    (problem,) = workspace.problems("models.reference.path=x")
    assert problem.message == "belongs to stages rho1 and entropy, not to baseline"


def test_it_is_gone_after_the_test():
    assert stage_names() == ("baseline", "critic", "verifiable", "rho1")


def test_a_stage_is_declared_once(entropy):
    with pytest.raises(TypeError, match="'entropy' is declared twice"):

        class _Again(TrainingConfig, stage="entropy"):
            pass
