"""Config files that cannot be read, variables and overrides that make no sense."""

import pytest

from wmtp_ds.config import ConfigError, load_config


def only(problems):
    assert len(problems) == 1, [str(problem) for problem in problems]
    return problems[0]


SYNTAX = {
    "no equals sign": ('[experiment]\nname "x"\n', 2, "Expected '='"),
    "no quotes": ("[experiment]\nname = x\n", 2, "Invalid value"),
    "open bracket": ("[training]\nbetas = [0.9\n[x]\n", 3, "is not TOML"),
    "key twice": ('[experiment]\nname = "a"\nname = "b"\n', 3, "Cannot overwrite a value"),
    "table twice": ("[training]\nx = 1\n[training]\n", 3, "Cannot declare"),
    "open text": ('name = "abc\n', 1, "is not TOML"),
    "open multi-line text": ('a = 1\nname = """abc\n', 2, "is not TOML"),
}


@pytest.mark.parametrize("name", SYNTAX)
def test_syntax_errors_name_file_and_line(workspace, name):
    text, line, says = SYNTAX[name]
    workspace.write("run.toml", text)
    problem = only(workspace.problems())
    assert problem.origin == f"run.toml:{line}"
    assert says in problem.message


def test_empty_missing_folder_and_binary_files(workspace):
    workspace.write("run.toml", "# nothing\n")
    assert only(workspace.problems()).message == "is empty"
    workspace.path("run.toml").write_bytes(b'name = "\xff"')
    assert "not UTF-8 text (byte 9)" in only(workspace.problems()).message
    workspace.path("run.toml").unlink()
    workspace.write("other.toml", "x = 1")
    missing = only(workspace.problems())
    assert (missing.origin, missing.message) == ("run.toml", "does not exist")
    assert "other.toml" in missing.mend
    workspace.path("run.toml").mkdir()
    workspace.write("run.toml/a.toml", "x = 1")
    folder = only(workspace.problems())
    assert "is a folder" in folder.message
    assert "a.toml" in folder.mend


def test_byte_order_mark_and_windows_line_ends_are_fine(workspace):
    text = workspace.text("baseline").replace("batch_size = 2", "batch_size = 0").replace("\n", "\r\n")
    workspace.path("run.toml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    problem = only(workspace.problems())
    assert (problem.key, problem.origin) == ("training.batch_size", workspace.line("batch_size = 0"))


def test_numbers_beyond_reason_and_depth_beyond_reason(workspace):
    workspace.write("run.toml", f"x = {'9' * 5000}\n")
    assert "is not usable TOML" in only(workspace.problems()).message
    workspace.write("run.toml", f"x = {'[' * 5000}\n")
    assert "run.toml" in only(workspace.problems()).origin


def test_extends_what_is_not_there(workspace):
    workspace.write("run.toml", '\nextends = "base.toml"\n')
    problem = only(workspace.problems())
    assert (problem.key, problem.origin, problem.message) == ("extends", "run.toml:2", "base.toml does not exist")


def test_extends_in_a_circle(workspace):
    workspace.write("run.toml", 'extends = "a/b.toml"\n')
    workspace.write("a/b.toml", '# b\nextends = "../run.toml"\n')
    problem = only(workspace.problems())
    assert (problem.key, problem.origin) == ("extends", "a/b.toml:2")
    assert "run.toml -> a/b.toml -> run.toml" in problem.message


def test_extends_itself_through_a_link(workspace):
    workspace.write("run.toml", 'extends = "link.toml"\n')
    workspace.path("link.toml").symlink_to("run.toml")
    assert "in a circle" in only(workspace.problems()).message


@pytest.mark.parametrize("value", ["5", '["a.toml"]', '""'])
def test_extends_no_name(workspace, value):
    workspace.write("run.toml", f"extends = {value}\n")
    problem = only(workspace.problems())
    assert (problem.key, problem.origin) == ("extends", "run.toml:1")
    assert "must be a file's name" in problem.message


def test_errors_in_the_extended_file_carry_its_name_and_line(workspace):
    base = workspace.text("baseline").replace("batch_size = 2", "batch_size = 0")
    workspace.write("base.toml", base + "[traning]\nx = 1\n")
    workspace.write("run.toml", 'extends = "base.toml"\n')
    found = {problem.key: problem.origin for problem in workspace.problems()}
    assert found == {
        "training.batch_size": workspace.line("batch_size", "base.toml"),
        "traning": workspace.line("[traning]", "base.toml"),
    }
    workspace.write("base.toml", "[x\n")
    assert only(workspace.problems()).origin == "base.toml:1"


OVERRIDES = {
    "no equals sign": (
        "training.batch_size",
        "training.batch_size",
        "has no '='",
        "key=value, as in --override training",
    ),
    "no key": ("=3", "", "names no key", "dotted"),
    "blank key": (" =3", "", "names no key", "dotted"),
    "dots in a row": ("training..x=3", "", "'training..x' is not a key", "dotted"),
    "open bracket": ("a[0=3", "", "'a[0' is not a key", "brackets"),
    "negative index": ("a[-1]=3", "", "'a[-1]' is not a key", "brackets"),
    "misspelt key": ("training.batchsize=3", "training.batchsize", "no such key", '"training.batch_size"?'),
    "misspelt table": ("trainig.batch_size=3", "trainig", "no such table", '"training"?'),
    "wrong type": ("training.batch_size=two", "training.batch_size", 'not "two"', "--override training.batch_size=4"),
    "empty number": ("training.batch_size=", "training.batch_size", 'not ""', "training.batch_size=4"),
    "two values": ("training.batch_size=1\nx=2", "training.batch_size", "whole number", "training.batch_size=4"),
    "another stage": ("training.k_percent=0.5", "training.k_percent", "belongs to stage rho1", "remove it"),
    "table": ("training=3", "training", "must be a table, not 3", "training"),
    "key in a value": ("experiment.name.x=3", "experiment.name", "must be a text", "experiment.name=my-run"),
    "index into a table": ("training[0]=3", "training[0]", "training is no list", "show"),
    "key into a list": (
        "data_sampling.curriculum_schedule.x=3",
        "data_sampling.curriculum_schedule.x",
        "name one of its items",
        "show",
    ),
    "index beyond the end": (
        "training.betas[3]=0.9",
        "training.betas[3]",
        "training.betas has 2 items: [0] to [1] change one, [2] adds one",
        "show",
    ),
    "item too many": ("training.betas[2]=0.9", "training.betas", "a list of 2 numbers", "[0.9, 0.95]"),
    "wrong item": ("training.betas[0]=x", "training.betas[0]", 'below 1, not "x"', "training.betas[0]"),
    "half a surrogate": ("dataset.name=\udcff", "dataset.name", "not UTF-8", "readable"),
    "NUL in a path": ("models.policy.path=a\0b", "models.policy.path", "NUL", "models.policy.path"),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_bad_override(workspace, name):
    text, key, says, mend = OVERRIDES[name]
    workspace.write_config("baseline")
    problem = only(workspace.problems(text))
    assert problem.key == key
    assert says in problem.message
    assert mend in problem.mend
    shown = text if text.isprintable() or "\n" in text or "\0" in text else ascii(text)
    assert problem.origin == f"--override {shown}"


VARIABLES = {
    "misspelt key": (
        "WMTP_TRAINING__BATCHSIZE",
        "3",
        "training.batchsize",
        "names no key",
        "did you mean WMTP_TRAINING__BATCH_SIZE?",
    ),
    "misspelt table": ("WMTP_TRAINIG__BATCH_SIZE", "3", "trainig", "names no key", "did you mean WMTP_TRAINING?"),
    "one underscore": ("WMTP_TRAINING_BATCH_SIZE", "3", "training_batch_size", "names no key", "unset it"),
    "unknown": ("WMTP_FOO", "3", "foo", "names no key", "unset it"),
    "no key": ("WMTP_", "3", "", "names no key", "WMTP_TRAINING__LEARNING_RATE"),
    "half a key": ("WMTP_TRAINING__", "3", "training", "names no key", "WMTP_TRAINING__LEARNING_RATE"),
    "wrong type": (
        "WMTP_TRAINING__LEARNING_RATE",
        "fast",
        "training.learning_rate",
        'not "fast"',
        "WMTP_TRAINING__LEARNING_RATE=1e-05",
    ),
    "range": (
        "WMTP_TRAINING__LEARNING_RATE",
        "2",
        "training.learning_rate",
        "not 2",
        "WMTP_TRAINING__LEARNING_RATE=1e-05",
    ),
    "another stage": ("WMTP_TRAINING__BETA", "0.9", "training.beta", "belongs to stage verifiable", "remove it"),
    "mps": ("WMTP_RUNTIME__DEVICE", "mps", "runtime.device", "mps is refused", "WMTP_RUNTIME__DEVICE=auto"),
    "index beyond the end": (
        "WMTP_DATA_SAMPLING__CURRICULUM_SCHEDULE__2__EPOCH_RANGE",
        "[0, 1]",
        "data_sampling.curriculum_schedule[2].epoch_range",
        "is empty: [0] adds its first item",
        "show",
    ),
    "kernels": ("WMTP_KERNELS", "cuda", "", "must be torch or triton, not 'cuda'", "unset"),
    "not UTF-8": ("WMTP_DATASET__NAME", "\udcff", "dataset.name", "not UTF-8", "readable"),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_bad_variable(workspace, name):
    variable, value, key, says, mend = VARIABLES[name]
    workspace.write_config("baseline")
    problem = only(workspace.problems(environ={"PATH": "/bin", "WMTP_KERNELS": "torch", variable: value}))
    assert problem.key == key
    assert problem.origin == f"environment variable {variable}"
    assert says in problem.message
    assert mend in problem.mend


def test_every_unknown_variable_and_override_is_named_even_if_they_share_a_table(workspace):
    workspace.write_config("baseline", append="[traning]\na = 1\nb = 2\n")
    found = workspace.problems(
        "traning.x=1",
        "traning.y=1",
        "value_head.type=mlp",
        "value_head.activation=none",
        environ={"WMTP_TRANING__Z": "1", "WMTP_FOO__A": "1", "WMTP_FOO__B": "1"},
    )
    assert sorted((problem.key, problem.origin) for problem in found) == [
        ("foo", "environment variable WMTP_FOO__A"),
        ("foo", "environment variable WMTP_FOO__B"),
        ("traning", "--override traning.x=1"),
        ("traning", "--override traning.y=1"),
        ("traning", "environment variable WMTP_TRANING__Z"),
        ("traning", workspace.line("[traning]")),
        ("value_head", "--override value_head.activation=none"),
        ("value_head", "--override value_head.type=mlp"),
    ]


def test_the_error_lists_everything_in_readable_form(workspace):
    workspace.write_config("baseline", ("batch_size = 2", "batch_size = 0"))
    with pytest.raises(ConfigError) as caught:
        load_config(workspace.path("run.toml"), ["x"], environ={})
    text = str(caught.value)
    assert f"{workspace.path('run.toml')}: 2 problems" in text
    assert "x  (--override x)\n    has no '='\n    -> write key=value" in text
    assert "training.batch_size  (" in text
