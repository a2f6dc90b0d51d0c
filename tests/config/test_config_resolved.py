"""What a resolved configuration gives to others: flat values, TOML, a hash, DeepSpeed's JSON."""

import re
import tomllib
from pathlib import Path

import pytest

from wmtp_ds.config import ConfigError, load_config
from wmtp_ds.config.keys import all_keys, parse_key, stages_with
from wmtp_ds.config.layers import schema_defaults

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = ("baseline", "critic", "verifiable", "rho1")
PHASES = """
[[data_sampling.curriculum_schedule]]
epoch_range = [0.0, 1.0]
difficulty_weights = { low = 1.0 }
"""


def shipped(name):
    return load_config(REPOSITORY / "stage_configs" / name, environ={}, checks=False)


def test_flat_has_plain_values_under_names_that_mlflow_takes(workspace):
    workspace.write_config("verifiable", append=PHASES)
    flat = workspace.load("experiment.tags=['x']").flat()
    assert flat["experiment.name"] == "trial"
    assert flat["training.batch_size"] == 2
    assert flat["training.betas"] == [0.9, 0.95]
    assert flat["data_sampling.curriculum_schedule.0.epoch_range"] == [0.0, 1.0]
    assert flat["data_sampling.curriculum_schedule.0.difficulty_weights.low"] == 1.0
    assert flat["experiment.tags.x"] == "true"
    assert flat["models.policy.path"] == "models/policy"
    for absent in ("training.max_steps", "models.reference.path", "training.k_percent"):
        assert absent not in flat
    assert all("[" not in key for key in flat)
    assert all(isinstance(value, str | int | float | bool | list) for value in flat.values())


@pytest.mark.parametrize("stage", STAGES)
def test_toml_holds_the_same_config_without_layers(workspace, stage):
    workspace.write_config(stage, append=PHASES if stage == "verifiable" else "")
    resolved = workspace.load('dataset.name="a \\"b\\" ü \\u007f"', "experiment.description=${experiment.name}")
    text = resolved.toml()
    assert "${" not in text
    workspace.write("run.toml", text)
    again = workspace.load(environ={})
    assert again.config == resolved.config
    assert again.flat() == resolved.flat()
    assert again.hash() == resolved.hash()
    assert again.toml() == text


def test_every_value_has_an_origin(workspace):
    workspace.write_config("verifiable", append=PHASES)
    resolved = workspace.load()
    keys = {key.replace("[", ".").replace("]", "") for key in resolved.origins}
    assert set(resolved.flat()) <= keys


def test_hash_depends_on_values_alone(workspace):
    workspace.write_config("baseline")
    plain = workspace.load().hash()
    assert len(plain) == 16
    assert int(plain, 16) >= 0
    same = workspace.load("training.batch_size=2", "training.n_epochs=1", "training.weight_decay=0.0").hash()
    assert same == plain
    assert workspace.load("training.batch_size=3").hash() != plain


def test_credentials_stay_in_the_config_and_out_of_everything_else(workspace):
    workspace.write_config("baseline", ('uri = ""', 'uri = "https://user:hunter2@host/x?token=abc123"'))
    resolved = workspace.load()
    assert resolved.config.mlflow.tracking_uri == "https://user:hunter2@host/x?token=abc123"
    assert resolved.flat()["mlflow.tracking_uri"] == "https://***@host/x?token=***"
    assert "hunter2" not in resolved.toml()
    assert "abc123" not in resolved.toml()


def test_deepspeed_gets_what_the_toml_owns(workspace):
    workspace.write_json("ds/zero3.json", {"zero_optimization": {"stage": 3}, "checkpoint": {"parallel_write": {}}})
    workspace.write_config(
        "baseline", ("batch_size = 2", "batch_size = 2\ngradient_accumulation_steps = 3\nmax_grad_norm = 0.0")
    )
    merged = workspace.load().deepspeed(world_size=4)
    assert merged["zero_optimization"] == {"stage": 3}
    assert merged["train_micro_batch_size_per_gpu"] == 2
    assert merged["gradient_accumulation_steps"] == 3
    assert merged["train_batch_size"] == 24
    assert merged["gradient_clipping"] == 0.0
    assert merged["checkpoint"] == {"parallel_write": {}, "tag_validation": "Fail"}
    assert merged["wall_clock_breakdown"] is False
    assert merged["steps_per_print"] > 10**9
    assert "optimizer" not in merged


@pytest.mark.parametrize(
    ("dtype", "mixed", "section"),
    [
        ("float32", True, None),
        ("bfloat16", True, "bf16"),
        ("float16", True, "fp16"),
        ("bfloat16", False, None),
        ("float16", False, None),
    ],
)
def test_precision_follows_dtype(workspace, dtype, mixed, section):
    workspace.write_config("rho1")
    overrides = [f"models.{model}.dtype={dtype}" for model in ("policy", "reference")]
    resolved = workspace.load(*overrides, f"runtime.mixed_precision={str(mixed).lower()}")
    for merged in (resolved.deepspeed(1), resolved.deepspeed_reference()):
        assert {name: merged[name] for name in ("bf16", "fp16") if name in merged} == (
            {section: {"enabled": True}} if section else {}
        )


def test_sgd_is_allowed_to_deepspeed(workspace):
    workspace.write_config("baseline")
    assert workspace.load("training.optimizer=sgd").deepspeed(1)["zero_allow_untested_optimizer"] is True
    assert "zero_allow_untested_optimizer" not in workspace.load().deepspeed(1)


def test_the_reference_gets_no_optimizer_and_its_own_file(workspace):
    workspace.write_json("ds/reference.json", {"zero_optimization": {"stage": 3, "reduce_bucket_size": 5}})
    workspace.write_config("rho1")
    resolved = workspace.load()
    merged = resolved.deepspeed_reference()
    assert merged["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 5}
    assert merged["train_micro_batch_size_per_gpu"] == 2
    assert not {"optimizer", "scheduler", "gradient_clipping"} & merged.keys()
    workspace.write_config("baseline")
    with pytest.raises(ValueError, match="has no reference model"):
        workspace.load().deepspeed_reference()


def test_a_deepspeed_file_that_vanishes_is_a_config_error(workspace):
    workspace.write_config("baseline")
    resolved = workspace.load()
    workspace.path("ds/zero3.json").unlink()
    with pytest.raises(ConfigError, match=r"ds/zero3\.json cannot be used") as caught:
        resolved.deepspeed(1)
    assert caught.value.problems[0].origin == workspace.line("ds/zero3.json")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("folder", ["", "local/"])
def test_shipped_configs_are_valid_and_explain_every_key(stage, folder):
    resolved = shipped(f"{folder}{stage}.toml")
    assert resolved.config.experiment.stage == stage
    assert resolved.warnings == []
    text = (REPOSITORY / "stage_configs" / f"{folder}{stage}.toml").read_text()
    keys = [line for line in text.splitlines() if " = " in line and not line.startswith("#")]
    assert len(keys) > 10
    assert [
        line
        for line in keys
        if "  # " not in line and not text.split(line)[0].rstrip("\n").splitlines()[-1].startswith("#")
    ] == []
    assert tomllib.loads(text).get("extends") == (f"../{stage}.toml" if folder else None)


PRODUCTION = {
    # stage: samples, ratio, epochs, batch, learning rate
    "baseline": (100_000, 1.0, 2.5, 4, 1e-5),
    "critic": (30_000, 0.5, 0.5, 8, 1e-4),
    "verifiable": (100_000, 0.5, 2.5, 4, 1e-5),
    "rho1": (100_000, 1.0, 3.0, 4, 1e-5),
}


@pytest.mark.parametrize("stage", STAGES)
def test_production_configs_describe_the_7b_runs(stage):
    config = shipped(f"{stage}.toml").config
    training, sampling = config.training, config.data_sampling
    assert (
        sampling.n_samples,
        sampling.correct_ratio,
        training.n_epochs,
        training.batch_size,
        training.learning_rate,
    ) == PRODUCTION[stage]
    assert sampling.balance_correct
    assert training.gradient_accumulation_steps == 4
    assert (training.log_interval, training.eval_interval) == (10, 100)
    assert str(config.models.policy.path) == "storage/models/meta-llama-mtp"
    assert (config.dataset.name, config.dataset.max_length) == ("codecontests", 2048)


def test_production_verifiable_and_rho1():
    verifiable = shipped("verifiable.toml").config
    assert verifiable.training.max_grad_norm == 0.5
    assert (verifiable.training.beta, verifiable.training.value_coef) == (0.9, 0.5)
    assert (verifiable.training.weight_clip_min, verifiable.training.weight_clip_max) == (0.1, 5.0)
    assert verifiable.data_sampling.curriculum_learning
    assert verifiable.data_sampling.difficulty_bins == {"low": (1, 3), "medium": (4, 7), "high": (8, 11)}
    phases = [
        (phase.epoch_range, tuple(phase.difficulty_weights[bin] for bin in ("low", "medium", "high")))
        for phase in verifiable.data_sampling.curriculum_schedule
    ]
    assert phases == [
        ((0.0, 0.3), (0.7, 0.3, 0.0)),
        ((0.3, 0.7), (0.3, 0.6, 0.1)),
        ((0.7, 1.0), (0.1, 0.5, 0.4)),
    ]
    rho1 = shipped("rho1.toml").config
    assert str(rho1.models.reference.path) == "storage/models/ref-sheared-llama-2.7b"
    assert (rho1.training.temperature, rho1.training.k_percent) == (1.0, 0.6)


@pytest.mark.parametrize("stage", STAGES)
def test_local_configs_are_for_a_cpu_and_fit_together(stage):
    config = shipped(f"local/{stage}.toml").config
    assert config.runtime.device == "cpu"
    assert config.models.policy.dtype == "float32"
    assert str(config.models.policy.path) == "storage/models/micro-policy"
    assert str(config.dataset.train) == "storage/data/sample/train.jsonl"
    assert config.training.max_steps <= 50
    if stage == "verifiable":
        critic = shipped("local/critic.toml").config
        assert config.experiment.critic_checkpoint == f"{critic.checkpoint.save_dir}/checkpoint_best"
        assert config.value_head == critic.value_head


def test_production_verifiable_takes_the_production_critic():
    config, critic = shipped("verifiable.toml").config, shipped("critic.toml").config
    assert config.experiment.critic_checkpoint == f"{critic.checkpoint.save_dir}/checkpoint_best"
    assert config.value_head == critic.value_head


@pytest.mark.parametrize("name", ["zero3", "zero3_offload", "zero3_cpu", "zero3_reference"])
def test_shipped_deepspeed_files_pass_their_checks(workspace, name):
    workspace.write("ds/zero3.json", (REPOSITORY / "ds_configs" / f"{name}.json").read_text())
    workspace.write_config("baseline")
    assert workspace.load().deepspeed(2)["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("table", ["early_stopping", "stability"])
@pytest.mark.parametrize("stage", STAGES)
def test_production_configs_name_every_key_of_what_ends_a_run(stage, table):
    """Those that are off unless given stand there as comments, where the stage may give them."""
    text = (REPOSITORY / "stage_configs" / f"{stage}.toml").read_text()
    block = text.split(f"[{table}]\n")[1].split("\n[")[0]
    named = re.findall(r"^(?:# )?(\w+) = ", block, re.MULTILINE)
    assert named == [key.partition(".")[2] for key in all_keys() if key.startswith(f"{table}.") and may_set(stage, key)]
    assert tomllib.loads(text)[table] == schema_defaults(stage)[table], "what is not written means the same"


def may_set(stage, key):
    return stage in stages_with(parse_key(key))
