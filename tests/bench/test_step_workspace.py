"""What a measurement reads: the stage's own config with made-up models and data, whose shares are as documented."""

import dataclasses
import json
from itertools import islice
from pathlib import Path

import pytest

from wmtp_ds.bench.settings import StepSettings
from wmtp_ds.bench.workspace import config_root, resolve, write_workspace
from wmtp_ds.config import load_config
from wmtp_ds.config.training import stage_names
from wmtp_ds.errors import UserError
from wmtp_ds.models.loading import check_architecture
from wmtp_ds.run_data import open_data

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = StepSettings("verifiable", "micro", "cpu", 1, sequence_length=256, steps=4, warmup=2, attention="eager")
CHOSEN = ["training.batch_size=4", "training.gradient_accumulation_steps=2", 'models.policy.dtype="float32"']


def test_settings_survive_the_way_to_the_ranks(tmp_path):
    settings = dataclasses.replace(SETTINGS, peak_tflops=1.5)
    settings.write(tmp_path)
    assert StepSettings.read(tmp_path) == settings


@pytest.mark.parametrize("stage", ["baseline", "critic", "verifiable", "rho1"])
def test_the_config_is_the_stages_own(stage, tmp_path, monkeypatch):
    """But for the models, the data, the device, and what options and overrides say."""
    monkeypatch.chdir(REPOSITORY)
    own = load_config(REPOSITORY / "stage_configs" / f"{stage}.toml", checks=False, environ={}).flat()
    settings = dataclasses.replace(SETTINGS, stage=stage)
    made = resolve(settings, tmp_path, CHOSEN, ["training.weight_decay=0.05", "training.batch_size=9"]).flat()
    changed = {key for key in own.keys() | made.keys() if own.get(key) != made.get(key)}
    files = {"models.policy.path", "models.policy.tokenizer_path", "dataset.train", "dataset.validation"}
    expected = files | {
        "experiment.name",
        "models.policy.dtype",
        "dataset.cache_dir",
        "dataset.max_length",
        "data_sampling.n_samples",
        "training.n_epochs",
        "training.max_steps",
        "training.gradient_accumulation_steps",
        "training.weight_decay",
        "checkpoint.save_dir",
        "runtime.device",
        "deepspeed.config",
        "mlflow.tracking_uri",
    }
    if stage == "rho1":
        reference = {"path", "tokenizer_path", "dtype"}
        expected |= {f"models.reference.{key}" for key in reference} | {"deepspeed.reference_config"}
    assert changed <= expected | {"training.batch_size"}
    assert changed >= expected - {"dataset.max_length"}
    assert made["training.batch_size"] == 4  # an option wins over an override
    assert made["training.weight_decay"] == 0.05
    if stage == "rho1":
        assert made["models.reference.dtype"] == "float32"
    assert made["training.log_interval"] == own["training.log_interval"]


def test_rows_are_as_documented(tmp_path):
    resolved = resolve(SETTINGS, tmp_path, CHOSEN, [])
    write_workspace(tmp_path, resolved, SETTINGS)
    assert load_config(tmp_path / "config.toml", checks=False, environ={}).flat() == resolved.flat()
    data = open_data(resolved, 1)
    assert data.total_steps == SETTINGS.warmup + 2 * SETTINGS.steps + 2
    assert data.too_long == 0
    windows = data.windows(0, 0, 1)
    batches = [batch for window in islice(windows, 10) for batch in window]
    windows.close()
    assert len(batches) == 20
    lengths = [int(length) for batch in batches for length in (batch.segment_ids > 0).sum(1)]
    assert set(lengths) == {256, 154}  # whole, or three fifths
    positions = sum(batch.input_ids.numel() for batch in batches)
    assert sum(lengths) / positions == pytest.approx(0.9, abs=0.06)
    assert sum(int(batch.supervised.sum()) for batch in batches) / sum(lengths) == pytest.approx(0.75, abs=0.01)
    rewards = [float(reward) for batch in batches for reward in batch.rewards]
    assert sum(rewards) / len(rewards) == pytest.approx(0.5, abs=0.1)
    assert data.collator.truncated == data.collator.skipped == 0
    unknown = data.tokenizer.unk_token_id
    solutions = [token for batch in batches for token in batch.input_ids[batch.supervised].tolist()]
    assert unknown not in solutions
    assert max(solutions) > 31_000


def test_attention_reaches_the_model(tmp_path):
    write_workspace(tmp_path, resolve(SETTINGS, tmp_path, CHOSEN, []), SETTINGS)
    assert check_architecture(tmp_path / "policy")._attn_implementation == "eager"
    assert json.loads((tmp_path / "policy/config.json").read_text())["vocab_size"] == 32_000


def test_a_stage_of_ones_own_can_be_measured(tmp_path):
    """Nothing here knows a stage by name; one without a config is told so."""
    with pytest.raises(UserError, match=r"--stage criti: there is no such stage; did you mean .?critic"):
        resolve(dataclasses.replace(SETTINGS, stage="criti"), tmp_path, [], [])
    source = (REPOSITORY / "wmtp_ds/bench").glob("*.py")
    code = "\n".join(file.read_text() for file in source)
    assert not [name for name in stage_names() if f'"{name}"' in code]


def test_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_root() == REPOSITORY
    for name in ("stage_configs", "ds_configs"):
        (tmp_path / name).mkdir()
    assert config_root() == tmp_path
