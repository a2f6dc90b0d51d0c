"""A checkpoint is resumed by the run that it belongs to, and by no other."""

import shutil
from pathlib import Path

import pytest

from wmtp_ds.checkpoint_files import write_manifest
from wmtp_ds.config import load_config
from wmtp_ds.errors import UserError
from wmtp_ds.launch import Request, prepare_launch
from wmtp_ds.resume import check_resume, find_checkpoint, fit_ranks, same_table


def resolve(stage: str, *overrides: str):
    return load_config(Path(f"stage_configs/local/{stage}.toml"), overrides)


def rewrite(saved: Path, old: str, new: str, **facts: int) -> None:
    """As if the run had been made with another value."""
    folder = saved / "step_00000002"
    config = folder / "config.toml"
    config.write_text(config.read_text().replace(old, new))
    write_manifest(folder, **{"step": 2, "world_size": 2, "global_batch": 16} | facts)


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
            write_manifest(folder, step=step, world_size=2, global_batch=16)
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
        ('training.optimizer="sgd"', "training.optimizer was adamw, now sgd"),
        ("dataset.max_length=128", "dataset.max_length was 256, now 128"),
        ('models.policy.path="storage/models/micro-reference"', "models.policy.path was storage/models/micro-policy"),
    ],
)
def test_another_run_is_refused(saved: Path, override: str, line: str) -> None:
    if "path" in override:
        rewrite(saved, "storage/models/micro-policy", "storage/models/other")
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


@pytest.mark.parametrize("damage", ["= no toml", ""])
def test_a_damaged_config_is_said(saved: Path, damage: str) -> None:
    (saved / "step_00000002/config.toml").write_text(damage)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged\..*\n.*config\.toml has \d+ bytes"):
        check_resume(resolve("baseline"), "auto")


def test_the_one_before_is_compared_where_the_newest_is_damaged(saved: Path) -> None:
    """Before any rank starts: its config may be unreadable, or another one."""
    later = saved / "step_00000006"
    shutil.copytree(saved / "step_00000002", later)
    (saved / "latest").write_text("step_00000006\n")
    assert find_checkpoint(saved, "auto") == later
    text = (later / "config.toml").read_text()
    for damaged in ("= no toml", text.replace("256", "257")):  # the second is of the same size
        (later / "config.toml").write_text(damaged)
        assert find_checkpoint(saved, "auto") == saved / "step_00000002"
        assert check_resume(resolve("baseline"), "auto") == []
        with pytest.raises(UserError, match=r"--resume .*step_00000006: the checkpoint is damaged: config\.toml has"):
            check_resume(resolve("baseline"), str(later))


# --- another number of ranks: the config says 4 rows × 2 steps, and 2 ranks made the checkpoint ---


@pytest.mark.parametrize(
    ("ranks", "overrides", "expected"),
    [
        (2, [], (4, 2)),
        (1, [], (4, 4)),
        (4, [], (4, 1)),
        (8, [], (2, 1)),  # the micro-batch only where accumulation is used up
        (16, [], (1, 1)),
        # What is asked for by hand and fits is taken as it is.
        (1, ["training.batch_size=16", "training.gradient_accumulation_steps=1"], (16, 1)),
        (2, ["training.batch_size=2", "training.gradient_accumulation_steps=4"], (2, 4)),
    ],
)
def test_the_global_batch_is_kept(saved: Path, ranks: int, overrides: list[str], expected: tuple[int, int]) -> None:
    given = resolve("baseline", *overrides)
    resolved, lines = fit_ranks(given, "auto", ranks)
    training = resolved.config.training
    assert (training.batch_size, training.gradient_accumulation_steps) == expected
    assert expected[0] * expected[1] * ranks == 16
    told = {
        "training.batch_size was 4, now": expected[0] != 4,
        "training.gradient_accumulation_steps was 2, now": expected[1] != 2,
        f"ranks: 2 before, now {ranks}; a step reads 16 rows as before": ranks != 2,
    }
    for line, is_told in told.items():
        assert any(text.startswith(line) for text in lines) == is_told, (line, lines)
    # The run stays the one that was given: for MLflow, for the checkpoints to come, and for the next resume.
    assert (resolved.toml(), resolved.flat(), resolved.hash()) == (given.toml(), given.flat(), given.hash())
    ds_config = resolved.deepspeed(ranks)
    assert ds_config["train_batch_size"] == 16
    assert ds_config["train_micro_batch_size_per_gpu"] == expected[0]


def test_and_so_it_is_at_the_next_resume(saved: Path) -> None:
    """From a checkpoint that one rank made, which had been cut for it."""
    rewrite(saved, "", "", world_size=1)
    for ranks, expected in ((1, 4), (2, 2), (4, 1)):
        resolved, _ = fit_ranks(resolve("baseline"), "auto", ranks)
        assert resolved.config.training.gradient_accumulation_steps == expected


@pytest.mark.parametrize("ranks", [3, 5, 32])
def test_what_cannot_be_shared_is_refused_with_the_arithmetic(saved: Path, ranks: int) -> None:
    with pytest.raises(UserError) as error:
        fit_ranks(resolve("baseline"), "auto", ranks)
    assert (
        "the run's steps read 16 rows (training.batch_size 4 × training.gradient_accumulation_steps 2 in the config), "
        f"and 16 / {ranks} ranks is not whole. Start it with one of these numbers of ranks: 1, 2, 4, 8, 16."
    ) in str(error.value)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_another_global_batch_is_refused_with_the_arithmetic(saved: Path, ranks: int) -> None:
    with pytest.raises(UserError) as error:
        fit_ranks(resolve("baseline", "training.batch_size=3"), "auto", ranks)
    assert (
        "belongs to a run whose steps read 16 rows, and training.batch_size 3 × "
        f"training.gradient_accumulation_steps 2 × {ranks} ranks = {6 * ranks}."
    ) in str(error.value)


def test_sgd_is_not_converted(saved: Path) -> None:
    rewrite(saved, 'optimizer = "adamw"', 'optimizer = "sgd"')
    sgd = resolve("baseline", "training.optimizer=sgd")
    assert fit_ranks(sgd, "auto", 2) == (sgd, [])
    with pytest.raises(UserError, match=r"made by 2 ranks and this run has 4, which .*'sgd' cannot .*--num_gpus 2"):
        fit_ranks(sgd, "auto", 4)


def test_groups_that_are_micro_batches_are_said_to_change(saved: Path) -> None:
    rewrite(saved, resolve("baseline").toml(), resolve("rho1").toml())
    for ranks, changes in ((4, False), (8, True)):
        _, lines = fit_ranks(resolve("rho1"), str(saved), ranks)
        assert any("selection_scope" in line for line in lines) == changes


def test_the_launcher_refuses_before_it_starts_ranks(saved: Path) -> None:
    request = Request(stage="baseline", config=Path("stage_configs/local/baseline.toml"), resume="auto", num_gpus=3)
    with pytest.raises(UserError, match="16 / 3 ranks is not whole"):
        prepare_launch(request)


def test_a_run_that_starts_anew_is_not_cut(saved: Path) -> None:
    given = resolve("baseline")
    assert fit_ranks(given, "never", 3) == (given, [])
