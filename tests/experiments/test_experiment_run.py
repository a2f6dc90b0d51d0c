"""An experiment from beginning to end, at the smallest size, and what a second call does again."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import run
from conftest import REPOSITORY
from ranks import fork
from sizes import SMALL

pytestmark = pytest.mark.launch

TINY = dataclasses.replace(
    SMALL, hidden_size=64, trunk_layers=1, heads=2, problems=44, base_steps=2, steps=2, critic_steps=2
)


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
    for name, stage in (("base-0", "baseline"), ("critic-return-0", "critic"), ("TD-0.9-0", "verifiable")):
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


def test_a_run_that_fails_says_why(here: Path) -> None:
    import corpora
    from placement import base_run
    from runs import do

    file = here / "rows.jsonl"
    corpora.write_rows(file, [{"problem_id": "1", "instruction": "i", "output": "o", "is_correct": True}] * 4)
    spoilt = base_run(TINY, corpora.Files(file, file), 0)
    spoilt.settings["training.batch_size"] = "many"
    with pytest.raises(SystemExit, match=r"(?s)base-0 ended with exit code 2.*batch_size.*wmtp-ds train"):
        do([spoilt], 1)
