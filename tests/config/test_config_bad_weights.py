"""A model's config.json that contradicts itself or its weights: found from headers, before anything is loaded."""

import json
import os

import pytest

POLICY = "models/policy/config.json"


def the_problem(workspace, stage="baseline", *overrides):
    workspace.write_config(stage)
    found = workspace.problems(*overrides)
    assert len(found) == 1, [str(problem) for problem in found]
    return found[0]


@pytest.mark.parametrize(("model", "stage"), [("policy", "baseline"), ("reference", "rho1")])
def test_blocks_on_file_that_config_json_does_not_count(workspace, model, stage):
    workspace.edit_json(f"models/{model}/config.json", num_hidden_layers=2)
    problem = the_problem(workspace, stage)
    assert problem.key == f"models.{model}.path"
    assert problem.message == (
        f"models/{model}: the weights hold model.layers.2, but config.json says num_hidden_layers = 2"
    )
    assert problem.mend == "set num_hidden_layers to 3, or copy the model again"


def test_further_heads_on_file_are_a_warning_for_a_policy_and_nothing_for_a_reference(workspace):
    workspace.write_model("models/policy", heads=4)
    workspace.write_model("models/reference", heads=3)
    workspace.edit_json(POLICY, n_future_tokens=2)
    workspace.write_config("rho1")
    (warning,) = workspace.load().warnings
    assert (warning.key, warning.severity) == ("models.policy.path", "warning")
    assert "the weights hold mtp_heads.1, but config.json says n_future_tokens = 2: it is left out" in warning.message
    assert warning.mend == "set n_future_tokens to 4 to train it, too"


def test_a_huge_number_of_blocks_is_said_at_once(workspace):
    workspace.edit_json(POLICY, num_hidden_layers=10**12, n_future_tokens=10**12)
    workspace.write_config("baseline")
    messages = [problem.message for problem in workspace.problems()]
    assert [message.split(",")[0] for message in messages] == [
        "models/policy has no weights of block model.layers.3",
        "models/policy has no weights of head mtp_heads.1",
    ]


CONFIG = {
    "heads do not divide the width": ({"num_attention_heads": 3}, "hidden_size = 4, which num_attention_heads = 3"),
    # transformers asks for it even so
    "head_dim does not help": (
        {"num_attention_heads": 3, "head_dim": 2, "num_key_value_heads": 3},
        "hidden_size = 4, which num_attention_heads = 3 does not divide",
    ),
    "keys do not divide queries": (
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        "num_attention_heads = 4, which num_key_value_heads = 3 does not divide",
    ),
    "no width": ({"hidden_size": 0}, "hidden_size = 0; it must be a whole number of at least 1"),
    "width a text": ({"hidden_size": "4"}, 'hidden_size = "4"; it must be a whole number'),
    "half a key": ({"num_key_value_heads": 1.5}, "num_key_value_heads = 1.5"),
    "true heads": ({"num_attention_heads": True}, "num_attention_heads = true"),
    "no vocabulary": ({"vocab_size": "6"}, 'vocab_size = "6"'),
    "head_dim of nothing": ({"head_dim": 0}, "head_dim = 0"),
    "unknown activation": ({"hidden_act": "swish2"}, 'hidden_act = "swish2"; known are silu, gelu'),
    "activation is a list": ({"hidden_act": ["silu"]}, 'hidden_act = ["silu"]'),
    "rope is a text": ({"rope_parameters": "llama3"}, 'rope_parameters = "llama3"; it must be an object'),
    "rope is a list": ({"rope_scaling": [1]}, "rope_scaling = [1]; it must be an object"),
}


@pytest.mark.parametrize("name", CONFIG)
@pytest.mark.parametrize(("model", "stage"), [("policy", "critic"), ("reference", "rho1")])
def test_config_json_that_describes_no_llama(workspace, name, model, stage):
    changes, says = CONFIG[name]
    workspace.edit_json(f"models/{model}/config.json", **changes)
    problem = the_problem(workspace, stage)
    assert problem.key == f"models.{model}.path"
    assert problem.message.startswith(f"models/{model}/config.json says ")
    assert says in problem.message
    assert problem.mend == "correct config.json, or copy the model again"


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_known_activations_and_rope_tables(workspace, name):
    rope = {"rope_type": "default", "rope_theta": 1e4}
    workspace.edit_json(POLICY, hidden_act=name, rope_parameters=rope)
    workspace.write_config("baseline")
    assert workspace.load().warnings == []


SHAPES = {
    "q": ("model.layers.0.self_attn.q_proj.weight", [2, 4], [4, 4]),
    "k": ("model.layers.1.self_attn.k_proj.weight", [4, 4], [2, 4]),
    "v": ("model.layers.2.self_attn.v_proj.weight", [4, 4], [2, 4]),
    "o": ("mtp_heads.0.self_attn.o_proj.weight", [4, 2], [4, 4]),
    "gate": ("model.layers.0.mlp.gate_proj.weight", [4, 8], [8, 4]),
    "up": ("model.layers.0.mlp.up_proj.weight", [9, 4], [8, 4]),
    "down": ("mtp_heads.0.mlp.down_proj.weight", [8, 4], [4, 8]),
    "norm of a block": ("model.layers.0.input_layernorm.weight", [5], [4]),
    "other norm of a block": ("model.layers.0.post_attention_layernorm.weight", [4, 1], [4]),
    "norm": ("model.norm.weight", [5], [4]),
    "embeddings": ("model.embed_tokens.weight", [6, 5], [6, 4]),
    "unembedding": ("lm_head.weight", [5, 4], [6, 4]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_tensor_of_another_shape_or_none(workspace, name):
    tensor, shape, expected = SHAPES[name]
    for found, held in ((shape, f"of shape {shape}"), (None, "missing")):
        workspace.edit_weights("models/policy", {tensor: found})
        problem = the_problem(workspace)
        assert problem.message == f"models/policy: {tensor} is {held}; config.json says {expected}"
        assert problem.mend == "copy the model again"


def test_a_wrong_size_in_config_json_is_one_problem(workspace):
    workspace.edit_json(POLICY, intermediate_size=16)
    problem = the_problem(workspace)
    assert problem.message == (
        "models/policy: model.layers.0.mlp.gate_proj.weight is of shape [8, 4]; config.json says [16, 4] "
        "(and 11 more tensors like it)"
    )


def test_what_an_architecture_may_have(workspace):
    """A head_dim of its own, biases, tied embeddings; each changes which tensors there must be."""
    workspace.write_config("baseline")
    workspace.edit_json(POLICY, head_dim=3, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    changes = {"lm_head.weight": None}
    for prefix in (*(f"model.layers.{index}" for index in range(3)), "mtp_heads.0"):
        for name, shape in {"q": [6, 4], "k": [3, 4], "v": [3, 4], "o": [4, 6]}.items():
            changes[f"{prefix}.self_attn.{name}_proj.weight"] = shape
            changes[f"{prefix}.self_attn.{name}_proj.bias"] = shape[:1]
        for name, length in {"gate": 8, "up": 8, "down": 4}.items():
            changes[f"{prefix}.mlp.{name}_proj.bias"] = [length]
    workspace.edit_weights("models/policy", changes)
    assert workspace.load().warnings == []


@pytest.mark.parametrize("stage", ["baseline", "critic", "verifiable", "rho1"])
@pytest.mark.parametrize("content", ["{", "[]", '{"sha256": "abc"}', "{}"])
def test_a_damaged_fingerprint_is_an_error_of_every_stage(workspace, stage, content):
    workspace.write("models/policy/trunk_fingerprint.json", content)
    problem = the_problem(workspace, stage)
    assert problem.key == "models.policy.path"
    assert "models/policy/trunk_fingerprint.json is damaged" in problem.message
    assert problem.mend == "delete the file: training makes it again"


def test_a_tokenizer_from_an_override_is_blamed_by_its_own_key(workspace):
    workspace.write_model("other", heads=1, tokens="abXdef")
    problem = the_problem(workspace, "rho1", "models.reference.tokenizer_path=other")
    assert problem.key == "models.reference.tokenizer_path"
    assert problem.origin == "--override models.reference.tokenizer_path=other"
    assert "its tokenizer is not the policy's" in problem.message
    workspace.edit_json("other/tokenizer.json", added_tokens=[{"id": 6, "content": "<extra>"}])
    problem = the_problem(workspace, "baseline", "models.policy.tokenizer_path=other")
    assert problem.key == "models.policy.tokenizer_path"
    assert "models/policy embeds 6 tokens" in problem.message


def test_a_pipe_in_a_models_folder_is_not_waited_for(workspace):
    workspace.path(POLICY).unlink()
    os.mkfifo(workspace.path(POLICY))
    assert the_problem(workspace).message == "models/policy/config.json is not a regular file"


def test_a_damaged_micro_model_is_made_again(workspace):
    workspace.write_model("storage/models/micro-policy")
    workspace.write("storage/models/micro-policy/config.json", json.dumps([]))
    problem = the_problem(workspace, "baseline", "models.policy.path=storage/models/micro-policy")
    assert problem.mend == "make it again: wmtp-ds model micro"
