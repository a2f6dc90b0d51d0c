"""What is said of data_sampling.pack_sequences and dataset.cache_dir before anything starts."""

import pytest

PACK = "data_sampling.pack_sequences=true"


@pytest.mark.parametrize("stage", ["baseline", "critic", "verifiable"])
def test_packing_is_off_unless_asked_for(workspace, stage):
    workspace.write_config(stage)
    assert workspace.load().config.data_sampling.pack_sequences is False
    resolved = workspace.load(PACK)
    assert resolved.config.data_sampling.pack_sequences is True
    assert not resolved.warnings


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("model", ["policy", "reference"])
def test_an_attention_that_cannot_keep_solutions_apart(workspace, model, field):
    workspace.edit_json(f"models/{model}/config.json", **{field: "flash_attention_2"})
    workspace.write_config("rho1", ("n_samples = 8\n", "n_samples = 8\npack_sequences = true\n"))
    (problem,) = workspace.problems("training.selection_scope=sequence")
    assert (problem.key, problem.origin) == ("data_sampling.pack_sequences", workspace.line("pack_sequences"))
    assert f"models/{model}/config.json says attn_implementation 'flash_attention_2'" in problem.message
    assert "pack_sequences = false" in problem.mend
    workspace.load("data_sampling.pack_sequences=false")
    for known in ("sdpa", "eager"):
        workspace.edit_json(f"models/{model}/config.json", **{field: known})
        assert not workspace.load("training.selection_scope=sequence").warnings


def test_packing_single_solutions_has_no_effect(workspace):
    workspace.write_config("baseline")
    (warning,) = workspace.load(PACK, "training.batch_size=1").warnings
    assert warning.key == "data_sampling.pack_sequences"
    assert "has no effect where training.batch_size is 1" in warning.message
    assert not workspace.load("training.batch_size=1").warnings


def test_rho1_selects_among_other_solutions_where_they_are_packed(workspace):
    workspace.write_config("rho1")
    (warning,) = workspace.load(PACK).warnings
    assert warning.key == "data_sampling.pack_sequences"
    assert 'selection_scope = "batch"' in warning.message
    for change in ("training.selection_scope=sequence", "training.weighting=softmax"):
        assert not workspace.load(PACK, change).warnings
    assert not workspace.load().warnings


def test_it_is_true_or_false(workspace):
    workspace.write_config("baseline")
    (problem,) = workspace.problems('data_sampling.pack_sequences="yes"')
    assert problem.key == "data_sampling.pack_sequences"


def test_where_tokens_are_kept(workspace):
    workspace.write_config("baseline")
    assert workspace.load().config.dataset.cache_dir == "storage/cache/tokens"
    assert workspace.load('dataset.cache_dir=""').config.dataset.cache_dir == ""
