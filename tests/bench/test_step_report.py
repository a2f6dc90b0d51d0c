"""What a measurement is shown as, and written as."""

import csv
import json

import pytest

from wmtp_ds.bench import report
from wmtp_ds.bench.run import compare
from wmtp_ds.errors import UserError


@pytest.fixture
def figures():
    parts = [("forward", "trunk", 0.25), ("forward", "loss", 0.5), ("backward", "rest", 0.2), ("outside", "data", 0.05)]
    return {
        "stage": "baseline",
        "size": "micro",
        "device": "cpu",
        "ranks": 1,
        "sequence_length": 512,
        "attention": "sdpa",
        "logits": "fused",
        "step_seconds": 2.0,
        "step_seconds_each": [1.5, 2.0, 2.5],
        "instrumented_step_seconds": 2.1,
        "parts": [{"phase": ph, "part": pa, "share": s, "seconds": 2.0 * s} for ph, pa, s in parts],
        "work": {"tokens": 1800, "positions": 2000, "next_targets": 1300},
        "memory": {"at_rest": 3 * 2**30, "peak": 4 * 2**30, "extra": 2**30, "exact": 1.0},
        "tokens_per_second": 900.0,
        "mfu": 0.3,
        "nominal_mfu": 0.4,
        "peak_tflops": 0.2,
        "peak_tflops_origin": "--peak-tflops",
        "dtype": "float32",
        "batch_size": 4,
        "accumulation": 1,
        "gradient_checkpointing": False,
        "parameters": 4_400_000,
        "device_name": "CPU",
        "threads": 2,
        "cores": 2,
        "versions": {"torch": "2"},
    }


def columns(text, start):
    return next(line for line in text.splitlines() if line.startswith(start)).split()


def test_the_table(figures):
    text = report.table(figures)
    assert columns(text, "forward")[1:] == ["1.500", "s", "75.00%"]
    assert columns(text, "  loss (unembedding)")[2:] == ["1.000", "s", "50.00%"]
    assert columns(text, "step  ")[1:3] == ["2.000", "s"]
    assert "65.0% solution, 25.0% prompt, 10.0% padding" in text
    assert "MFU          30.0%" in text
    assert "1.000 GiB extra" in text
    assert "outside forward, backward and optimizer: 5.00% of the step" in text
    assert "a second pass with timers in it (+5.0%)" in text
    assert "all logits in memory" not in text


def test_what_is_not_known_is_not_measured(figures):
    text = report.table(figures | {"mfu": None, "nominal_mfu": None, "peak_tflops": None})
    assert text.count("not measured") == 2
    assert "None" not in text


def test_the_comparison(figures):
    other = figures | {"step_seconds": 5.0, "memory": figures["memory"] | {"extra": 7 * 2**30}}
    ratios = compare(figures, other)
    assert ratios == {"time": 2.5, "memory": 7.0}
    text = report.table(figures | {"materialised": other, "compared": ratios})
    assert "this step is 2.50x as fast and takes 1/7.0 of the extra memory" in text


def test_files(figures, tmp_path):
    folder = tmp_path / "a/b"
    report.make_folder(folder)
    report.write(figures, folder)
    assert json.loads((folder / "step-baseline-micro.json").read_text()) == figures
    with (folder / "step-baseline-micro.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows] == ["trunk", "loss", "rest", "data"]
    assert sum(float(row["seconds"]) for row in rows) == pytest.approx(2.0)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/inner"):
        with pytest.raises(UserError, match=r"--output .*: cannot be made"):
            report.make_folder(folder)


def test_the_comparison_with_scores(figures):
    memory = {"at_rest": 2 * 2**30, "peak": 2.5 * 2**30, "extra": 2**29, "exact": 1.0}
    seconds = {"live_seconds": 2.0, "scores_seconds": 1.5, "live_seconds_each": [2.0] * 7}
    text = report.table(figures | {"scores": seconds | {"memory": memory}})
    assert "with models.reference.scores: 1.500 s a step, and 2.000 s with the reference (75.0%; 7 steps each" in text
    assert "it holds 2.000 GiB instead of 3.000, at the step's peak 2.500 instead of 4.000" in text
