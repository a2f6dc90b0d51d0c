"""``wmtp-ds bench step`` with DeepSpeed's launcher, on the smallest model: all parts of every stage have their time."""

import csv
import json
from pathlib import Path

import pytest
from preloaded import run_preloaded

pytestmark = pytest.mark.launch

TINY = ["--size", "micro", "--device", "cpu", "--sequence-length", "64", "--steps", "2", "--warmup", "2"]


def bench(folder: Path, *arguments: str) -> dict:
    """From a folder in which there is nothing."""
    done = run_preloaded(["wmtp-ds", "bench", "step", *TINY, *arguments, "--json", "--output", "out"], folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # and nothing else is on standard output


@pytest.fixture(scope="module")
def verifiable(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """One rank, two micro-batches a step, compared with materialised logits."""
    folder = tmp_path_factory.mktemp("verifiable")
    typed = ["--batch-size", "2", "--accumulation", "2", "--peak-tflops", "0.05", "--compare-materialised"]
    return bench(folder, "--stage", "verifiable", *typed), folder


@pytest.fixture(scope="module")
def rho1(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Two ranks."""
    folder = tmp_path_factory.mktemp("rho1")
    typed = ["--num_gpus", "2", "--batch-size", "1", "--gradient-checkpointing", "--compare-scores"]
    return bench(folder, "--stage", "rho1", *typed)


def shares(figures: dict) -> dict[tuple[str, str], float]:
    return {(part["phase"], part["part"]): part["share"] for part in figures["parts"]}


def test_the_parts_add_up_to_the_step(verifiable: tuple[dict, Path], rho1: dict) -> None:
    assert "parts" not in verifiable[0]["materialised"]  # where its time goes is not the question
    for figures in (verifiable[0], rho1):
        assert sum(shares(figures).values()) == pytest.approx(1.0)
        assert sum(part["seconds"] for part in figures["parts"]) == pytest.approx(figures["step_seconds"])
        assert all(part["seconds"] > 0 for part in figures["parts"])
        assert len(figures["step_seconds_each"]) == 2
        assert min(figures["step_seconds_each"]) <= figures["step_seconds"] * 1.0001


def test_every_part_of_the_step_is_seen(verifiable: tuple[dict, Path], rho1: dict) -> None:
    forward = {("forward", part) for part in ("trunk", "heads", "loss", "communication", "rest")}
    after = {(phase, part) for phase in ("backward", "optimizer") for part in ("communication", "rest")}
    outside = {("outside", part) for part in ("data", "counts and metrics", "tracking", "rest")}
    assert shares(verifiable[0]).keys() == forward | after | outside | {("forward", "value head")}
    # What a checkpoint computes again counts as backward's, so no trunk is there.
    reference = {("reference", part) for part in ("communication", "rest")}
    assert shares(rho1).keys() == forward | after | outside | reference


def test_rates_follow_from_the_work(verifiable: tuple[dict, Path], rho1: dict) -> None:
    figures = verifiable[0]
    work, seconds = figures["work"], figures["step_seconds"]
    assert work["positions"] == 2 * 2 * 64
    assert work["learned"] == work["targets"]
    assert figures["tokens_per_second"] == pytest.approx(work["tokens"] / seconds)
    total = figures["operations"]["needed"]["total"]
    assert figures["mfu"] == pytest.approx(total / seconds / 0.05e12)
    assert figures["nominal_mfu"] > figures["mfu"]
    assert figures["operations"]["needed"]["value_head"] == 6 * work["tokens"] * (64 * 64 + 64)
    assert rho1["work"]["positions"] <= 2 * 64  # of both ranks
    assert rho1["work"]["learned"] / rho1["work"]["targets"] == pytest.approx(0.6, abs=0.03)
    assert rho1["peak_tflops"] > 0
    assert rho1["peak_tflops_origin"].startswith("measured")


def test_the_kernels_are_leaner(verifiable: tuple[dict, Path]) -> None:
    """Which of the two is faster is for a machine that does nothing else to say."""
    figures = verifiable[0]
    logits = 4 * 2 * 64 * 32_000 * 4  # heads, sequences, positions, vocabulary, bytes
    assert figures["materialised"]["memory"]["extra"] > logits
    assert figures["compared"]["memory"] > 1.2
    assert figures["memory"]["exact"] == 1.0
    assert figures["materialised"]["logits"] == "materialised"


def test_files_are_written(verifiable: tuple[dict, Path]) -> None:
    figures, folder = verifiable
    assert json.loads((folder / "out/step-verifiable-micro.json").read_text()) == figures
    with (folder / "out/step-verifiable-micro.csv").open() as file:
        assert sum(float(row["share"]) for row in csv.DictReader(file)) == pytest.approx(1.0, abs=1e-4)
    assert [path.name for path in folder.iterdir()] == ["out"]  # nothing else is left behind


def test_steps_with_scores_are_taken_in_turn_with_live_ones(rho1: dict) -> None:
    found = rho1["scores"]
    assert len(found["live_seconds_each"]) == len(found["scores_seconds_each"]) == 2
    for arm in ("live", "scores"):
        assert found[f"{arm}_seconds"] >= min(found[f"{arm}_seconds_each"]) > 0
    assert found["memory"].keys() == rho1["memory"].keys()  # of processes of its own
    assert found["memory"]["peak"] >= found["memory"]["at_rest"] > 0
