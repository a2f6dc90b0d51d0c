"""Hundreds of near-valid configurations through ``wmtp-ds validate``; `tests/soak` tries thousands.

Never a traceback, never a hang; what must be refused is, by file, line and key; what means the same is taken the same.
"""

import contextlib
from pathlib import Path

import pytest
from config_workspace import Workspace
from fuzz_config import (
    STAGES,
    cases,
    check_case,
    check_end,
    check_prints,
    deepspeed_cases,
    make_world,
    meaning,
    overrides,
    settings_of,
    variables,
)
from hypothesis import given
from hypothesis import strategies as st
from in_process import command, examples

from wmtp_ds.config.keys import all_keys

KEYS = sorted(all_keys())
ODD_KEYS = [
    "data_sampling.curriculum_schedule[0].epoch_range",
    "training.betas[0]",
    "models.policy",
    "experiment.tags.x",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_world(tmp_path_factory.mktemp("configs"))


@pytest.fixture
def world(made: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(made.root)
    return made


@pytest.fixture(scope="module")
def meanings(made: Workspace) -> dict[str, object]:
    """What each of the real ones means, by stage."""
    with contextlib.chdir(made.root):
        return {stage: meaning(f"stage_configs/{stage}.toml") for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
@examples(70)
@given(data=st.data())
def test_changed_files(world: Workspace, meanings: dict[str, object], stage: str, data: st.DataObject) -> None:
    text = Path(f"stage_configs/{stage}.toml").read_text()
    case = data.draw(cases(stage, "run.toml", text))
    check_case(world, "run.toml", case, meanings[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_the_real_ones_are_valid(world: Workspace, stage: str) -> None:
    for file in (f"stage_configs/{stage}.toml", f"stage_configs/local/{stage}.toml"):
        assert command("validate", file).code == 0
        assert len(settings_of(Path(file).read_text())) > 15
        check_prints(world, file, meaning(file))


@examples(100)
@given(
    stage=st.sampled_from(STAGES),
    typed=st.lists(overrides(KEYS + ODD_KEYS), max_size=3),
    environ=st.one_of(st.just({}), variables(KEYS + ODD_KEYS)),
)
def test_overrides_and_variables(world: Workspace, stage: str, typed: list[str], environ: dict[str, str]) -> None:
    file = f"stage_configs/local/{stage}.toml"
    options = [part for text in typed for part in ("--override", text)]
    done = command("validate", file, *options, environ=environ)
    check_end(done)
    shown = command("show", file, *options, environ=environ)
    assert shown.code == 0 or done.code == 2
    if done.code == 0 and "***" not in shown.out:
        world.write("printed.toml", shown.out)
        assert command("show", "printed.toml", "--json").code == 0


@examples(60)
@given(data=st.data())
def test_changed_deepspeed_files(world: Workspace, data: st.DataObject) -> None:
    file = "ds_configs/changed.json"
    name = data.draw(st.sampled_from(["zero3", "zero3_cpu", "zero3_offload"]))
    case = data.draw(deepspeed_cases(file, Path(f"ds_configs/{name}.json").read_text()))
    world.path(file).write_bytes(case.content)
    done = command("validate", "stage_configs/rho1.toml", "--override", f"deepspeed.config={file}")
    check_end(done, *case.says)
    assert (done.code == 2) == (case.verdict == "refused"), f"{case.what}: {done}"
