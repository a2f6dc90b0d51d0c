"""A checkpoint is resumed by the run that it belongs to, and by no other."""

import shutil
from pathlib import Path

import pytest

from wmtp_ds.config import load_config
from wmtp_ds.errors import UserError
from wmtp_ds.launch import Request, prepare_launch
from wmtp_ds.resume import check_resume, find_checkpoint, same_table


def resolve(stage: str, *overrides: str):
    return load_config(Path(f"stage_configs/local/{stage}.toml"), overrides)


@pytest.fixture
def saved(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    """A run of the baseline with a complete checkpoint of step 2 and a later one that lacks its manifest."""
    monkeypatch.chdir(checkout)
    root = Path("checkpoints/local-baseline")
    config = resolve("baseline").toml()
    for step, complete in ((2, True), (4, False)):
        folder = root / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(config)
        if complete:
            (folder / "manifest.json").write_text("{}")
    (root / "latest").write_text("step_00000002\n")
    yield root
    shutil.rmtree(root)


def test_the_newest_complete_checkpoint_is_found(saved: Path) -> None:
    assert find_checkpoint(saved, "auto") == saved / "step_00000002"
    assert find_checkpoint(Path("elsewhere"), str(saved)) == saved / "step_00000002"
    assert find_checkpoint(Path("elsewhere"), "auto") is None
    assert find_checkpoint(saved, "never") is None


def test_an_incomplete_checkpoint_is_no_reason_to_start_from_zero(saved: Path) -> None:
    (saved / "step_00000002/manifest.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is complete \(step_00000004 has no manifest\.json\)"):
        find_checkpoint(saved, "auto")


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("nonsense", "--resume nonsense: there is no such folder"),
        ("", "--resume '': there is no such folder"),
        ("stage_configs/baseline.toml", "is a file, not a folder"),
        ("stage_configs", "neither a checkpoint nor a run's folder"),
    ],
)
def test_what_is_no_checkpoint_is_said_before_the_launcher_starts(saved: Path, resume: str, message: str) -> None:
    request = Request(stage="baseline", config=Path("stage_configs/local/baseline.toml"), resume=resume)
    with pytest.raises(UserError, match=message):
        prepare_launch(request)


def test_the_same_config_resumes_without_a_word(saved: Path) -> None:
    assert check_resume(resolve("baseline"), "auto") == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data_sampling.n_samples=16", "data_sampling.n_samples was 512, now 16"),
        ("training.batch_size=2", "training.batch_size was 4, now 2"),
        ('training.optimizer="sgd"', "training.optimizer was adamw, now sgd"),
        ("dataset.max_length=128", "dataset.max_length was 256, now 128"),
        ('models.policy.path="storage/models/micro-reference"', "models.policy.path was storage/models/micro-policy"),
    ],
)
def test_another_run_is_refused(saved: Path, override: str, line: str) -> None:
    if "path" in override:
        before = saved / "step_00000002/config.toml"
        before.write_text(before.read_text().replace("storage/models/micro-policy", "storage/models/other"))
        override, line = (
            "training.max_steps=40",
            "models.policy.path was storage/models/other, now storage/models/micro",
        )
    with pytest.raises(UserError, match="belongs to another run") as error:
        check_resume(resolve("baseline", override), "auto")
    assert line in str(error.value)


def test_another_stage_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match=r"experiment\.stage was baseline, now rho1"):
        check_resume(resolve("rho1"), str(saved))


def test_what_may_change_is_said(saved: Path) -> None:
    changed = check_resume(
        resolve("baseline", "training.warmup_ratio=0.5", "training.max_steps=50", 'experiment.description="x"'),
        "auto",
    )
    assert changed == ["training.max_steps was 30, now 50", "training.warmup_ratio was 0.03, now 0.5"]


def test_packing_may_change_and_where_tokens_are_kept(saved: Path) -> None:
    changed = check_resume(resolve("baseline", "data_sampling.pack_sequences=true", 'dataset.cache_dir="x"'), "auto")
    assert changed == ["data_sampling.pack_sequences was False, now True"]


def test_a_table_is_compared(saved: Path) -> None:
    checkpoint = saved / "step_00000002"
    assert same_table(checkpoint, resolve("baseline", "training.max_steps=7"), "early_stopping")
    assert not same_table(checkpoint, resolve("baseline", "early_stopping.enabled=true"), "early_stopping")


def test_a_damaged_config_is_said(saved: Path) -> None:
    (saved / "step_00000002/config.toml").write_text("= no toml")
    with pytest.raises(UserError, match=r"config\.toml cannot be read"):
        check_resume(resolve("baseline"), "auto")
