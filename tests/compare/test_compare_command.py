"""`wmtp-ds compare` on folders: what is different, what is better, and what cannot be compared."""

import hashlib
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from wmtp_ds.checkpoint_files import write_manifest
from wmtp_ds.config import load_config
from wmtp_ds.errors import UserError
from wmtp_ds.evaluate.files import read_finished
from wmtp_ds.tracking_state import MetricLine, encode_line

Make = Callable[..., Path]
Call = Callable[..., tuple[int, Any, str]]
Curve = Callable[..., dict[int, dict[str, float]]]


def told(compare: Call, *arguments: object, code: int = 0) -> dict[str, Any]:
    found, out, err = compare(*arguments, "--json")
    assert found == code, err
    assert isinstance(out, dict), err
    return out


def test_config_metrics_and_curves(make_run: Make, compare: Call, curve: Curve, here: Path) -> None:
    first = make_run("one", metrics=curve(2.0))
    second = make_run("two", "training.learning_rate=7e-4", "runtime.seed=5", metrics=curve(1.5, steps=8))
    found = told(compare, first, second, "--output", "out")
    flat = [load_config(run / "config.toml", environ={}, checks=False).flat() for run in (first, second)]
    keys = {key for values in flat for key in values}
    assert set(found["config_differences"]) == {key for key in keys if flat[0].get(key) != flat[1].get(key)}
    assert found["config_differences"]["training.learning_rate"] == {
        "one": json.dumps(flat[0]["training.learning_rate"]),
        "two": "0.0007",
    }
    assert found["config_differences"]["experiment.name"] == {"one": "one", "two": "two"}
    for run in (first, second):  # as they stand in the file
        for metric in ("val/loss", "train/loss"):
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            expected = [[line["step"], line["metrics"][metric]] for line in lines if metric in line["metrics"]]
            assert found["curves"][metric][run.name] == expected
    facts = found["runs"]["two"]
    assert (facts["steps"], facts["tokens"], facts["seconds"], facts["ranks"]) == (8, 800.0, 4.0, 2)
    batch = int(flat[0]["training.batch_size"]) * int(flat[0]["training.gradient_accumulation_steps"])
    assert facts["sequences_per_step"] == 2 * batch
    ends = found["metrics"]["val/loss"]["one"]
    assert (ends["final"], ends["final_step"], ends["lowest"], ends["lowest_step"]) == (
        pytest.approx(1.0),
        6,
        pytest.approx(1.0),
        6,
    )
    assert json.loads(Path("out/compare.json").read_text()) == found
    png = Path("out/curves.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">II", png[16:24])[0] > 1000, "two panels beside each other"
    assert "| training.learning_rate" in Path("out/compare.md").read_text()
    assert found["errors"] == []


def test_the_best_value_is_not_the_last(make_run: Make, compare: Call) -> None:
    values = {2: 3.0, 4: 1.0, 6: math.nan, 8: 2.0, 10: math.inf}
    metrics = {step: {"val/loss": value, "val/auc": 1 / value} for step, value in values.items()}
    found = told(compare, make_run("one", metrics=metrics), make_run("two"))
    ends = found["metrics"]["val/loss"]["one"]
    assert (ends["lowest"], ends["lowest_step"], ends["final"], ends["final_step"]) == (1.0, 4, "inf", 10)
    assert found["metrics"]["val/auc"]["one"]["highest_step"] == 4
    assert found["curves"]["val/loss"]["one"] == [[2, 3.0], [4, 1.0], [6, "nan"], [8, 2.0], [10, "inf"]]
    code, out, _ = compare("checkpoints/one", "checkpoints/two")
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("| val/loss, lowest"))
    assert "1.0000 (step 4)" in row


def test_steps_that_were_taken_twice_count_once(make_run: Make, compare: Call) -> None:
    run = make_run("one")
    lines = [
        MetricLine(1, 1000, {"train/loss": 5.0}),
        MetricLine(2, 2000, {"train/loss": 9.0}),
        MetricLine(3, 3000, {"train/loss": 99.0}),
        MetricLine(1, 4000, {}, attempt=2),
        MetricLine(2, 5000, {"train/loss": 4.0}, attempt=2),
    ]
    (run / "metrics.jsonl").write_bytes(b"".join(map(encode_line, lines)))
    found = told(compare, run, make_run("two"))
    assert found["curves"]["train/loss"]["one"] == [[1, 5.0], [2, 4.0]]
    assert found["runs"]["one"]["steps"] == 2


def test_pass_at_k_is_paired_by_problem(make_run: Make, make_evaluation: Make, compare: Call, here: Path) -> None:
    rng = random.Random(2)
    counts = {name: {f"p{i}": (4, rng.randint(0, 3)) for i in range(60)} for name in ("one", "two")}
    counts["two"] = {name: (4, min(4, c + (rng.random() < 0.5))) for name, (_, c) in counts["one"].items()}
    shuffled = dict(sorted(counts["two"].items(), key=lambda item: item[0][::-1]))
    runs = {name: make_run(name) for name in counts}
    make_evaluation(here / "evaluations/a", runs["one"] / "checkpoint_best", counts["one"], ks=(1, 4))
    make_evaluation(runs["two"] / "mine", runs["two"] / "checkpoint_best", shuffled, ks=(1, 2, 4))
    found = told(compare, *runs.values())
    assert [record["k"] for record in found["pass_at_k"]] == [1, 4]
    record = found["pass_at_k"][0]
    differences = [counts["two"][name][1] / 4 - counts["one"][name][1] / 4 for name in counts["one"]]
    mean = sum(differences) / 60
    assert record["difference"] == pytest.approx(mean)
    assert record["first_pass"] == pytest.approx(sum(c for _, c in counts["one"].values()) / 240)
    means = sorted(sum(rng.choices(differences, k=60)) / 60 for _ in range(4000))
    assert record["interval"] == pytest.approx([means[100], means[3900]], abs=0.006)
    low, high = record["first_interval"]
    assert record["interval"][1] - record["interval"][0] < 0.7 * (high - low), "pairs tell more than two means"
    assert (record["better"], record["worse"]) == (sum(d > 0 for d in differences), 0)
    any_of_four = sum(min(1, counts["two"][n][1]) - min(1, counts["one"][n][1]) for n in counts["one"]) / 60
    assert found["pass_at_k"][1]["difference"] == pytest.approx(any_of_four)


def test_seeds_of_an_arm_are_one_group(make_run: Make, make_evaluation: Make, compare: Call, curve: Curve) -> None:
    runs = {}
    for arm, better in (("base", 0), ("new", 1)):
        for seed in (1, 2, 3):
            run = make_run(f"{arm}-{seed}", f"runtime.seed={seed}", metrics=curve(2.0 + seed / 10 - better))
            counts = {f"p{i}": (1, int((i + seed) % 4 == 0 or (better and i % 2 == 0))) for i in range(40)}
            make_evaluation(run / "evaluation", run / "checkpoint_best", counts)
            runs[f"{arm}-{seed}"] = counts
    groups = [f"--group={arm}={','.join(f'checkpoints/{arm}-{seed}' for seed in (1, 2, 3))}" for arm in ("base", "new")]
    found = told(compare, *groups)
    assert found["arms"] == {arm: [f"{arm}-{seed}" for seed in (1, 2, 3)] for arm in ("base", "new")}
    assert found["config_differences"]["runtime.seed"] == {"base": "1, 2, 3", "new": "1, 2, 3"}
    [record] = found["pass_at_k"]
    means = {arm: sum(c for s in (1, 2, 3) for _, c in runs[f"{arm}-{s}"].values()) / 120 for arm in ("base", "new")}
    assert record["difference"] == pytest.approx(means["new"] - means["base"])
    assert (record["first_runs"], record["second_runs"]) == (3, 3)
    assert 0 < record["interval"][0] < record["difference"] < record["interval"][1]
    code, out, _ = compare(*groups)
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("| val/loss, last"))
    assert "1.1000 ± 0.0500" in row
    assert "0.6000 ± 0.0500" in row


def test_what_is_drawn(make_run: Make, compare: Call, curve: Curve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each arm's points, in a panel for each metric that two of them have; all arms are named."""
    drawn: list[dict[str, Any]] = []
    names: list[str] = []

    def look(figure: Figure, *_: object, **__: object) -> None:
        for axis in figure.axes:
            lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axis.lines}
            drawn.append({"title": axis.get_title(), **lines})
        names.extend(text.get_text() for text in figure.legends[0].get_texts())

    monkeypatch.setattr(Figure, "tight_layout", look)
    third = {step: {"train/loss": 1.0, "mine": 2.0} for step in (1, 2)}
    runs = [make_run("one"), make_run("two", metrics=curve(1.0)), make_run("three", metrics=third)]
    found = told(compare, *runs)
    assert [panel["title"] for panel in drawn] == ["val/loss", "train/loss"]
    for panel in drawn:
        points = {run: [tuple(point) for point in values] for run, values in found["curves"][panel["title"]].items()}
        assert panel == {"title": panel["title"]} | points
    assert set(drawn[0]) == {"title", "one", "two"}
    assert names == ["one", "two", "three"]


@pytest.mark.parametrize("kind", ["checkpoint", "best"])
def test_a_checkpoint_is_the_run_up_to_it(make_run: Make, compare: Call, kind: str) -> None:
    run = make_run("one")
    part = run / "checkpoint_best"
    if kind == "checkpoint":
        part = run / "step_00000004"
        part.mkdir()
        shutil.copy(run / "config.toml", part)
        write_manifest(part, step=4, world_size=2, global_batch=8)
    found = told(compare, run, part)
    name = f"one/{part.name}"
    assert found["runs"][name]["steps"] == 4
    assert found["runs"][name]["tokens"] == 400.0
    assert [step for step, _ in found["curves"]["train/loss"][name]] == [1, 2, 3, 4]
    assert found["config_differences"] == {}


@pytest.fixture
def checkpoint(make_run: Make) -> Path:
    """A checkpoint, whole, of a run."""
    folder = make_run("one") / "step_00000004"
    folder.mkdir()
    shutil.copy(folder.parent / "config.toml", folder)
    write_manifest(folder, step=4, world_size=2, global_batch=8)
    return folder


def test_a_checkpoints_evaluations_are_those_of_its_export(
    checkpoint: Path, make_run: Make, make_evaluation: Make, compare: Call, here: Path
) -> None:
    other = make_run("two")
    make_evaluation(other / "e", other / "checkpoint_best", {"p": (1, 0)})
    found = told(compare, other, checkpoint)
    advice = "one/step_00000004: has no evaluation: wmtp-ds evaluate"
    assert f"{advice} {checkpoint} --problems …" in found["warnings"]
    export = checkpoint.with_name("exported_step_00000004")
    export.mkdir()
    (export / "config.json").write_text("{}")
    made_from = {"step": 4, "manifest": hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()}
    (export / "metrics.json").write_text(json.dumps(made_from))
    inside = make_evaluation(checkpoint.parent / "evaluated", export, {"p": (1, 1)})
    below = make_evaluation(here / "evaluations/x", export, {"q": (1, 1)}, problems="humaneval")
    found = told(compare, other, checkpoint)
    assert sorted(found["runs"]["one/step_00000004"]["evaluations"]) == sorted(
        [str(inside), str(below.relative_to(here))]
    )
    assert found["pass_at_k"][0]["difference"] == 1.0
    # The step was taken again.
    write_manifest(checkpoint, step=4, world_size=4, global_batch=8)
    found = told(compare, other, checkpoint)
    assert found["pass_at_k"] == []
    assert f"{advice} {checkpoint} --problems …" in found["warnings"]


def test_an_export_that_was_copied_elsewhere(make_run: Make, compare: Call, here: Path) -> None:
    shutil.copytree(make_run("one") / "checkpoint_best", here / "elsewhere")
    found = told(compare, "elsewhere", make_run("two"))
    assert found["metrics"]["val/loss"]["elsewhere"]["final"] == 1.0
    assert any("elsewhere: an export without its run's metrics.jsonl" in text for text in found["warnings"])


def test_an_evaluation_stands_for_its_run(make_run: Make, make_evaluation: Make, compare: Call, here: Path) -> None:
    run = make_run("one")
    counts = {"p": (1, 1), "q": (1, 0)}
    theirs = make_evaluation(here / "theirs", here / "storage/models/micro-policy", {"p": (1, 0), "q": (1, 0)})
    for name in ("x", "y"):
        make_evaluation(here / f"evaluations/{name}", run / "checkpoint_best", counts, temperature=name)
    found = told(compare, theirs, "evaluations/x")
    assert found["arms"] == {"theirs": ["theirs"], "one/checkpoint_best": ["one/checkpoint_best"]}
    assert found["pass_at_k"][0]["difference"] == 0.5
    assert found["runs"]["one/checkpoint_best"]["evaluations"] == ["evaluations/x"]
    assert any("theirs: an evaluation alone" in text for text in found["warnings"])
    assert any("different options: temperature" in text for text in found["warnings"])
    assert told(compare, "evaluations/x", "evaluations/y")["pass_at_k"][0]["difference"] == 0.0


def test_an_evaluation_of_what_its_folder_no_longer_holds_stands_alone(
    make_run: Make, make_evaluation: Make, compare: Call, here: Path
) -> None:
    for name, correct in (("one", 0), ("two", 1)):
        make_evaluation(here / f"evaluations/{name}", make_run(name) / "checkpoint_best", {"p": (1, correct)})
    best = here / "checkpoints/one/checkpoint_best"
    (best / "config.json").write_text('{"trained": "again"}')
    found = told(compare, "evaluations/one", "evaluations/two")
    assert found["pass_at_k"][0]["difference"] == 1.0
    assert f"one: an evaluation alone: {best} holds another model since" in found["warnings"]
    assert found["runs"]["one"]["steps"] is None
    assert list(found["curves"]["val/loss"]) == ["two/checkpoint_best"]


def test_the_options_that_the_other_arm_shares_count_not_those_that_were_drawn_often(
    make_run: Make, make_evaluation: Make, compare: Call
) -> None:
    one, two = make_run("one"), make_run("two")
    for name, t in (("a", 0.2), ("b", 0.8), ("c", 0.8)):  # the last is the newest
        make_evaluation(one / name, one / "checkpoint_best", {"p": (1, int(t == 0.2))}, t=t)
    make_evaluation(two / "a", two / "checkpoint_best", {"p": (1, 0)}, t=0.2)
    for number, name in enumerate("abc"):
        os.utime(one / name / "summary.json", ns=(number, number))
    found = told(compare, one, two)
    assert found["pass_at_k"][0]["evaluations"] == [[str(one / "a")], [str(two / "a")]]
    assert found["pass_at_k"][0]["difference"] == -1.0
    assert found["warnings"] == []


# --- what is doubtful, and what is wrong ---


def test_runs_without_an_evaluation_say_so_and_the_rest_goes_on(make_run: Make, compare: Call) -> None:
    code, out, _ = compare(make_run("one"), make_run("two"))
    assert code == 0
    assert "warning: one: has no evaluation: wmtp-ds evaluate" in out
    assert "Nothing to compare." in out
    assert Path("comparisons/one-vs-two/curves.png").exists()


def test_other_training_data_are_warned_of(make_run: Make, compare: Call) -> None:
    found = told(compare, make_run("one"), make_run("two", tags={"dataset_fingerprint": "cccc"}))
    [warning] = [text for text in found["warnings"] if "has no evaluation" not in text]
    assert warning.startswith("different training data (one: ")
    assert "val/loss" in found["curves"]
    assert found["runs"]["one"]["training_data"] == "aaaa"


def test_losses_on_other_validation_data_are_left_out(make_run: Make, compare: Call) -> None:
    found = told(compare, make_run("one"), make_run("two", tags={"validation_fingerprint": "cccc"}))
    assert any("different validation data" in text and "left out" in text for text in found["warnings"])
    assert "val/loss" not in found["curves"]
    assert "train/loss" in found["curves"]


def test_losses_of_other_stages_are_left_out(make_run: Make, compare: Call, curve: Curve) -> None:
    critic = {step: values | {"val/value_loss": 0.2, "val/loss": 0.2} for step, values in curve(1.0).items()}
    runs = make_run("one"), make_run("two", stage="verifiable"), make_run("three", stage="critic", metrics=critic)
    found = told(compare, *runs)
    assert any("different stages (baseline, critic, verifiable)" in text for text in found["warnings"])
    assert "train/loss" not in found["curves"]
    assert set(found["curves"]["val/loss"]) == {"one", "two"}, "a critic's is its value loss"


def test_pass_at_k_on_different_problems_is_an_error_of_that_part(
    make_run: Make, make_evaluation: Make, compare: Call
) -> None:
    one, two, three = (make_run(name) for name in ("one", "two", "three"))
    make_evaluation(one / "e", one / "checkpoint_best", {"p": (1, 1), "q": (1, 1)})
    make_evaluation(two / "e", two / "checkpoint_best", {"p": (1, 0), "r": (1, 1), "s": (1, 1)})
    make_evaluation(three / "e", three / "checkpoint_best", {"p": (1, 0), "q": (1, 1)}, key="other tests")
    code, out, err = compare(one, two, three, "--json", "--output", "out")
    assert code == 2
    assert "error: pass@k of one and two on mbpp: different problems" in err
    assert "lacks 1 of those" in err
    assert "has 2 others" in err
    assert "pass@k of one and three on mbpp: different problems" in err
    assert "other texts or tests" in err
    assert out["pass_at_k"] == []
    assert "val/loss" in json.loads(Path("out/compare.json").read_text())["curves"]
    assert "error: pass@k of one and two" in Path("out/compare.md").read_text()


def test_other_sets_of_problems(make_run: Make, make_evaluation: Make, compare: Call) -> None:
    one, two = make_run("one"), make_run("two")
    make_evaluation(one / "e", one / "checkpoint_best", {"p": (1, 1)})
    make_evaluation(two / "e", two / "checkpoint_best", {"p": (1, 1)}, problems="humaneval")
    code, _, err = compare(one, two)
    assert code == 2
    assert "evaluated on different problems (one: mbpp; two: humaneval)" in err


def test_an_evaluation_of_other_weights_does_not_count(make_run: Make, make_evaluation: Make, compare: Call) -> None:
    one, two = make_run("one"), make_run("two")
    for run in (one, two):
        make_evaluation(run / "e", run / "checkpoint_best", {"p": (1, 1)})
    (one / "checkpoint_best/config.json").write_text('{"trained": "again"}')
    found = told(compare, one, two)
    assert found["pass_at_k"] == []
    assert any("checkpoint_best holds another model since" in text for text in found["warnings"]), found["warnings"]


def test_a_damaged_evaluation_is_left_out(make_run: Make, make_evaluation: Make, compare: Call) -> None:
    one, two = make_run("one"), make_run("two")
    for run in (one, two):
        make_evaluation(run / "e", run / "checkpoint_best", {"p": (1, 1)})
    (one / "e/results.jsonl").write_text("{")
    found = told(compare, one, two)
    assert found["pass_at_k"] == []
    assert any("one: an evaluation is left out: " in text and "is damaged" in text for text in found["warnings"])


@pytest.mark.parametrize(
    "damage",
    [
        '{"problem_id": "p", "n": 1, "correct": 3}',
        '{"problem_id": "p"}',
        "",
        "[]",
        '{"problem_id": "p", "n": -1, "correct": -1}',
    ],
)
def test_results_that_make_no_sense(make_evaluation: Make, here: Path, damage: str) -> None:
    folder = make_evaluation(here / "e", here / "storage/models/micro-policy", {"p": (1, 1)})
    assert read_finished(folder).counts == {"p": (1, 1)}
    (folder / "results.jsonl").write_text(damage + "\n")
    with pytest.raises(UserError, match=r"results\.jsonl is damaged"):
        read_finished(folder)


def test_a_run_that_goes_on(make_run: Make, compare: Call) -> None:
    one, two = make_run("one"), make_run("two")
    (one / "run.json").unlink()
    found = told(compare, one, two)
    assert "one: has not come to its end: 6 steps so far" in found["warnings"]
    assert found["runs"]["one"]["completed"] is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("one",), "at least two runs"),
        ((), "at least two runs"),
        (("one", "./one"), "the same run twice"),
        (("one", "one/../one"), "the same run twice"),
        (("one", "--group=x=one,two"), "the same run twice"),
        (("one", "--group=one=two"), "two arms are called one"),
        (("one", "--group=two"), "write NAME=RUN,RUN"),
        (("one", "--group=x=two,"), "write NAME=RUN,RUN"),
        (("one", "nowhere"), "nowhere is neither a folder here nor the id of an MLflow run"),
        (("one", "one/config.toml"), "one/config.toml is a file"),
        (("one", "empty"), "empty holds no run"),
        (("one", "0" * 32), "there is no MLflow database at"),
        (("one", "0" * 32, "--output", "new/folder"), "there is no MLflow database at"),
        (("one", "./one", "--output", "new/folder"), "the same run twice"),
        (("one", "two/step_00000002"), "two/step_00000002 is half-written"),
        (("one", "two/.partial-step_00000004"), "is half-written"),
        (("one", "two/.partial-checkpoint_best"), "is half-written"),
        (("one", "two/checkpoint_final"), "two/checkpoint_final is half-written: metrics.json"),
        (("one", "two/step_00000006"), "is no whole checkpoint: config.toml"),
        (("one", "damaged"), "damaged/config.toml is damaged"),
        (("one", "two", "--output", "full"), "full: holds other files, and no comparison"),
        (("one", "two", "--output", "one/config.toml"), "--output one/config.toml: cannot be made"),
    ],
)
def test_what_cannot_be_compared(
    make_run: Make, compare: Call, here: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    one, two = make_run("one"), make_run("two", export=False)
    monkeypatch.chdir(one.parent)
    for name in ("empty", "full", "damaged"):
        Path(name).mkdir()
    Path("full/mine.txt").touch()
    Path("damaged/config.toml").write_text("[")
    for name in ("step_00000002", ".partial-step_00000004", ".partial-checkpoint_best", "checkpoint_final"):
        (two / name).mkdir()
    whole = two / "step_00000006"
    whole.mkdir()
    shutil.copy(two / "config.toml", whole)
    write_manifest(whole, step=6, world_size=2, global_batch=8)
    (whole / "config.toml").write_text("")
    before = sorted(here.rglob("*"))
    code, _, err = compare(*arguments)
    assert code == 2
    assert said in " ".join(err.split())
    assert sorted(here.rglob("*")) == before, "nothing is made"


def test_it_needs_no_torch(make_run: Make, here: Path) -> None:
    make_run("one")
    make_run("two")
    code = (
        "import sys; from wmtp_ds.cli.main import main\n"
        "try: main(['compare', 'checkpoints/one', 'checkpoints/two'])\n"
        "except SystemExit as left: assert not left.code\n"
        "assert not {'torch', 'transformers', 'mlflow', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
