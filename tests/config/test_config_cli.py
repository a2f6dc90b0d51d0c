"""``wmtp-ds validate`` and ``wmtp-ds show`` as programs: output, exit codes, and what they must not import."""

import json
import os
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from wmtp_ds.cli.show import show
from wmtp_ds.cli.validate import validate

HEAVY = ("torch", "transformers", "deepspeed", "mlflow")


def run(*arguments, code=0, **environ):
    """The real program, in the current directory."""
    found = subprocess.run(
        [sys.executable, "-m", "wmtp_ds", *arguments],
        capture_output=True,
        text=True,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("WMTP_")}, **environ},
        timeout=60,
        check=False,
    )
    assert found.returncode == code, found.stderr
    assert "Traceback" not in found.stderr
    return found


def test_validate_prints_what_will_run(workspace):
    workspace.write_config("verifiable")
    found = run("validate", "run.toml")
    assert found.stdout.splitlines() == [
        "run.toml is valid",
        "  experiment trial",
        "  stage      verifiable",
        "  model      models/policy",
        "  dataset    tiny",
    ]
    assert found.stderr == ""


def test_validate_prints_every_problem_and_exits_with_2(workspace):
    workspace.write_config("verifiable", ("batch_size = 2", "batch_size = 0"))
    found = run("validate", "run.toml", "--override", "training.lerning_rate=1", code=2, WMTP_RUNTIME__DEVICE="mps")
    assert found.stdout == ""
    assert found.stderr.startswith("error: run.toml: 3 problems\n")
    for piece in (
        f"training.batch_size  ({workspace.line('batch_size')})",
        "training.lerning_rate  (--override training.lerning_rate=1)",
        "runtime.device  (environment variable WMTP_RUNTIME__DEVICE)",
    ):
        assert piece in found.stderr


def test_an_override_without_a_value_is_exit_2_with_an_example(workspace):
    workspace.write_config("baseline")
    found = run("validate", "run.toml", "--override", "training.batch_size", code=2)
    assert "has no '='" in found.stderr
    assert "--override training.learning_rate=1e-5" in found.stderr


def test_a_missing_file_is_exit_2(workspace):
    found = run("validate", "nowhere.toml", code=2)
    assert "nowhere.toml\n    does not exist" in found.stderr


def test_validate_as_json(workspace):
    workspace.write_config("verifiable")
    good = CliRunner().invoke(validate, ["run.toml", "--json"], standalone_mode=False)
    assert json.loads(good.stdout) == {
        "ok": True,
        "file": "run.toml",
        "experiment": "trial",
        "stage": "verifiable",
        "model": "models/policy",
        "dataset": "tiny",
        "warnings": [],
    }
    found = run("validate", "run.toml", "--json", "--override", "training.beta=0", code=2)
    report = json.loads(found.stdout)
    assert report["ok"] is False
    assert report["problems"] == [
        {
            "key": "training.beta",
            "origin": "--override training.beta=0",
            "message": "must be a number above 0, not 0",
            "mend": "write --override training.beta=0.9",
            "severity": "error",
        }
    ]


def test_warnings_go_to_stderr(workspace):
    workspace.write_config("baseline", ('dtype = "float32"', 'dtype = "bfloat16"'))
    result = CliRunner().invoke(
        validate, ["run.toml", "--override", "runtime.mixed_precision=false"], standalone_mode=False
    )
    assert "warning: models.policy.dtype" in result.stderr
    assert "run.toml is valid" in result.stdout


def test_online_is_handed_on(workspace, monkeypatch):
    seen = []
    monkeypatch.setattr("wmtp_ds.config.load.CRITIC_CHECKS_ONLINE", (seen.append,))
    workspace.write_config("verifiable")
    CliRunner().invoke(validate, ["run.toml", "--online"], standalone_mode=False)
    assert len(seen) == 1


def test_show_prints_toml_with_the_origin_of_every_value(workspace):
    workspace.write_config("verifiable", append='[data_sampling.difficulty_bins]\n"1" = [1, 2]\n')
    result = CliRunner().invoke(
        show,
        ["run.toml", "--override", "training.batch_size=3"],
        standalone_mode=False,
        env={"WMTP_RUNTIME__SEED": "5"},
    )
    lines = result.stdout.splitlines()
    assert tomllib.loads(result.stdout)["training"]["batch_size"] == 3
    for value, origin in (
        ("batch_size = 3", "--override training.batch_size=3"),
        ("seed = 5", "environment variable WMTP_RUNTIME__SEED"),
        ("beta = 0.9", workspace.line("beta = 0.9")),
        ("gamma = 1.0", "default"),
        ('save_dir = "checkpoints/trial"', "default"),
    ):
        assert [line for line in lines if line.split("  ")[0] == value and line.endswith(f"  # {origin}")], value
    values = [line for line in lines if line and not line.startswith("[")]
    assert all("  # " in line for line in values)
    short = {line.index("  # ") for line in values if len(line.split("  # ")[0].rstrip()) < 30}
    assert len(short) == 1, "origins stand in one column"


def test_show_needs_no_models_and_masks_passwords(workspace):
    workspace.write_config("rho1", ("models/policy", "nowhere"), ('uri = ""', 'uri = "http://user:hunter2@host"'))
    found = run("show", "run.toml")
    assert "hunter2" not in found.stdout + found.stderr
    assert 'tracking_uri = "http://***@host"' in found.stdout
    as_json = run("show", "run.toml", "--json", "--override", "mlflow.tracking_uri=http://user:hunter2@host")
    assert "hunter2" not in as_json.stdout
    report = json.loads(as_json.stdout)
    assert report["config"]["models"]["reference"]["path"] == "models/reference"
    assert report["origins"]["training.k_percent"] == {"layer": "file", "where": workspace.line("k_percent")}
    assert report["origins"]["mlflow.tracking_uri"]["layer"] == "override"


def test_show_of_a_bad_config_is_exit_2(workspace):
    workspace.write_config("baseline", ("batch_size = 2", "batch_size = 0"))
    assert "training.batch_size" in run("show", "run.toml", code=2).stderr


def test_show_prints_a_curriculum(workspace):
    phases = "\n[[data_sampling.curriculum_schedule]]\nepoch_range = [0.0, 1.0]\ndifficulty_weights = { low = 1.0 }\n"
    workspace.write_config("baseline", append=phases)
    result = CliRunner().invoke(show, ["run.toml"], standalone_mode=False)
    shown = tomllib.loads(result.stdout)["data_sampling"]["curriculum_schedule"]
    assert shown == [{"epoch_range": [0.0, 1.0], "difficulty_weights": {"low": 1.0}}]


PROBE = """
import json, sys
from wmtp_ds.cli.main import main
try:
    main(json.loads(sys.argv[1]))
except SystemExit as leave:
    code = leave.code
heavy = [name for name in {heavy!r} if name in sys.modules]
print(json.dumps([code, heavy]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["validate", "--help"], 0),
        (["show", "--help"], 0),
        (["validate", "run.toml"], 0),
        (["validate", "run.toml", "--override", "training.x=1"], 2),
        (["show", "run.toml"], 0),
    ],
)
def test_nothing_heavy_is_imported(workspace, arguments, code):
    workspace.write_config("verifiable")
    found = subprocess.run(
        [sys.executable, "-c", PROBE.format(heavy=HEAVY), json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(found.stderr.splitlines()[-1]) == [code, []]


@pytest.mark.parametrize("command", ["validate", "show"])
def test_help_ends_with_an_example(command):
    lines = run(command, "--help").stdout.rstrip().splitlines()
    assert f"Example: wmtp-ds {command} stage_configs/critic.toml" in " ".join(line.strip() for line in lines[-2:])


def test_validate_answers_in_well_under_a_second(workspace):
    workspace.write_config("rho1")
    vocabulary = {f"token{index}": index for index in range(32_000)}
    for model in ("policy", "reference"):
        content = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
        workspace.write_json(f"models/{model}/tokenizer.json", content)
    times = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = run("validate", "run.toml", code=2)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "has one of id 31999" in found.stderr
    # Of a processor, since the machine may do something else besides; a processor shares its units, too.
    assert min(times) < 1.5


def test_the_shipped_production_configs_say_what_is_missing(workspace):
    repository = Path(__file__).resolve().parents[2]
    for name in ("stage_configs", "ds_configs"):
        workspace.path(name).symlink_to(repository / name)
    found = run("validate", "stage_configs/critic.toml", code=2)
    assert "models.policy.path  (stage_configs/critic.toml:" in found.stderr
    assert "put the model there: a folder with config.json" in found.stderr
    found = run("validate", "stage_configs/local/verifiable.toml", code=2)
    assert "wmtp-ds model micro" in found.stderr
    assert "wmtp-ds data sample" in found.stderr
    assert "--stage critic --config stage_configs/local/critic.toml" in found.stderr
