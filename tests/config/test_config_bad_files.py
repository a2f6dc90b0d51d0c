"""Files that a configuration names and that do not fit: models, tokenizers, critics, DeepSpeed's JSON, data."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from wmtp_ds.errors import UserError


def the_problem(workspace, stage="verifiable", **options):
    """The only problem of a valid config of a stage."""
    workspace.write_config(stage)
    found = workspace.problems(**options)
    assert len(found) == 1, [str(problem) for problem in found]
    return found[0]


# name -> (stage, what is broken, key, text on the config's line, what is said, the remedy)
Break = Callable[..., object]
MODELS: dict[str, tuple[str, Break, str, str, str]] = {
    "no config.json": (
        "verifiable",
        lambda w: w.path("models/policy/config.json").unlink(),
        "models.policy.path",
        "config.json is missing",
        "copy the model again",
    ),
    "config.json is no JSON": (
        "critic",
        lambda w: w.write("models/policy/config.json", "{"),
        "models.policy.path",
        "config.json cannot be read",
        "copy the model again",
    ),
    "config.json is a list": (
        "critic",
        lambda w: w.write("models/policy/config.json", "[]"),
        "models.policy.path",
        "no JSON object",
        "copy the model again",
    ),
    "config.json is null": (
        "critic",
        lambda w: w.write("models/policy/config.json", "null"),
        "models.policy.path",
        "no JSON object",
        "copy the model again",
    ),
    "tokenizer is null": (
        "critic",
        lambda w: w.write("models/policy/tokenizer.json", "null"),
        "models.policy.path",
        "holds no vocabulary",
        "copy the model again",
    ),
    "another architecture": (
        "baseline",
        lambda w: w.edit_json("models/policy/config.json", model_type="gpt2"),
        "models.policy.path",
        'says model_type = "gpt2"',
        "Llama",
    ),
    "no n_future_tokens": (
        "baseline",
        lambda w: w.edit_json("models/policy/config.json", n_future_tokens=None),
        "models.policy.path",
        "does not say n_future_tokens",
        '"n_future_tokens": 1',
    ),
    "no heads": (
        "baseline",
        lambda w: w.edit_json("models/policy/config.json", n_future_tokens=0),
        "models.policy.path",
        "says n_future_tokens = 0; it must be a whole number of at least 1",
        "copy the model again",
    ),
    "more heads than weights": (
        "baseline",
        lambda w: w.edit_json("models/policy/config.json", n_future_tokens=4),
        "models.policy.path",
        "no weights of head mtp_heads.1, though config.json says n_future_tokens = 4",
        "copy the model again",
    ),
    "no trunk": (
        "baseline",
        lambda w: w.edit_json("models/policy/config.json", num_hidden_layers=1),
        "models.policy.path",
        "says num_hidden_layers = 1",
        "copy the model again",
    ),
    "more blocks than weights": (
        "baseline",
        lambda w: w.edit_json("models/policy/config.json", num_hidden_layers=9),
        "models.policy.path",
        "no weights of block model.layers.3",
        "copy the model again",
    ),
    "no weights": (
        "baseline",
        lambda w: w.path("models/policy/model.safetensors").unlink(),
        "models.policy.path",
        "no safetensors weights",
        "copy the model again",
    ),
    "truncated weights": (
        "baseline",
        lambda w: w.path("models/policy/model.safetensors").write_bytes(
            w.path("models/policy/model.safetensors").read_bytes()[:-8]
        ),
        "models.policy.path",
        "model.safetensors is damaged",
        "copy the model again",
    ),
    "missing shard": (
        "baseline",
        lambda w: w.write_json(
            "models/policy/model.safetensors.index.json", {"weight_map": {"a": "shard-1.safetensors"}}
        ),
        "models.policy.path",
        "shard-1.safetensors is missing",
        "copy the model again",
    ),
    "embeddings of another size": (
        "baseline",
        lambda w: w.edit_json("models/policy/config.json", vocab_size=7),
        "models.policy.path",
        "model.embed_tokens.weight is of shape [6, 4]; config.json says [7, 4]",
        "copy the model again",
    ),
    "no tokenizer": (
        "baseline",
        lambda w: w.path("models/policy/tokenizer.json").unlink(),
        "models.policy.path",
        "tokenizer.json is missing",
        "copy the model again",
    ),
    "tokenizer without a vocabulary": (
        "baseline",
        lambda w: w.write_json("models/policy/tokenizer.json", {"model": {}}),
        "models.policy.path",
        "holds no vocabulary",
        "copy the model again",
    ),
    "tokenizer larger than the embeddings": (
        "baseline",
        lambda w: w.edit_json("models/policy/tokenizer.json", added_tokens=[{"id": 6, "content": "<extra>"}]),
        "models.policy.path",
        'embeds 6 tokens, but models/policy/tokenizer.json has one of id 6: "<extra>"',
        "belongs to the model",
    ),
    "reference with another tokenizer": (
        "rho1",
        lambda w: w.write_model("models/reference", heads=1, tokens="abXdeY"),
        "models.reference.path",
        'token 2 is "X" in models/reference/tokenizer.json, but "c" in models/policy/tokenizer.json',
        "policy's tokenizer",
    ),
    "reference with fewer tokens": (
        "rho1",
        lambda w: w.write_model("models/reference", heads=1, tokens="abcde"),
        "models.reference.path",
        "token 5 is nothing in models/reference/tokenizer.json",
        "policy's tokenizer",
    ),
    "reference without weights": (
        "rho1",
        lambda w: w.path("models/reference/model.safetensors").unlink(),
        "models.reference.path",
        "models/reference has no safetensors weights",
        "copy the model again",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_bad_model(workspace, name):
    stage, break_it, key, says, mend = MODELS[name]
    break_it(workspace)
    problem = the_problem(workspace, stage)
    assert problem.key == key
    assert says in problem.message
    assert mend in problem.mend
    if key.endswith(".path"):
        assert problem.origin == workspace.line('path = "models/' + key.split(".")[1])


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("storage/models/micro-policy", "wmtp-ds model micro"),
        ("./storage/models/micro-policy/", "wmtp-ds model micro"),
        (
            "storage/models/meta-llama-mtp",
            "put the model there: a folder with config.json (n_future_tokens), safetensors and tokenizer; "
            "to try without it: wmtp-ds model micro, then --config stage_configs/local/baseline.toml",
        ),
    ],
)
def test_missing_model_names_path_and_command(workspace, path, command):
    workspace.write_config("baseline", ("models/policy", path))
    (problem,) = workspace.problems()
    assert problem.key == "models.policy.path"
    assert problem.origin == workspace.line(path)
    assert path.strip("./") in problem.message
    assert "does not exist" in problem.message
    assert problem.mend.endswith(command)


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("storage/data/sample/train.jsonl", "make it: wmtp-ds data sample"),
        ("storage/data/mbpp/x.jsonl", "wmtp-ds data import mbpp --input FILE --output storage/data/mbpp"),
        (
            "storage/data/codecontests/train.jsonl",
            "wmtp-ds data import codecontests --input FOLDER --output storage/data/codecontests",
        ),
        ("storage/data/cc/x.jsonl", 'JSONL, each line {"problem_id": "1", "instruction": '),
        ("storage/data/cc/x.jsonl", "wmtp-ds data sample, wmtp-ds data import mbpp --input FILE --output DIR"),
    ],
)
def test_missing_data_names_path_and_command(workspace, path, command):
    workspace.write_config("baseline", ("data/train.jsonl", path))
    (problem,) = workspace.problems()
    assert (problem.key, problem.origin) == ("dataset.train", workspace.line(path))
    assert problem.message == f"{path} does not exist"
    assert command in problem.mend


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "data/train.jsonl is empty"),
        ("\n \n", "data/train.jsonl is empty"),
        ('{"problem_id": "1"}\n', 'data/train.jsonl:1: "instruction" is missing'),
        ("not json\n", "data/train.jsonl:1: not JSON"),
    ],
)
def test_bad_first_rows(workspace, text, says):
    workspace.write("data/train.jsonl", text)
    problem = the_problem(workspace)
    assert (problem.key, problem.origin) == ("dataset.train", workspace.line("train ="))
    assert says in problem.message


def test_each_bad_row_among_the_first_is_reported_and_later_ones_are_not(workspace):
    good = workspace.path("data/train.jsonl").read_text().splitlines()
    lines = [good[0], "{", *good[1:18], "[]", "{", *good]  # of the first 20, the second and the last are bad
    workspace.write("data/train.jsonl", "\n".join(lines))
    workspace.write_config("baseline")
    found = workspace.problems()
    assert [problem.message.split(" ")[0] for problem in found] == ["data/train.jsonl:2:", "data/train.jsonl:20:"]


def test_data_folder_is_no_file(workspace):
    workspace.write_config("baseline", ('"data/train.jsonl"', '"data"'))
    (problem,) = workspace.problems()
    assert problem.message == "data is a folder, not a file"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden": 8}, "critic/value_head.safetensors has hidden size 8, the policy models/policy has 4"),
        ({"type": "mlp"}, 'has type "mlp", but value_head.type is "linear" (default)'),
        ({"activation": "none"}, 'has activation "none", but value_head.activation is "sigmoid"'),
        (
            {"trunk_fingerprint": "cd" * 32},
            f"trained on trunk {'cd' * 32}, the policy models/policy has trunk {'ab' * 32}",
        ),
    ],
)
def test_critic_that_does_not_fit(workspace, changes, says):
    workspace.write_critic(**changes)
    problem = the_problem(workspace)
    assert (problem.key, problem.origin) == ("experiment.critic_checkpoint", workspace.line("critic_checkpoint"))
    assert says in problem.message


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("nowhere", "nowhere does not exist"),
        ("data", "data holds no value_head.safetensors"),
        ("ds/zero3.json", "neither a folder nor value_head.safetensors nor a .pt"),
        ("s3://bucket/critic", "has a scheme that is not known here"),
        ("run:/abc/critic", "has a scheme that is not known here"),
        ("runs:/abc", "'runs:/abc' is no artifact of a run"),
        ("mlflow://1/abc/critic", "'mlflow://1/abc/critic' is no artifact of a run"),
        ("runs:/abc/../other/critic", "has an empty segment, '.' or '..'"),
        ("runs:/abc/%2e%2e/critic", "has an empty segment, '.' or '..'"),
        ("mlflow://1/abc/artifacts/a/..", "has an empty segment, '.' or '..'"),
        ("mlflow-artifacts:/a/../../b", "has an empty segment, '.' or '..'"),
        ("mlflow-artifacts:/a/b", "needs a tracking server, but mlflow.tracking_uri is none"),
    ],
)
def test_bad_critic_address(workspace, value, says):
    workspace.write_config(
        "verifiable", ('"critic"', f'"{value}"'), ('tracking_uri = ""', 'tracking_uri = "sqlite:///mlflow.db"')
    )
    (problem,) = workspace.problems()
    assert (problem.key, problem.origin) == ("experiment.critic_checkpoint", workspace.line("critic_checkpoint"))
    assert says in problem.message


def test_critic_uri_needs_tracking(workspace):
    workspace.write_config("verifiable", ('"critic"', '"runs:/abc/critic"'))
    (problem,) = workspace.problems()
    assert 'mlflow.tracking_uri is ""' in problem.message
    assert workspace.line("tracking_uri") in problem.message


@pytest.mark.parametrize(
    "uri", ["runs:/abc/checkpoint_best", "mlflow://8/abc/artifacts/a..b/c", "mlflow-artifacts:/8/abc/artifacts/x"]
)
def test_good_critic_uri_is_checked_by_form_alone(workspace, uri):
    workspace.write_config(
        "verifiable", ('"critic"', f'"{uri}"'), ('uri = ""', 'uri = "http://user:secret@localhost:1"')
    )
    assert workspace.load().config.experiment.critic_checkpoint == uri


def test_online_asks_for_the_artifact_and_checks_what_it_gets(workspace, monkeypatch):
    workspace.write_critic("fetched/value_head.safetensors", hidden=8)
    asked = []

    def locate_critic(uri: str, *, tracking_uri: str, cache_dir: Path) -> Path:
        asked.append((uri, tracking_uri, cache_dir.is_dir()))
        if "gone" in uri:
            raise UserError(f"{uri}: no such artifact")
        return workspace.path("fetched/value_head.safetensors")

    monkeypatch.setattr("wmtp_ds.config.check_critic.locate_critic", locate_critic)
    for name, says in (("gone", "runs:/abc/gone: no such artifact"), ("here", "runs:/abc/here has hidden size 8")):
        workspace.write_config(
            "verifiable", ('"critic"', f'"runs:/abc/{name}"'), ('uri = ""', 'uri = "http://localhost:1"')
        )
        (problem,) = workspace.problems(online=True)
        assert says in problem.message
    assert asked == [(f"runs:/abc/{name}", "http://localhost:1", True) for name in ("gone", "here")]


def test_missing_critic_names_the_command_that_trains_one(workspace):
    workspace.write("configs/critic.toml", "x = 1")
    workspace.write("configs/verifiable.toml", workspace.text("verifiable").replace('"critic"', '"nowhere"'))
    workspace.write("run.toml", 'extends = "configs/verifiable.toml"\n')
    (problem,) = workspace.problems()
    assert problem.mend == "train one: deepspeed bin/train_stage.py --stage critic"
    assert problem.origin == workspace.line('"nowhere"', "configs/verifiable.toml")


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0{}"])
def test_critic_file_that_is_none(workspace, content):
    workspace.path("critic/value_head.safetensors").write_bytes(content)
    problem = the_problem(workspace)
    assert problem.key == "experiment.critic_checkpoint"
    assert "critic/value_head.safetensors" in problem.message


def test_the_folder_of_a_run_stands_for_its_best_checkpoint(workspace):
    workspace.write_critic("runs/checkpoint_best/value_head.safetensors", hidden=8)
    workspace.write_config("verifiable", ('"critic"', '"runs"'))
    (problem,) = workspace.problems()
    assert problem.message.startswith("runs/checkpoint_best/value_head.safetensors has hidden size 8")


def test_pt_files_and_bare_heads_are_accepted(workspace):
    workspace.write("critic.pt", "PK")
    workspace.write_config("verifiable", ('"critic"', '"critic.pt"'))
    assert workspace.load().warnings == []
    workspace.write_critic(trunk_fingerprint="")
    workspace.write_config("verifiable")
    (warning,) = workspace.load().warnings
    assert "does not say which trunk" in warning.message


def test_policy_without_a_fingerprint_is_a_warning_where_a_critic_is_needed(workspace):
    workspace.path("models/policy/trunk_fingerprint.json").unlink()
    workspace.write_config("verifiable")
    (warning,) = workspace.load().warnings
    assert "no trunk_fingerprint.json" in warning.message
    workspace.write_config("baseline")
    assert workspace.load().warnings == []


ZERO = {"stage": 3}
DEEPSPEED: dict[str, tuple[object, str]] = {
    "batch size": (
        {"zero_optimization": ZERO, "train_batch_size": 8},
        'ds/zero3.json:5 sets "train_batch_size" = 8, which',
    ),
    "micro batch": (
        {"train_micro_batch_size_per_gpu": 8, "zero_optimization": ZERO},
        'ds/zero3.json:2 sets "train_micro_batch_size_per_gpu" = 8, which training.batch_size (run.toml:20) owns',
    ),
    "accumulation": (
        {"zero_optimization": ZERO, "gradient_accumulation_steps": 2},
        "which training.gradient_accumulation_steps (default) owns",
    ),
    "clipping": ({"zero_optimization": ZERO, "gradient_clipping": 1.0}, "which training.max_grad_norm (default) owns"),
    "fp16": (
        {"zero_optimization": ZERO, "fp16": {"enabled": True}},
        "which models.policy.dtype (run.toml:8) and runtime.mixed_precision (default) own",
    ),
    "bf16": ({"zero_optimization": ZERO, "bf16": {"enabled": True}}, 'sets "bf16"'),
    "optimizer": (
        {"zero_optimization": ZERO, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}},
        "which training.optimizer (default) and training.learning_rate (run.toml:21) own",
    ),
    "scheduler": ({"zero_optimization": ZERO, "scheduler": {"type": "WarmupLR"}}, "which training.scheduler"),
    "no section": ({"zero_optimisation": ZERO}, 'has no "zero_optimization" section ("zero_optimisation" is there)'),
    "section is a number": ({"zero_optimization": 3}, '"zero_optimization" is no object'),
    "no stage": ({"zero_optimization": {}}, '"zero_optimization" has no stage'),
    "unknown stage": ({"zero_optimization": {"stage": 4}}, "ds/zero3.json:3 has the unknown ZeRO stage 4"),
    "stage in quotes": ({"zero_optimization": {"stage": "3"}}, 'has the unknown ZeRO stage "3"'),
    "misspelt key": (
        {"zero_optimization": {"stage": 3, "overlap_com": True}},
        'ds/zero3.json:4 sets "zero_optimization.overlap_com", which DeepSpeed does not know',
    ),
    "auto": (
        {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
        'has "auto" for zero_optimization.reduce_bucket_size',
    ),
    "offload to the moon": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "moon"}}},
        'ds/zero3.json:5 offloads to "moon"',
    ),
    "nvme without a path": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        "has no nvme_path",
    ),
    "parameters of stage 2": (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        "ds/zero3.json:3 has stage 2; no rank may need to hold the whole model, so it is trained with stage 3",
    ),
    "lax tags": (
        {"zero_optimization": ZERO, "checkpoint": {"tag_validation": "Warn"}},
        "ranks could save different steps",
    ),
    "a list": ([], "it is no JSON object"),
}


@pytest.mark.parametrize("name", DEEPSPEED)
def test_bad_deepspeed_file(workspace, name):
    content, says = DEEPSPEED[name]
    workspace.write_json("ds/zero3.json", content)
    problem = the_problem(workspace)
    assert (problem.key, problem.origin) == ("deepspeed.config", workspace.line("config ="))
    assert says in problem.message


def test_deepspeed_file_with_a_syntax_error_names_its_line(workspace):
    workspace.write("ds/zero3.json", '{\n "zero_optimization": {"stage": 3},\n}')
    problem = the_problem(workspace)
    assert problem.message.startswith("ds/zero3.json:3 is not JSON")


@pytest.mark.parametrize(("value", "says"), [("ds/none.json", "does not exist"), ("ds", "is a folder")])
def test_missing_deepspeed_file(workspace, value, says):
    workspace.write_config("critic", ("ds/zero3.json", value))
    (problem,) = workspace.problems()
    assert (problem.key, problem.origin) == ("deepspeed.config", workspace.line(f'"{value}"'))
    assert says in problem.message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "ds/reference.json:3 has stage 2; a model without an optimizer needs stage 3",
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "a frozen model has none"),
        ({"zero_optimization": ZERO, "optimizer": {"type": "AdamW"}}, 'ds/reference.json:5 sets "optimizer"'),
        ({"zero_optimization": ZERO, "bf16": {"enabled": True}}, "models.reference.dtype (run.toml:11)"),
    ],
)
def test_bad_reference_config(workspace, content, says):
    workspace.write_json("ds/reference.json", content)
    problem = the_problem(workspace, "rho1")
    assert (problem.key, problem.origin) == ("deepspeed.reference_config", workspace.line("reference_config"))
    assert says in problem.message


def test_a_reward_model_is_read_with_the_file_of_frozen_models(workspace):
    workspace.write_json("models/reward/config.json", {"architectures": ["LlamaForSequenceClassification"]})
    workspace.write_json("ds/frozen.json", {"zero_optimization": ZERO, "bf16": {"enabled": True}})
    workspace.write_config("critic", append='[models.reward]\nsource = "model"\npath = "models/reward"\n')
    frozen = "deepspeed.reference_config=ds/frozen.json"
    (problem,) = workspace.problems(frozen)
    assert (problem.key, problem.origin) == ("deepspeed.reference_config", f"--override {frozen}")
    assert 'sets "bf16"' in problem.message
    assert "models.reward.dtype" in problem.message
    workspace.write_json("ds/frozen.json", {"zero_optimization": {"stage": 3, "reduce_bucket_size": 5}})
    resolved = workspace.load(frozen, "models.reward.dtype=bfloat16")
    assert resolved.deepspeed_reward()["bf16"] == {"enabled": True}
    assert resolved.deepspeed_reward()["zero_optimization"]["reduce_bucket_size"] == 5
    assert "bf16" not in workspace.load(frozen, "models.reward.dtype=float32").deepspeed_reward()


def test_save_dir_below_a_file(workspace):
    workspace.write_config("baseline", append='[checkpoint]\nsave_dir = "run.toml/x"\n')
    (problem,) = workspace.problems()
    assert (problem.key, problem.origin) == ("checkpoint.save_dir", workspace.line("save_dir"))
    assert "run.toml is a file" in problem.message


def test_reward_model_must_classify(workspace):
    workspace.write_json("models/reward/config.json", {"architectures": ["LlamaForCausalLM"]})
    workspace.write_json("ds/frozen.json", {"zero_optimization": ZERO})
    workspace.write_config("critic", append='[models.reward]\nsource = "model"\npath = "models/reward"\n')
    frozen = "deepspeed.reference_config=ds/frozen.json"
    (problem,) = workspace.problems(frozen)
    assert (problem.key, problem.origin) == ("models.reward.path", workspace.line('"models/reward"'))
    assert "is a LlamaForCausalLM, not a sequence-classification model" in problem.message
    workspace.edit_json("models/reward/config.json", architectures=["LlamaForSequenceClassification"])
    assert workspace.load(frozen).config.models.reward.source == "model"


def test_sequences_longer_than_the_policy_knows_are_a_warning(workspace):
    workspace.edit_json("models/policy/config.json", max_position_embeddings=1024)
    workspace.write_config("baseline")
    (warning,) = workspace.load().warnings
    assert (warning.key, warning.severity) == ("dataset.max_length", "warning")
    assert "is 2048, but models/policy/config.json says positions up to 1024" in warning.message
    assert workspace.load("dataset.max_length=1024").warnings == []


def test_a_shared_vocabulary_may_be_written_differently(workspace):
    """Unigram files list their tokens; what counts is the token of each id."""
    pairs = [[token, -1.0] for token in "abcde"]
    content = {"model": {"type": "Unigram", "vocab": pairs}, "added_tokens": [{"id": 5, "content": "f"}]}
    workspace.write("models/reference/tokenizer.json", json.dumps(content))
    workspace.write_config("rho1")
    assert workspace.load().warnings == []
