"""Scores of something else are refused, with the reason: when a config is validated, or else before training starts."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from score_checkout import REFERENCE, TRAIN, work, write_rows

from wmtp_ds.assembly import build_reference, check_models
from wmtp_ds.config import ConfigError, Resolved, load_config
from wmtp_ds.errors import UserError
from wmtp_ds.machines import check_machines
from wmtp_ds.plan.reading import Sizes, read_setup
from wmtp_ds.resume import check_resume
from wmtp_ds.run_data import RunData, open_data
from wmtp_ds.scores.manifest import JOURNAL, MANIFEST, read_manifest
from wmtp_ds.scores.scoring import Scoring
from wmtp_ds.scores.use import use_scores

CONFIG = Path("stage_configs/local/rho1.toml")
USUAL = (
    'models.reference.scores="scores"',
    "dataset.max_length=320",
    'dataset.cache_dir=""',
    "data_sampling.n_samples=8",
    'mlflow.tracking_uri=""',
)


def resolve(*overrides: str, checks: bool = True) -> Resolved:
    return load_config(CONFIG, [*USUAL, *overrides], checks=checks, environ={})


def use(*overrides: str) -> RunData:
    """What a rank does before the process group forms, for whom nothing was checked before."""
    resolved = resolve(*overrides, checks=False)
    data = open_data(resolved, 1)
    use_scores(resolved, data)
    return data


def said_by_validate(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(*overrides)
    [problem] = caught.value.problems
    return f"{problem.key}: {problem.message} -> {problem.mend}"


def said_by_training(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        use(*overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_scores_that_fit(there: Path) -> None:
    assert resolve().warnings == []
    data = use()
    assert data.scores is not None
    window = next(data.windows(0, 0, 1))
    assert all(batch.reference is not None and batch.reference[batch.supervised].all() for batch in window)
    assert all(batch.reference is None for batch in data.validation_batches(0, 1))  # which compare with nothing
    tags = data.scores.tags
    assert tags["reference_scores"] == "scores (float32, computed in float32)"
    assert tags["reference_fingerprint"] == read_manifest(Path("scores")).reference.fingerprint


def change_data(root: Path) -> None:
    text = TRAIN.read_text()
    TRAIN.write_text(text.replace("Add 3.", "Add 4."))


def longer_data(root: Path) -> None:
    write_rows(TRAIN, 40)


def other_data(root: Path) -> None:
    TRAIN.rename(TRAIN.with_name("more.jsonl"))
    write_rows(TRAIN.with_name("more.jsonl"), 40)


def retokenize(root: Path) -> None:
    """The same tokens, in another order."""
    for model in ("policy", "reference"):
        file = root / f"storage/models/micro-{model}/tokenizer.json"
        content = json.loads(file.read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        file.write_text(json.dumps(content))


def retrain(root: Path) -> None:
    """Another bit in the weights, all sizes and headers as before."""
    file = root / REFERENCE / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def reshape(root: Path) -> None:
    file = root / REFERENCE / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-3}))


def half_write(root: Path) -> None:
    (root / "scores" / MANIFEST).rename(root / "scores" / JOURNAL)


def cut(root: Path) -> None:
    file = root / "scores/input0-00001.npy"
    file.write_bytes(file.read_bytes()[:-1])


def flip(root: Path) -> None:
    file = root / "scores/input0-00001.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def remove(root: Path) -> None:
    shutil.rmtree(root / "scores")


def edit(root: Path) -> None:
    file = root / "scores" / MANIFEST
    file.write_text(file.read_text().replace('"max_length": 320', '"max_length": 321'))


def nothing(root: Path) -> None:
    pass


BOTH, TRAINING = True, False
MORE = "storage/data/sample/more.jsonl"


@pytest.mark.parametrize(
    ("change", "overrides", "reason", "where"),
    [
        (change_data, (), "train.jsonl: the data have changed since they were scored", BOTH),
        (longer_data, (), "train.jsonl: the data have changed since they were scored", BOTH),
        (other_data, (f'dataset.train="{MORE}"',), "more.jsonl: these data were not scored", BOTH),
        (retokenize, (), "micro-policy holds another tokenizer than storage/models/micro-reference was", BOTH),
        (retrain, (), "micro-reference holds another model than ", TRAINING),
        (reshape, (), "micro-reference holds another model than ", BOTH),
        (nothing, ("dataset.max_length=321",), "dataset.max_length: is 321, and the scores in scores were", BOTH),
        (nothing, ('dataset.template="plain"',), 'dataset.template: is "plain", and the scores in scores', BOTH),
        (nothing, ('models.reference.dtype="bfloat16"',), "would compute in bfloat16, and the scores", BOTH),
        (half_write, (), "scores is half written: run the same wmtp-ds data score again", BOTH),
        (cut, (), "input0-00001.npy is damaged: it has ", BOTH),
        (flip, (), "input0-00001.npy is damaged: its SHA-256 differs: run the wmtp-ds data sc", TRAINING),
        (remove, (), "scores does not exist", BOTH),
        (edit, (), "manifest.json is damaged: its checksum differs", BOTH),
        (nothing, ('models.reference.scores="storage"',), "holds no reference scores: manifest.json is", BOTH),
        (nothing, ('models.reference.scores="stage_configs/rho1.toml"',), "is a file, not a folder of reference", BOTH),
    ],
)  # fmt: skip
def test_stale_scores_are_refused(
    here: Path, change: Callable[[Path], None], overrides: tuple[str, ...], reason: str, where: bool
) -> None:
    change(here)
    assert reason in said_by_training(*overrides)
    if where == BOTH:
        assert reason in said_by_validate(*overrides)
    else:
        assert resolve(*overrides).warnings == []  # that takes reading every byte


def test_all_reasons_are_said_at_once_with_the_command_that_helps(here: Path) -> None:
    longer_data(here)
    said = said_by_training("dataset.max_length=80", 'dataset.template="plain"')
    assert all(key in said for key in ("dataset.train", "dataset.max_length", "dataset.template"))
    assert (
        "wmtp-ds data score --reference storage/models/micro-reference --input storage/data/sample/train.jsonl "
        "--output scores --tokenizer storage/models/micro-policy --template plain --max-length 80 "
        "--compute-dtype float32 --force"
    ) in said


def test_a_large_data_file_is_told_by_its_size_at_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wmtp_ds.config.check_scores._MOST_BYTES", 100)
    assert resolve().warnings == []
    change_data(here)
    assert resolve().warnings == []
    assert "the data have changed" in said_by_training()
    longer_data(here)
    assert "the data have changed" in said_by_validate()


def test_a_reference_that_was_copied_is_the_same(here: Path) -> None:
    moved = shutil.copytree(REFERENCE, "moved", copy_function=shutil.copy)
    (Path(moved) / "model.safetensors").touch()
    assert use(f'models.reference.path="{moved}"').scores is not None
    assert resolve(f'models.reference.path="{moved}"').warnings == []


def test_a_reference_that_is_not_there_is_warned_about_and_not_needed(here: Path) -> None:
    shutil.rmtree(REFERENCE)
    [warning] = resolve().warnings
    assert "micro-reference does not exist, so nobody can tell whether the scores in scores are of that" in str(warning)
    assert use().scores is not None
    check_models(resolve())
    assert build_reference(resolve()) is None


def test_no_path_at_all(here: Path) -> None:
    plain, text = (here / "stage_configs/rho1.toml").read_text(), CONFIG.read_text()
    (here / "plain.toml").write_text(plain.replace('path = "storage/models/ref', "# path"))
    text = text.replace('extends = "../rho1.toml"', f'extends = "{here}/plain.toml"')
    file = here / "run.toml"
    file.write_text(text.replace('path = "storage/models/micro-reference"', "#"))
    resolved = load_config(file, USUAL, environ={})
    assert resolved.warnings == []
    assert resolved.config.models.reference.path is None
    assert "models.reference.path" not in resolved.flat()
    assert resolved.flat()["models.reference.scores"] == "scores"
    data = open_data(resolved, 1)
    use_scores(resolved, data)
    assert data.scores is not None
    with pytest.raises(ConfigError) as caught:
        load_config(file, USUAL[1:], environ={})
    [problem] = caught.value.problems
    assert problem.key == "models.reference.path"
    assert "is required by stage rho1: the reference model's folder" in problem.message
    assert "wmtp-ds data score" in problem.mend


def test_rows_that_were_not_scored(here: Path) -> None:
    Scoring(work("right", correct_only=True)).run()
    assert use('models.reference.scores="right"').scores is not None
    said = said_by_training('models.reference.scores="right"', "data_sampling.correct_ratio=0.5")
    assert "the run draws " in said
    assert "rows that were not scored, first storage/data/sample/train.jsonl:" in said
    assert "of correct rows alone (--correct-only)" in said


def test_one_rank_of_a_machine_reads_every_byte(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(here)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert use().scores is not None
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "its SHA-256 differs" in said_by_training()


def test_machines_with_other_scores(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each machine reads its own: another one's manifest must say the same."""
    data, folder = use(), type("Folder", (), {"check_shared": lambda *_: None})()

    def gather(own: tuple) -> list:
        facts = dict(own[1])
        [name] = [name for name in facts if name.startswith("models.reference.scores")]
        return [own, ("other", facts | {name: "0" * 64})]

    monkeypatch.setattr("wmtp_ds.distributed.gather_objects", gather)
    with pytest.raises(UserError, match=r"models.reference.scores \(scores\) is another on other than on"):
        check_machines(resolve(), folder, data, None)


def test_nothing_is_planned_for_a_reference(there: Path) -> None:
    def read(*overrides: str) -> tuple:
        reading = read_setup(resolve(*overrides), ranks=2, device="cpu", sizes=Sizes(), kernels="torch")
        return reading.setup, reading.notes

    cached, notes = read()
    assert cached.reference is None
    assert cached.selects
    assert "reference: none in memory; its losses are read from models.reference.scores" in notes
    live = read_setup(load_config(CONFIG, USUAL[1:], environ={}), ranks=2, device="cpu", sizes=Sizes(), kernels="torch")
    assert live.setup.reference is not None
    assert replace(live.setup, reference=None) == cached


def test_the_word_of_the_issue_leads_to_the_key(there: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIG, ["reference.scores=scores"], environ={})
    assert any('did you mean "models.reference"?' in problem.mend for problem in caught.value.problems)


def test_float16_scores_on_a_cpu(here: Path) -> None:
    """The reference computes nothing there: what it was computed in elsewhere is no matter of this machine."""
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIG, [*USUAL[1:], 'models.reference.dtype="float16"'], environ={})
    assert [problem.key for problem in caught.value.problems] == ["models.reference.dtype"]
    assert "would compute in float16" in said_by_validate('models.reference.dtype="float16"')


def test_other_stages_have_no_scores(there: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Path("stage_configs/local/baseline.toml"), ['models.reference.scores="scores"'], environ={})
    assert "belongs to stage rho1" in str(caught.value)


def test_validate_says_it_without_torch(here: Path) -> None:
    longer_data(here)
    typed = ["validate", str(CONFIG), *(word for text in USUAL for word in ("--override", text))]
    code = (
        "import sys\nfrom wmtp_ds.cli.main import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        "    print(*{'torch', 'transformers', 'numpy', 'mlflow'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code, *typed], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "\n")
    assert "the data have changed since they were scored" in done.stderr


def test_a_run_may_go_on_with_scores(here: Path) -> None:
    """The reference is the same, so what is trained is: it is said, not refused."""
    from wmtp_ds.checkpoint_files import write_manifest

    live = load_config(CONFIG, USUAL[1:], environ={})
    folder = Path(live.config.checkpoint.save_dir) / "step_00000002"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(live.toml())
    write_manifest(folder, step=2, world_size=1, global_batch=8)
    assert check_resume(resolve(), "auto") == ["models.reference.scores was not set, now scores"]


def test_arrays_are_not_read_into_memory(there: Path) -> None:
    data = use()
    assert data.scores is not None
    assert all(isinstance(shard.base, np.memmap) for shard in data.scores._shards)
