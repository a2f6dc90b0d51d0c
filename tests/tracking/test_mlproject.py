"""MLproject, read by MLflow itself."""

import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["baseline", "critic", "verifiable", "rho1"]


@pytest.fixture(scope="module")
def project():
    from mlflow.projects import _project_spec

    return _project_spec.load_project(str(ROOT))


def test_there_is_one_entry_point_a_stage(project):
    names = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    assert list(names) == [f"{stage}_training" for stage in STAGES]
    for name in names:
        assert list(project.get_entry_point(name).parameters) == ["config", "critic_checkpoint"]


@pytest.mark.parametrize("stage", STAGES)
def test_defaults(project, stage):
    command = project.get_entry_point(f"{stage}_training").compute_command({}, None)
    expected = ["wmtp-ds", "train", "--stage", stage, "--config", f"stage_configs/{stage}.toml"]
    if stage == "verifiable":
        expected += ["--critic-checkpoint", ""]
    assert shlex.split(command) == expected


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_reach_the_command_and_no_shell(project, stage):
    config, critic = "a b.toml; touch x", "runs:/0123abcd/checkpoints/checkpoint_best"
    command = project.get_entry_point(f"{stage}_training").compute_command(
        {"config": config, "critic_checkpoint": critic}, None
    )
    words = shlex.split(command)
    assert words[:6] == ["wmtp-ds", "train", "--stage", stage, "--config", config]
    assert words[6:] == (["--critic-checkpoint", critic] if stage == "verifiable" else [])
