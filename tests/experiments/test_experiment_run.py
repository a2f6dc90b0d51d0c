"""An experiment from beginning to end, at the smallest size, and what a second call does again."""

import dataclasses
import json
import os
from pathlib import Path

import corpora
import corruption
import numpy as np
import pytest
import run
from conftest import REPOSITORY
from ranks import fork
from sizes import SMALL

from wmtp_ds.models.loading import load_tokenizer
from wmtp_ds.scores.manifest import read_manifest
from wmtp_ds.scores.reader import ReferenceScores

pytestmark = pytest.mark.launch

TINY = dataclasses.replace(
    SMALL, hidden_size=64, trunk_layers=1, heads=2, problems=44, base_steps=2, steps=2, critic_steps=2, corpus_steps=2,
    reference_steps=2,
)  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("experiments", "stage_configs", "ds_configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    fork(os.getpid).join()  # one server forks for all tests of a process: the one that has imported everything
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "README", tmp_path / "README.md")
    run.README.write_text("Before\n<!-- rerun_cost -->\nold\n<!-- end -->\nAfter\n<!-- heads -->\n<!-- end -->\n")
    return tmp_path


def test_a_study_is_done_once_and_goes_on(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run.conduct("rerun_cost", TINY, [0], workers=2)
    results = json.loads((here / "results/rerun_cost/results.json").read_text())
    figures = results["figures"]
    assert results["seeds"] == [0]
    assert {len(values) for values in figures.values()} == {1}
    runs = here / TINY.folder / "runs"
    for name, stage in (("base-0", "baseline"), ("critic-return-0.95-0", "critic"), ("TD-0.9-0", "verifiable")):
        summary = json.loads((runs / name / "run.json").read_text())
        assert (summary["stage"], summary["steps"], summary["world_size"]) == (stage, 2, 1)
    share = figures["verifiable"][0] / (figures["verifiable"][0] + figures["critic"][0])
    table = (here / "results/rerun_cost/table.md").read_text()
    assert f"| verifiable with a ready critic | 2 | {figures['verifiable'][0]:.1f} | {share:.3f} |" in table
    assert (here / "results/rerun_cost/figure.png").read_bytes().startswith(b"\x89PNG")
    readme = run.README.read_text()
    assert readme.startswith(f"Before\n<!-- rerun_cost -->\n{table}\nSeeds 0 to 0; CPU, ")
    assert readme.endswith("results/rerun_cost/figure.png)\n<!-- end -->\nAfter\n<!-- heads -->\n<!-- end -->\n")
    said = capfd.readouterr().out
    assert "3 of 3: TD-0.9-0" in said
    # The handoff: the critic's trunk is the base model, and the verifiable run has its value head.
    assert f"--override models.policy.path={TINY.folder}/runs/base-0/checkpoint_final" in results["commands"]["critic"]
    assert "experiment.critic_checkpoint=" in results["commands"]["verifiable"]

    (runs / "TD-0.9-0" / "experiment.key").unlink()
    before = (runs / "base-0" / "run.json").stat().st_mtime_ns
    run.conduct("rerun_cost", TINY, [0], workers=1)
    assert (runs / "base-0" / "run.json").stat().st_mtime_ns == before
    assert json.loads((runs / "TD-0.9-0" / "run.json").read_text())["completed"]
    assert "base-0, " not in capfd.readouterr().out

    # Another study takes up the runs that they share.
    run.conduct("critic_quality", TINY, [0], workers=2)
    said = capfd.readouterr().out
    assert ("critic-gae-0.95-0, " in said, "critic-return-0.95-0, " in said) == (True, False)
    held_out = [json.loads(line) for line in corpora.problems(TINY).validation.read_text().splitlines()]
    figures = json.loads((here / "results/critic_quality/results.json").read_text())["figures"]
    for own in figures.values():
        assert own["solutions"] == [len(held_out)]
        assert sum(count for count, _, _ in own["reliability"][0]) == len(held_out)
        share = sum(count * right for count, _, right in own["reliability"][0]) / len(held_out)
        assert share == pytest.approx(sum(row["is_correct"] for row in held_out) / len(held_out))


def test_a_run_that_fails_says_why(here: Path) -> None:
    from placement import base_run
    from runs import do

    file = here / "rows.jsonl"
    corpora.write_rows(file, [{"problem_id": "1", "instruction": "i", "output": "o", "is_correct": True}] * 4)
    spoilt = base_run(TINY, corpora.Files(file, file), 0)
    spoilt.settings["training.batch_size"] = "many"
    with pytest.raises(SystemExit, match=r"(?s)base-0 ended with exit code 2.*batch_size.*wmtp-ds train"):
        do([spoilt], 1)


def test_tokens_are_selected_by_lot(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them: the baseline. Known intact ones: nothing that was put in, while there is enough else."""
    share = corruption.SWEPT
    arms = ((share, "baseline", 1.0), (share, "random", 1.0), (share, "intact", 0.6))
    monkeypatch.setattr(corruption, "ARMS", arms)
    run.conduct("corruption", TINY, [3], workers=2)
    figures = json.loads((here / "results/corruption/results.json").read_text())["figures"]
    for (steps, losses), (baseline_steps, baseline) in zip(
        figures["30 %, random k=1.0"]["curves"], figures["30 %, baseline"]["curves"], strict=True
    ):
        assert steps == baseline_steps == [1, 2]
        assert losses == pytest.approx(baseline, abs=1e-5)  # sums in another order
    assert figures["30 %, intact k=0.6"]["loss"] != figures["30 %, baseline"]["loss"]

    size = here / TINY.folder
    [made] = (size / "data/problems").glob("half-1-right-corrupted-30.jsonl")
    scores = size / "scores" / f"{made.stem}-reference-3-intact-3"
    manifest = read_manifest(scores)
    numbers = ReferenceScores(scores, manifest, manifest.inputs[0])
    tokenizer = load_tokenizer(size / "runs/reference-3/checkpoint_final")
    kept = 0
    for place, row in enumerate(map(json.loads, made.read_text().splitlines())):
        prompt = tokenizer(f"{row['instruction']}\n\n").input_ids
        found = tokenizer(row["output"], return_offsets_mapping=True)
        ids = [tokenizer.bos_token_id, *prompt, *found.input_ids, tokenizer.eos_token_id]
        values = numbers(place, np.array(ids), len(found.input_ids) + 1)
        for value, (begin, end) in zip(values[:-1], found.offset_mapping, strict=True):
            touched = any(a < end and begin < b for a, b in row["metadata"]["spoilt"])
            assert (value < 1) == touched
            kept += not touched
        assert values[-1] >= 1
    assert kept > 100
