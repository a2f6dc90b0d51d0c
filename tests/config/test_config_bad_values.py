"""Bad values, one at a time: each is reported under its key, with the line that holds it and the reason."""

from dataclasses import dataclass

import pytest

PHASES = """
[[data_sampling.curriculum_schedule]]
epoch_range = [0.0, 0.5]
difficulty_weights = { low = 1.0 }

[[data_sampling.curriculum_schedule]]
epoch_range = [0.5, 1.0]
difficulty_weights = { low = 0.5, high = 0.5 }
"""


@dataclass(frozen=True)
class Case:
    """A valid config with one piece of text replaced, or something appended, and what must be said about it."""

    key: str
    says: str
    old: str = ""
    new: str = ""
    append: str = ""
    at: str | None = None  # text on the line that is the origin; default: `new`; "" for the file
    mend: str = ""
    stage: str = "verifiable"


CASES = {
    # Required keys.
    "no name": Case("experiment.name", "is required", 'name = "trial"\n', "", at="", mend='name = "my-run"'),
    "no stage": Case("experiment.stage", "is required", 'stage = "verifiable"\n', "", at="", mend="[experiment]"),
    "no policy path": Case("models.policy.path", "is required", 'path = "models/policy"\n', "", at=""),
    "no dataset name": Case("dataset.name", "is required", 'name = "tiny"\n', "", at=""),
    "no train": Case("dataset.train", "is required", 'train = "data/train.jsonl"\n', "", at=""),
    "no validation": Case("dataset.validation", "is required", 'validation = "data/validation.jsonl"\n', "", at=""),
    "no epochs": Case("training.n_epochs", "is required", "n_epochs = 1.0\n", "", at="", mend="under [training]"),
    "no batch size": Case("training.batch_size", "is required", "batch_size = 2\n", "", at="", mend="batch_size = 4"),
    "no learning rate": Case("training.learning_rate", "is required", "learning_rate = 1e-3\n", "", at=""),
    "no beta": Case("training.beta", "is required by stage verifiable", "beta = 0.9\n", "", at="", mend="beta = 0.9"),
    "no value_coef": Case("training.value_coef", "is required by stage verifiable", "value_coef = 0.5\n", "", at=""),
    "no clip min": Case("training.weight_clip_min", "is required", "weight_clip_min = 0.1\n", "", at=""),
    "no clip max": Case("training.weight_clip_max", "is required", "weight_clip_max = 5.0\n", "", at=""),
    "no temperature": Case(
        "training.temperature", "is required by stage rho1", "temperature = 1.0\n", "", at="", stage="rho1"
    ),
    "no k_percent": Case(
        "training.k_percent", "is required by stage rho1", "k_percent = 0.6\n", "", at="", stage="rho1"
    ),
    "no reference": Case(
        "models.reference.path",
        "is required by stage rho1",
        '[models.reference]\npath = "models/reference"\ndtype = "float32"\n',
        "",
        at="",
        stage="rho1",
    ),
    "no critic": Case(
        "experiment.critic_checkpoint",
        "is required by stage verifiable",
        'critic_checkpoint = "critic"\n',
        "",
        at="",
        mend="--critic-checkpoint",
    ),
    # Keys that do not exist.
    "misspelt key": Case(
        "training.warmup_rati",
        "no such key",
        "n_epochs = 1.0",
        "n_epochs = 1.0\nwarmup_rati = 0.1",
        at="warmup_rati",
        mend='"training.warmup_ratio"?',
    ),
    "misspelt table": Case("traning", "no such table", append="[traning]\nx = 1\n", at="[traning]", mend='"training"?'),
    "misspelt deep key": Case(
        "data_sampling.curriculum_schedule[1].epoch_rang",
        "no such key",
        append=PHASES.replace("epoch_range = [0.5", "epoch_rang = 1\nepoch_range = [0.5"),
        at="epoch_rang =",
        mend='curriculum_schedule[1].epoch_range"?',
    ),
    "key in the wrong table": Case(
        "dataset.batch_size",
        "no such key",
        'name = "tiny"',
        'name = "tiny"\nbatch_size = 3',
        mend='"training.batch_size"?',
        at="batch_size = 3",
    ),
    "key like nothing": Case(
        "deepspeed.zzz", "no such key", "[deepspeed]", "[deepspeed]\nzzz = 1", at="zzz", mend="[deepspeed] has config"
    ),
    "key at the top": Case(
        "learning_rate",
        "no such table",
        "[experiment]",
        "learning_rate = 1.0\n[experiment]",
        at="learning_rate = 1.0",
        mend='"training.learning_rate"?',
    ),
    "key that pydantic-settings would take": Case(
        "_env_file", "no such table", "[experiment]", '_env_file = "x"\n[experiment]', at="_env_file", mend="remove it"
    ),
    # Keys of another stage.
    "rho1's key": Case(
        "training.k_percent",
        "belongs to stage rho1, not to verifiable",
        "beta = 0.9",
        "beta = 0.9\nk_percent = 0.5",
        at="k_percent",
    ),
    "verifiable's key": Case(
        "training.beta",
        "belongs to stage verifiable, not to critic",
        "n_epochs = 1.0",
        "n_epochs = 1.0\nbeta = 0.9",
        at="beta",
        stage="critic",
    ),
    "critic's and verifiable's key": Case(
        "training.gamma",
        "belongs to stages critic and verifiable, not to baseline",
        "n_epochs = 1.0",
        "n_epochs = 1.0\ngamma = 0.9",
        at="gamma",
        stage="baseline",
        mend="experiment.stage to critic or verifiable",
    ),
    "critic_checkpoint elsewhere": Case(
        "experiment.critic_checkpoint",
        "belongs to stage verifiable, not to rho1",
        'name = "trial"',
        'name = "trial"\ncritic_checkpoint = "critic"',
        at="critic_checkpoint",
        stage="rho1",
    ),
    "reference elsewhere": Case(
        "models.reference",
        "belongs to stage rho1, not to baseline",
        append='[models.reference]\npath = "m/r"\n',
        at="[models.reference]",
        stage="baseline",
    ),
    "value head elsewhere": Case(
        "value_head",
        "belongs to stages critic and verifiable",
        append='[value_head]\ntype = "mlp"\n',
        at="[value_head]",
        stage="baseline",
    ),
    "variance elsewhere": Case(
        "early_stopping.variance_max",
        "belongs to stage critic",
        append="[early_stopping]\nvariance_max = 0.2\n",
        at="variance_max",
    ),
    "reference config elsewhere": Case(
        "deepspeed.reference_config",
        "belongs to stages critic, verifiable and rho1",
        'config = "ds/zero3.json"',
        'config = "ds/zero3.json"\nreference_config = "x"',
        at="reference_config",
        stage="baseline",
    ),
    # Types.
    "text for a number": Case(
        "training.learning_rate",
        'must be a number above 0 and at most 1, not "1e-3"',
        "learning_rate = 1e-3",
        'learning_rate = "1e-3"',
        mend="without quotes",
    ),
    "fraction of a batch": Case(
        "training.batch_size",
        "must be a whole number of at least 1, not 2.0",
        "batch_size = 2",
        "batch_size = 2.0",
        mend="batch_size = 4",
    ),
    "true for a number": Case(
        "training.n_epochs", "must be a number above 0, not true", "n_epochs = 1.0", "n_epochs = true"
    ),
    "number for a text": Case("dataset.name", "must be a text", 'name = "tiny"', "name = 5"),
    "date for a text": Case("dataset.name", "not 2024-01-01", 'name = "tiny"', "name = 2024-01-01"),
    "text for true": Case(
        "checkpoint.save_best",
        'must be true or false, not "yes"',
        append='[checkpoint]\nsave_best = "yes"\n',
        at="save_best",
    ),
    "value for a table": Case(
        "models.policy",
        "must be a table, not 5",
        '[models.policy]\npath = "models/policy"\ndtype = "float32"',
        "[models]\npolicy = 5",
        at="policy = 5",
    ),
    "list for a table": Case("runtime", "must be a table", append="[[runtime]]\nseed = 1\n", at="[[runtime]]"),
    "three betas": Case(
        "training.betas",
        "must be a list of 2 numbers, not [0.9, 0.95, 0.99]",
        "n_epochs = 1.0",
        "n_epochs = 1.0\nbetas = [0.9, 0.95, 0.99]",
        at="betas",
    ),
    "one beta": Case(
        "training.betas",
        "must be a list of 2 numbers, not [0.9]",
        "n_epochs = 1.0",
        "n_epochs = 1.0\nbetas = [0.9]",
        at="betas",
    ),
    "beta of 1": Case(
        "training.betas[1]",
        "must be a number of at least 0 and below 1, not 1.0",
        "n_epochs = 1.0",
        "n_epochs = 1.0\nbetas = [\n  0.9,\n  1.0, # second\n]",
        at="# second",
    ),
    "not a number": Case("training.learning_rate", "not nan", "learning_rate = 1e-3", "learning_rate = nan"),
    "infinity": Case("training.beta", "not inf", "beta = 0.9", "beta = inf"),
    "tags of numbers": Case(
        "experiment.tags",
        "must be a table of names and values, not [1, 2]",
        'name = "trial"',
        'name = "trial"\ntags = [1, 2]',
        at="tags",
    ),
    "tag that is no text": Case(
        "experiment.tags.a", "must be a text, not 3", 'name = "trial"', 'name = "trial"\ntags = { a = 3 }', at="tags"
    ),
    # Ranges and choices.
    "learning rate of 3": Case(
        "training.learning_rate", "at most 1, not 3.0", "learning_rate = 1e-3", "learning_rate = 3.0"
    ),
    "no epoch at all": Case("training.n_epochs", "must be a number above 0, not 0", "n_epochs = 1.0", "n_epochs = 0"),
    "empty batch": Case("training.batch_size", "of at least 1, not 0", "batch_size = 2", "batch_size = 0"),
    "beta of 0": Case("training.beta", "above 0, not 0.0", "beta = 0.9", "beta = 0.0"),
    "k_percent of 60": Case(
        "training.k_percent", "above 0 and at most 1, not 60", "k_percent = 0.6", "k_percent = 60", stage="rho1"
    ),
    "ratio above 1": Case(
        "data_sampling.correct_ratio",
        "at most 1",
        "n_samples = 8",
        "n_samples = 8\ncorrect_ratio = 1.5",
        at="correct_ratio",
    ),
    "unknown stage": Case(
        "experiment.stage",
        'there is no stage "critik"',
        'stage = "verifiable"',
        'stage = "critik"',
        mend='did you mean "critic"?',
    ),
    "misspelt choice": Case(
        "training.td_normalize",
        'must be "none" or "zscore", not "zscor"',
        "beta = 0.9",
        'beta = 0.9\ntd_normalize = "zscor"',
        at="td_normalize",
        mend='did you mean "zscore"?',
    ),
    "choice in capitals": Case(
        "models.policy.dtype",
        '"float32", "bfloat16" or "float16"',
        'dtype = "float32"',
        'dtype = "BFLOAT16"',
        mend='did you mean "bfloat16"?',
    ),
    "mps": Case("runtime.device", "mps is refused", append='[runtime]\ndevice = "mps"\n', at="device", mend='"auto"'),
    "name with a slash": Case("experiment.name", "letters, digits", 'name = "trial"', 'name = "a/b"'),
    "empty name": Case("experiment.name", 'not ""', 'name = "trial"', 'name = ""'),
    "empty path": Case("models.policy.path", "must not be empty", 'path = "models/policy"', 'path = ""'),
    "bucket without s3": Case(
        "mlflow.s3_artifacts", "s3://bucket/prefix", append='s3_artifacts = "bucket/x"\n', at="s3_artifacts"
    ),
    "credentials in a bucket's address": Case(
        "mlflow.s3_artifacts", "s3://***@bucket", append='s3_artifacts = "s3://KEY:pw@bucket/x"\n', at="s3_artifacts"
    ),
    # Between values.
    "batch above samples": Case(
        "training.batch_size",
        "is 9, more than data_sampling.n_samples = 8 (run.toml:",
        "batch_size = 2",
        "batch_size = 9",
        mend="at most 8",
    ),
    "clip upside down": Case(
        "training.weight_clip_min",
        "is 9.0, above training.weight_clip_max = 5.0",
        "weight_clip_min = 0.1",
        "weight_clip_min = 9.0",
    ),
    "variance upside down": Case(
        "early_stopping.variance_min",
        "is 0.2, above early_stopping.variance_max = 0.1",
        append="[early_stopping]\nvariance_min = 0.2\nvariance_max = 0.1\n",
        at="variance_min",
        stage="critic",
    ),
    "every loss a spike": Case(
        "stability.spike_factor",
        "is 1.0: every loss above the median, or every loss, would be a spike",
        append="[stability]\nspike_factor = 1.0\n",
        at="spike_factor",
        mend="0.0 for off",
    ),
    "difficulties upside down": Case(
        "data_sampling.difficulty_range",
        "ends at 1, before it begins at 5",
        "n_samples = 8",
        "n_samples = 8\ndifficulty_range = [5, 1]",
        at="difficulty_range",
    ),
    "bins that share": Case(
        "data_sampling.difficulty_bins.b",
        "shares difficulty 3 with data_sampling.difficulty_bins.a",
        "n_samples = 8",
        "n_samples = 8\n[data_sampling.difficulty_bins]\na = [1, 3]\nb = [3, 4]",
        at="b = [3",
    ),
    "bin upside down": Case(
        "data_sampling.difficulty_bins.a",
        "ends at 1",
        "n_samples = 8",
        "n_samples = 8\ndifficulty_bins = { a = [3, 1] }",
        at="difficulty_bins",
    ),
    "bin with a dotted name": Case(
        "data_sampling.difficulty_bins",
        "not a usable name",
        "n_samples = 8",
        'n_samples = 8\ndifficulty_bins = { "a.b" = [1, 3] }',
        at="difficulty_bins",
    ),
    "curriculum without phases": Case(
        "data_sampling.curriculum_schedule",
        "is empty",
        "n_samples = 8",
        "n_samples = 8\ncurriculum_learning = true",
        at=None,
    ),
    "gap in the curriculum": Case(
        "data_sampling.curriculum_schedule[1].epoch_range",
        "no phase covers [0.5, 0.6]",
        append=PHASES.replace("[0.5, 1.0]", "[0.6, 1.0]"),
        at="[0.6, 1.0]",
    ),
    "late start": Case(
        "data_sampling.curriculum_schedule[0].epoch_range",
        "the run starts at 0.0",
        append=PHASES.replace("[0.0, 0.5]", "[0.1, 0.5]"),
        at="[0.1, 0.5]",
    ),
    "early end": Case(
        "data_sampling.curriculum_schedule[1].epoch_range",
        "no phase covers [0.9, 1.0]",
        append=PHASES.replace("[0.5, 1.0]", "[0.5, 0.9]"),
        at="[0.5, 0.9]",
    ),
    "phase backwards": Case(
        "data_sampling.curriculum_schedule[1].epoch_range",
        "must end after it begins",
        append=PHASES.replace("[0.5, 1.0]", "[1.0, 0.5]"),
        at="[1.0, 0.5]",
    ),
    "phase beyond the run": Case(
        "data_sampling.curriculum_schedule[1].epoch_range[1]",
        "at most 1, not 1.5",
        append=PHASES.replace("[0.5, 1.0]", "[0.5, 1.5]"),
        at="[0.5, 1.5]",
    ),
    "phase without weights": Case(
        "data_sampling.curriculum_schedule[0].difficulty_weights",
        "is required",
        append=PHASES.replace("difficulty_weights = { low = 1.0 }\n", ""),
        at=None,
    ),
    "weight of no bin": Case(
        "data_sampling.curriculum_schedule[0].difficulty_weights",
        "'lo', which",
        append=PHASES.replace("{ low = 1.0 }", "{ lo = 1.0 }"),
        at="{ lo =",
        mend='did you mean "low"?',
    ),
    "weights all 0": Case(
        "data_sampling.curriculum_schedule[0].difficulty_weights",
        "all weights are 0",
        append=PHASES.replace("{ low = 1.0 }", "{ low = 0.0 }"),
        at="{ low = 0.0 }",
    ),
    "negative weight": Case(
        "data_sampling.curriculum_schedule[0].difficulty_weights.low",
        "at least 0, not -1.0",
        append=PHASES.replace("{ low = 1.0 }", "{ low = -1.0 }"),
        at="{ low = -1.0 }",
    ),
    "reward model without path": Case(
        "models.reward.path",
        'is required where models.reward.source = "model"',
        'config = "ds/zero3.json"',
        'config = "ds/zero3.json"\nreference_config = "ds/zero3.json"',
        append='[models.reward]\nsource = "model"\n',
        at="",
    ),
    "reward path without use": Case(
        "models.reward.path", "reads no reward model", append='[models.reward]\npath = "m"\n', at='path = "m"'
    ),
    "reward path beside scores": Case(
        "models.reward.path",
        'models.reward.source = "scores" reads no reward model',
        append='[models.reward]\nsource = "scores"\npath = "m"\n',
        at='path = "m"',
    ),
    "reward model elsewhere": Case(
        "models.reward",
        "belongs to stages critic and verifiable",
        append='[models.reward]\nsource = "model"\n',
        at="[models.reward]",
        stage="rho1",
    ),
    "float16 on a CPU": Case(
        "models.policy.dtype",
        "float16 does not train on a CPU",
        'dtype = "float32"',
        'dtype = "float16"',
        append='[runtime]\ndevice = "cpu"\n',
        mend="bfloat16",
    ),
    "monitor without a value head": Case(
        "early_stopping.monitor",
        "has no value head",
        append='[early_stopping]\nmonitor = "value_loss"\n',
        at="monitor",
        stage="rho1",
    ),
    "plain folder for tracking": Case(
        "mlflow.tracking_uri",
        "plain folder",
        'tracking_uri = ""',
        'tracking_uri = "mlruns"',
        mend="sqlite:///mlflow.db",
    ),
    "unknown tracking store": Case(
        "mlflow.tracking_uri",
        "knows no store sqlight://",
        'tracking_uri = ""',
        'tracking_uri = "sqlight:///x.db"',
        mend='did you mean "sqlite"?',
    ),
    # References.
    "reference to nothing": Case(
        "dataset.name",
        "refers to experiment.nam, which is not set",
        'name = "tiny"',
        'name = "${experiment.nam}"',
        mend='did you mean "experiment.name"?',
    ),
    "reference to itself": Case(
        "dataset.name", "refers to itself: dataset.name -> dataset.name", 'name = "tiny"', 'name = "x-${dataset.name}"'
    ),
    "open reference": Case(
        "dataset.name", "without its '}'", 'name = "tiny"', 'name = "${experiment.name"', mend="$${"
    ),
    "malformed reference": Case("dataset.name", "malformed reference ${a b}", 'name = "tiny"', 'name = "${a b}"'),
    "reference to a table": Case("dataset.name", "which is a table", 'name = "tiny"', 'name = "${experiment}"'),
    "list within a text": Case(
        "dataset.name",
        "puts the list training.betas into a text",
        'name = "tiny"',
        'name = "x${training.betas}"',
        mend='"${training.betas[0]}"',
    ),
    "reference to a text for a number": Case(
        "training.batch_size", 'of at least 1, not "trial"', "batch_size = 2", 'batch_size = "${experiment.name}"'
    ),
}

# Where the origin is neither the changed text nor the file.
ORIGINS = {
    "curriculum without phases": "default",
    "phase without weights": "[[data_sampling.curriculum_schedule]]",
}


@pytest.mark.parametrize("name", CASES)
def test_bad_value_is_the_only_problem_and_says_where(workspace, name):
    case = CASES[name]
    edits = [(case.old, case.new)] if case.old else []
    workspace.write_config(case.stage, *edits, append=case.append)
    found = workspace.problems()

    assert [problem.key for problem in found] == [case.key], [str(problem) for problem in found]
    problem = found[0]
    assert case.says in problem.message
    assert case.mend in problem.mend
    if name == "phase without weights":
        assert problem.origin == f"run.toml:{first_line(workspace, ORIGINS[name])}"
    elif name in ORIGINS:
        assert problem.origin == ORIGINS[name]
    else:
        fragment = case.new if case.at is None else case.at
        assert problem.origin == (workspace.line(fragment) if fragment else "run.toml")


def first_line(workspace, fragment):
    text = workspace.path("run.toml").read_text()
    return text[: text.index(fragment)].count("\n") + 1


def test_there_are_enough_cases():
    assert len(CASES) >= 60


def test_all_problems_are_reported_at_once(workspace):
    workspace.write_config(
        "verifiable",
        ("beta = 0.9", "betta = 0.9"),
        ("learning_rate = 1e-3", 'learning_rate = "fast"'),
        ("batch_size = 2", "batch_size = 99"),
        ('path = "models/policy"', 'path = "models/nowhere"'),
        ('train = "data/train.jsonl"', 'train = "data/nowhere.jsonl"'),
        append="[traning]\nx = 1\n",
    )
    found = {problem.key for problem in workspace.problems("training.k_percent=0.5", environ={"WMTP_FOO": "1"})}
    assert found == {
        "training.beta",
        "training.betta",
        "training.learning_rate",
        "training.batch_size",
        "training.k_percent",
        "models.policy.path",
        "dataset.train",
        "traning",
        "foo",
    }


def test_a_wrong_stage_hides_no_other_problem(workspace):
    workspace.write_config("verifiable", ('stage = "verifiable"', 'stage = "x"'), ("batch_size = 2", "batch_size = 0"))
    found = {problem.key for problem in workspace.problems("training.zzz=1")}
    assert found == {"experiment.stage", "training.batch_size", "training.zzz"}


def test_a_default_that_refers_to_a_missing_key_is_no_problem_of_its_own(workspace):
    workspace.write_config("baseline", ('name = "trial"\n', ""))
    assert [problem.key for problem in workspace.problems()] == ["experiment.name"]


def test_references_in_a_circle_are_said_of_each(workspace):
    workspace.write_config(
        "baseline", ('name = "trial"', 'name = "${dataset.name}"'), ('name = "tiny"', 'name = "${experiment.name}"')
    )
    found = workspace.problems()
    assert [problem.key for problem in found] == ["experiment.name", "dataset.name"]
    assert "experiment.name -> dataset.name -> experiment.name" in found[0].message


def test_overlaps_and_unnormalised_weights_are_warnings(workspace):
    phases = PHASES.replace("[0.5, 1.0]", "[0.4, 1.0]").replace("{ low = 0.5, high", "{ low = 1.5, high")
    workspace.write_config("baseline", append=phases)
    first, second = workspace.load().warnings
    assert first.severity == second.severity == "warning"
    assert first.key == "data_sampling.curriculum_schedule[1].epoch_range"
    assert "overlaps data_sampling.curriculum_schedule[0].epoch_range" in first.message
    assert "the earlier one wins" in first.message
    assert first.origin == workspace.line("[0.4, 1.0]")
    assert second.key == "data_sampling.curriculum_schedule[1].difficulty_weights"
    assert "sum to 2, not to 1" in second.message
    assert "low = 0.75, high = 0.25" in second.message


@pytest.mark.parametrize(
    ("more", "key", "message"),
    [
        ("", "stability.spike_factor", "nothing is a spike"),
        (
            "spike_factor = 3.0\n[checkpoint]\nsave_checkpoint_every = 0\n",
            "checkpoint.save_checkpoint_every",
            "go back",
        ),
        ("spike_factor = 3.0\n", None, ""),
    ],
)
def test_a_rollback_that_cannot_be_is_a_warning(workspace, more, key, message):
    workspace.write_config("baseline", append=f'[stability]\non_spike = "rollback"\n{more}')
    warnings = workspace.load().warnings
    assert [warning.key for warning in warnings] == ([key] if key else [])
    assert all(message in warning.message for warning in warnings)


def test_a_dtype_without_mixed_precision_is_a_warning(workspace):
    workspace.write_config(
        "baseline", ('dtype = "float32"', 'dtype = "bfloat16"'), append="[runtime]\nmixed_precision = false\n"
    )
    (warning,) = workspace.load().warnings
    assert warning.key == "models.policy.dtype"
    assert "float32 throughout" in warning.message


def test_passwords_are_masked_in_messages(workspace):
    workspace.write_config("baseline")
    (problem,) = workspace.problems("mlflow.tracking_uri=ftp://user:hunter2@host/x")
    assert "hunter2" not in str(problem)
    assert "***@host" in problem.origin
