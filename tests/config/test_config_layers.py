"""Layers: which one wins, how they merge, and what each value's origin says."""

import pytest

from wmtp_ds.config import BaselineTraining, CriticTraining, Rho1Training, VerifiableTraining


def test_later_layers_win_and_every_value_names_its_own(workspace):
    workspace.write("configs/base.toml", workspace.text("baseline"))
    workspace.write(
        "run.toml",
        'extends = "configs/base.toml"\n\n[training]\nlearning_rate = 0.002\nbatch_size = 3\nmax_steps = 7\n',
    )
    environ = {"WMTP_TRAINING__BATCH_SIZE": "4", "WMTP_TRAINING__MAX_STEPS": "8"}
    resolved = workspace.load("training.max_steps=9", environ=environ)

    training = resolved.config.training
    assert (training.n_epochs, training.learning_rate, training.batch_size, training.max_steps) == (1.0, 0.002, 4, 9)
    origins = {name: resolved.origins[f"training.{name}"] for name in BaselineTraining.model_fields}
    assert [(origins[name].layer, origins[name].where) for name in ("weight_decay", "n_epochs", "learning_rate")] == [
        ("default", "default"),
        ("extends", workspace.line("n_epochs", "configs/base.toml")),
        ("file", workspace.line("learning_rate")),
    ]
    assert (origins["batch_size"].layer, origins["batch_size"].where) == (
        "environment",
        "environment variable WMTP_TRAINING__BATCH_SIZE",
    )
    assert (origins["max_steps"].layer, origins["max_steps"].where) == ("override", "--override training.max_steps=9")


def test_the_last_of_two_overrides_wins(workspace):
    workspace.write_config("baseline")
    assert workspace.load("training.batch_size=3", "training.batch_size=4").config.training.batch_size == 4


def test_extends_goes_over_several_files_relative_to_each(workspace):
    workspace.write("a/b/base.toml", workspace.text("baseline"))
    workspace.write("a/mid.toml", 'extends = "b/base.toml"\n[training]\nbatch_size = 5\n[dataset]\nname = "mid"\n')
    workspace.write("run.toml", 'extends = "a/mid.toml"\n[dataset]\nname = "run"\n')
    resolved = workspace.load()
    assert (resolved.config.training.batch_size, resolved.config.dataset.name) == (5, "run")
    assert resolved.origins["training.batch_size"].where == "a/mid.toml:3"
    assert resolved.origins["training.n_epochs"].where == workspace.line("n_epochs", "a/b/base.toml")


def test_tables_merge_but_lists_and_free_tables_are_replaced(workspace):
    base = workspace.text("baseline").replace('name = "trial"', 'name = "trial"\ntags = { a = "1", b = "2" }')
    workspace.write("base.toml", base.replace("n_epochs = 1.0", "n_epochs = 1.0\nbetas = [0.5, 0.6]"))
    text = 'extends = "base.toml"\n[experiment]\ntags = { c = "3" }\n[training]\nbetas = [0.1, 0.2]\n'
    workspace.write("run.toml", text + "[data_sampling.difficulty_bins]\neasy = [1, 5]\n")
    config = workspace.load().config
    assert config.experiment.name == "trial"
    assert config.experiment.tags == {"c": "3"}
    assert config.training.betas == (0.1, 0.2)
    assert config.data_sampling.difficulty_bins == {"easy": (1, 5)}


def test_one_item_of_a_free_table_or_of_a_list_can_be_overridden(workspace):
    workspace.write_config("baseline", ('name = "trial"', 'name = "trial"\ntags = { a = "1" }'))
    resolved = workspace.load(
        "experiment.tags.b=2",
        "data_sampling.difficulty_bins.low=[1, 2]",
        "training.betas[1]=0.99",
        environ={"WMTP_TRAINING__BETAS__0": "0.8"},
    )
    assert resolved.config.experiment.tags == {"a": "1", "b": "2"}
    assert resolved.config.data_sampling.difficulty_bins == {"low": (1, 2), "medium": (4, 7), "high": (8, 11)}
    assert resolved.config.training.betas == (0.8, 0.99)
    assert resolved.origins["training.betas[0]"].layer == "environment"
    assert resolved.origins["training.betas[1]"].layer == "override"
    assert resolved.origins["training.betas"].layer == "default"


PHASES = """
[[data_sampling.curriculum_schedule]]
epoch_range = [0.0, 0.4]
difficulty_weights = { low = 1.0 }
[[data_sampling.curriculum_schedule]]
epoch_range = [0.4, 1.0]
difficulty_weights = { low = 0.5, high = 0.5 }
"""


def test_the_items_of_a_list_of_tables_can_be_overridden_and_added(workspace):
    workspace.write_config("verifiable", append=PHASES)
    resolved = workspace.load(
        "data_sampling.curriculum_schedule[0].epoch_range=[0.0,0.5]",
        "data_sampling.curriculum_schedule[1].epoch_range[0]=0.5",
        "data_sampling.curriculum_schedule.1.epoch_range.1=0.75",
        "data_sampling.curriculum_schedule[1].difficulty_weights.high=0.25",
        "data_sampling.curriculum_schedule[1].difficulty_weights.medium=0.25",
        "data_sampling.curriculum_schedule[2]={epoch_range=[0.75, 1], difficulty_weights={high=1.0}}",
    )
    first, second, third = resolved.config.data_sampling.curriculum_schedule
    assert first.epoch_range == (0.0, 0.5)
    assert second.epoch_range == (0.5, 0.75)
    assert second.difficulty_weights == {"low": 0.5, "medium": 0.25, "high": 0.25}
    assert (third.epoch_range, third.difficulty_weights) == ((0.75, 1.0), {"high": 1.0})
    assert resolved.warnings == []
    origins = resolved.origins
    assert origins["data_sampling.curriculum_schedule[0].epoch_range"].layer == "override"
    low = "data_sampling.curriculum_schedule[1].difficulty_weights.low"
    assert origins[low].where == workspace.line("low = 0.5, high = 0.5")


def test_a_list_item_can_be_set_by_a_variable_as_json_too(workspace):
    workspace.write_config("verifiable", append=PHASES)
    environ = {
        "WMTP_DATA_SAMPLING__CURRICULUM_SCHEDULE__0__DIFFICULTY_WEIGHTS": '{"low": 0.5, "high": 0.5}',
        "WMTP_EARLY_STOPPING": "{enabled = true, patience = 3}",
        "WMTP_EARLY_STOPPING__PATIENCE": "4",
    }
    config = workspace.load(environ=environ).config
    assert config.data_sampling.curriculum_schedule[0].difficulty_weights == {"low": 0.5, "high": 0.5}
    assert (config.early_stopping.enabled, config.early_stopping.patience) == (True, 4)
    assert config.early_stopping.mode == "any"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("training.learning_rate=1e-5", "training.learning_rate", 1e-5),
        ("training.learning_rate=.5", "training.learning_rate", 0.5),
        ("training.n_epochs=2", "training.n_epochs", 2.0),
        (" training.n_epochs = 2 ", "training.n_epochs", 2.0),
        ("data_sampling.n_samples=1_000", "data_sampling.n_samples", 1000),
        ("checkpoint.save_best=false", "checkpoint.save_best", False),
        ("experiment.name=123", "experiment.name", "123"),
        ("experiment.name=1e5", "experiment.name", "1e5"),
        ('experiment.name="quoted"', "experiment.name", "quoted"),
        ("experiment.name='quoted'", "experiment.name", "quoted"),
        ('dataset.name="\\ud83d\\ude00"', "dataset.name", "\U0001f600"),
        ("experiment.description=a = b, [c]", "experiment.description", "a = b, [c]"),
        ("experiment.description=true", "experiment.description", "true"),
        ("experiment.description=", "experiment.description", ""),
        ("experiment.tags.x=1", "experiment.tags.x", "1"),
        ("experiment.tags=['a', 'b']", "experiment.tags.b", "true"),
        ("mlflow.tracking_uri=", "mlflow.tracking_uri", ""),
        ("training.optimizer=sgd", "training.optimizer", "sgd"),
        ("dataset.train=data/other=.jsonl", "dataset.train", "data/other=.jsonl"),
        ("dataset.name=${experiment.name}-x", "dataset.name", "trial-x"),
        ("data_sampling.difficulty_range=[2, 5]", "data_sampling.difficulty_range", [2, 5]),
    ],
)
def test_values_of_overrides(workspace, text, key, value):
    workspace.write_config("baseline")
    found = workspace.load(text, checks=False).flat()[key]
    assert found == value
    assert type(found) is type(value)


def test_references_keep_types_and_may_lead_over_others(workspace):
    workspace.write_config("baseline", append='[checkpoint]\nsave_dir = "out/${dataset.name}"\n')
    resolved = workspace.load(
        "dataset.name=${ experiment.name }-${experiment.stage}",
        "runtime.seed=7",
        'data_sampling.seed="${runtime.seed}"',
        "data_sampling.difficulty_range=[2, 5]",
        "training.betas[0]=0.25",
        'training.betas[1]="${training.betas[0]}"',
        "experiment.description=$${kept} ${training.betas[0]} ${checkpoint.save_best}",
    )
    config = resolved.config
    assert config.dataset.name == "trial-baseline"
    assert str(config.checkpoint.save_dir) == "out/trial-baseline"
    assert config.data_sampling.seed == 7
    assert config.training.betas == (0.25, 0.25)
    assert config.experiment.description == "${kept} 0.25 true"
    assert resolved.origins["checkpoint.save_dir"].where == workspace.line("save_dir")


def test_the_stage_may_come_from_any_layer(workspace):
    workspace.write_config("critic")
    assert isinstance(workspace.load("experiment.stage=baseline").config.training, BaselineTraining)
    environ = {"WMTP_EXPERIMENT__STAGE": "baseline"}
    assert workspace.load(environ=environ).config.experiment.stage == "baseline"


DEFAULTS = {
    "baseline": (BaselineTraining, 1.0, "loss", 100, 1e-5),
    "critic": (CriticTraining, 0.5, "value_loss", 10, 1e-4),
    "verifiable": (VerifiableTraining, 0.5, "loss", 100, 1e-5),
    "rho1": (Rho1Training, 1.0, "loss", 100, 1e-5),
}


@pytest.mark.parametrize("stage", DEFAULTS)
def test_defaults_of_each_stage(workspace, stage):
    workspace.write_config(stage)
    config = workspace.load().config
    training, ratio, monitor, patience, min_delta = DEFAULTS[stage]
    assert type(config.training) is training
    assert config.data_sampling.correct_ratio == ratio
    stopping = config.early_stopping
    assert (stopping.monitor, stopping.patience, stopping.min_delta) == (monitor, patience, min_delta)
    assert (stopping.enabled, stopping.mode, stopping.grad_norm_threshold) == (False, "any", 50.0)
    assert (stopping.grad_norm_window_size, stopping.grad_norm_threshold_ratio) == (10, 0.7)
    assert config.training.value_lr == config.training.learning_rate
    assert config.models.policy.tokenizer_path == config.models.policy.path
    assert (config.models.reference is not None) == (stage == "rho1")
    assert (config.dataset.max_length, config.dataset.template) == (2048, "alpaca")
    assert str(config.checkpoint.save_dir) == "checkpoints/trial"
    if stage == "verifiable":
        assert (config.training.gamma, config.training.gae_lambda, config.training.td_lambda) == (1.0, 0.95, 0.0)
        assert (config.value_head.type, config.value_head.activation) == ("linear", "sigmoid")
    if stage == "rho1":
        scope = config.training.excess, config.training.weighting, config.training.selection_scope
        assert scope == ("signed", "topk", "batch")


def test_the_config_is_frozen_throughout(workspace):
    workspace.write_config("baseline")
    config = workspace.load().config
    for owner, name in ((config, "training"), (config.training, "batch_size"), (config.models.policy, "path")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(owner, name, getattr(owner, name))


def test_without_checks_no_file_is_looked_at(workspace):
    workspace.write_config("baseline", ("models/policy", "models/nowhere"), ("data/train", "data/nowhere"))
    workspace.path("ds/zero3.json").unlink()
    assert str(workspace.load(checks=False).config.models.policy.path) == "models/nowhere"
