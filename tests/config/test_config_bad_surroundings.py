"""DeepSpeed's JSON, data files, the folder to write to, and the environment: further faults that validate finds."""

import gzip
import os

import pytest

from wmtp_ds.run_summary import RUN_SIGNS


def the_problem(workspace, *overrides, stage="baseline", **options):
    workspace.write_config(stage)
    found = workspace.problems(*overrides, **options)
    assert len(found) == 1, [str(problem) for problem in found]
    return found[0]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_stage_must_be_3(workspace, stage):
    workspace.write_json("ds/zero3.json", {"zero_optimization": {"stage": stage}})
    problem = the_problem(workspace)
    assert problem.key == "deepspeed.config"
    assert problem.message.startswith(f"ds/zero3.json:3 has stage {stage}; ")
    assert problem.mend == 'write "stage": 3'


FILES = {
    "misspelt key": (
        '{"zero_optimization": {"stage": 3},\n "wall_clock_breakdwn": true}',
        'ds/zero3.json:2 sets "wall_clock_breakdwn", which DeepSpeed does not know',
        'did you mean "wall_clock_breakdown"?',
    ),
    "unknown key": (
        '{"zero_optimization": {"stage": 3}, "xyz": 1}',
        'ds/zero3.json:1 sets "xyz", which DeepSpeed does not know',
        "remove it",
    ),
    "unknown key of the section": (
        '{"zero_optimization": {"stage": 3, "xyz": 1}}',
        'sets "zero_optimization.xyz", which DeepSpeed does not know',
        "remove it",
    ),
    "the same key twice": (
        '{"zero_optimization": {"stage": 3, "stage": 2}}',
        'ds/zero3.json cannot be used: the key "stage" stands twice in one object',
        "correct it",
    ),
    "NaN": (
        '{"zero_optimization": {"stage": 3,\n "reduce_bucket_size": NaN}}',
        "ds/zero3.json:2 has NaN for zero_optimization.reduce_bucket_size",
        "write a number",
    ),
    "infinity in a list": (
        '{"zero_optimization": {"stage": 3}, "data_types": {"x": [1, -Infinity]}}',
        "ds/zero3.json:1 has -Infinity for data_types.x",
        "write a number",
    ),
    "a number beyond all bounds": (
        '{"zero_optimization": {"stage": 3}, "gradient_predivide_factor": 1e999}',
        "has Infinity for gradient_predivide_factor",
        "write a number",
    ),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("key", "stage"), [("config", "baseline"), ("reference_config", "rho1")])
def test_bad_deepspeed_json(workspace, name, key, stage):
    text, says, mend = FILES[name]
    file = "ds/zero3.json" if key == "config" else "ds/reference.json"
    workspace.write(file, text)
    problem = the_problem(workspace, stage=stage)
    assert problem.key == f"deepspeed.{key}"
    assert says.replace("ds/zero3.json", file) in problem.message
    assert problem.mend.startswith(mend)


def test_a_compressed_data_file_is_one_problem(workspace):
    rows = b"".join(b'{"problem_id": "%d", "random": "%s"}\n' % (i, os.urandom(40).hex().encode()) for i in range(3000))
    workspace.path("data/train.jsonl").write_bytes(gzip.compress(rows))
    problem = the_problem(workspace)
    assert problem.key == "dataset.train"
    assert "data/train.jsonl:1: not UTF-8 text" in problem.message


@pytest.mark.parametrize("key", ["dataset.train", "deepspeed.config"])
def test_pipes_and_devices_are_no_files(workspace, key):
    os.mkfifo("pipe")
    for path in ("pipe", "/dev/zero"):
        problem = the_problem(workspace, f"{key}={path}")
        assert (problem.key, problem.message) == (key, f"{path} is not a regular file")


def _foreign(workspace):
    workspace.write("mine/notes.txt", "keep")


def _loop(workspace):
    workspace.path("loop").symlink_to("loop")


SAVE_DIRS = {
    ".": (lambda w: None, ". holds the current directory"),
    "..": (lambda w: None, ".. holds the current directory"),
    "mine": (_foreign, "mine holds other files, but no run"),
    "mine/notes.txt": (_foreign, "notes.txt is a file"),
    "mine/notes.txt/below": (_foreign, "notes.txt is a file"),
    "loop": (_loop, "loop is a symbolic link that leads nowhere"),
    "loop/a/b": (_loop, "loop is a symbolic link that leads nowhere"),
    "a" * 300: (lambda w: None, "a cannot be a folder: File name too long"),
}


@pytest.mark.parametrize("path", SAVE_DIRS)
def test_folders_that_no_run_may_have(workspace, path):
    prepare, says = SAVE_DIRS[path]
    prepare(workspace)
    problem = the_problem(workspace, f"checkpoint.save_dir={path}")
    assert (problem.key, problem.origin) == ("checkpoint.save_dir", f"--override checkpoint.save_dir={path}")
    assert says in problem.message
    assert problem.mend


@pytest.mark.parametrize("sign", [*RUN_SIGNS, "step_00000004/manifest.json", "", ".hidden"])
def test_folders_of_runs_and_empty_ones_are_taken(workspace, sign):
    workspace.path("out").mkdir()
    if sign:
        workspace.write(f"out/{sign}", "x")
    if not sign.startswith(".h") and sign:
        workspace.write("out/notes.txt", "beside a run")
    workspace.write_config("baseline")
    assert workspace.load("checkpoint.save_dir=out").warnings == []


@pytest.mark.parametrize("stage", ["baseline", "verifiable", "rho1"])
def test_a_scalar_in_a_tables_place_brings_no_other_problems(workspace, stage):
    environ = {"WMTP_TRAINING": "3", "WMTP_TRAINING__LEARNING_RATE": "0.5"}
    problem = the_problem(workspace, "training.batch_size=2", stage=stage, environ=environ)
    assert (problem.key, problem.origin) == ("training", "environment variable WMTP_TRAINING")
    assert problem.message == "must be a table, not 3"
