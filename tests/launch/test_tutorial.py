"""The tutorial and the pages about stages, tried out: the commands, the metrics that are logged, the example.

The tutorial's commands are those of README.md and of ``make demo``, which test_readme.py types into a shell; the others
are run here, in this process, on runs of two steps each that one forked rank has trained.
"""

import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY
from doc_pages import DOCS, fenced, tables
from in_process import Done, command
from test_launch_parity import start
from test_readme import readme_commands

pytestmark = pytest.mark.launch

STAGES = ("baseline", "critic", "verifiable", "rho1")
SHORT = [
    "training.max_steps=2",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=1",
    "training.eval_interval=2",
    "training.log_interval=1",
    "data_sampling.n_samples=16",
    "checkpoint.save_checkpoint_every=0",
    'mlflow.tracking_uri=""',
]


def tutorial() -> list[str]:
    """The tutorial's commands in their order."""
    blocks = fenced(DOCS / "tutorial.md", "bash")
    return [line for block in blocks for line in block.splitlines()]


def starting(*words: str) -> list[str]:
    return [line for line in tutorial() if line.startswith(words)]


def write_rows(file: Path, problems: int) -> None:
    """A correct and an incorrect solution of each problem, with its tests."""
    rows = [
        {
            "problem_id": f"{file.stem}-{number}",
            "instruction": f"Write a function f(x) that adds {number} to x.",
            "output": f"def f(x):\n    return x {sign} {number}\n",
            "is_correct": sign == "+",
            "difficulty": number % 11 + 1,
            "metadata": {"tests": [f"assert f(1) == {number + 1}"]},
        }
        for number in range(1, problems + 1)
        for sign in "+-"
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def untrained(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout after the tutorial's second section, with small models and little data."""
    root = tmp_path_factory.mktemp("tutorial")
    for name in ("stage_configs", "ds_configs", "bin"):
        (root / name).symlink_to(REPOSITORY / name)
    write_rows(root / "storage/data/sample/train.jsonl", 16)
    write_rows(root / "storage/data/sample/validation.jsonl", 3)
    (root / "storage/models").symlink_to(checkout / "storage/models")
    return root


@pytest.fixture(scope="module")
def said(untrained: Path) -> dict[str, Done]:
    """What the tutorial's inspections say before anything is trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(untrained)
        lines = [*starting("wmtp-ds validate", "wmtp-ds show"), "wmtp-ds validate stage_configs/local/verifiable.toml"]
        return {line: command(*shlex.split(line)[1:], seconds=60) for line in lines}


@pytest.fixture(scope="module")
def trained(untrained: Path, said: dict[str, Done]) -> Path:
    """The stages, and what the tutorial trains at last, by its own command's stage, config and overrides."""
    from wmtp_ds.cli.train import train

    jobs = [{"stage": stage, "config": f"stage_configs/local/{stage}.toml", "override": SHORT} for stage in STAGES]
    [line] = starting("wmtp-ds train")
    typed = train.make_context("train", shlex.split(line)[2:]).params
    handed_over = f"experiment.critic_checkpoint={typed['critic_checkpoint']}"
    last = {"stage": typed["stage"], "config": str(typed["config"])}
    jobs.append(last | {"override": [*SHORT, handed_over, *typed["override"]]})
    start(untrained, jobs, 1)
    return untrained


@pytest.fixture(scope="module")
def looked(trained: Path) -> dict[str, Done]:
    """What came of the commands that look at the runs and evaluate them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        lines = starting("wmtp-ds weights", "wmtp-ds evaluate", "wmtp-ds compare")
        return {line: command(*shlex.split(line)[1:], seconds=300) for line in lines}


def typed_by_the_demo(patch: pytest.MonkeyPatch, empty: Path) -> list[str]:
    """The commands that ``make demo`` runs in a fresh checkout."""
    typed: list[str] = []
    patch.syspath_prepend(REPOSITORY / "experiments")
    spec = importlib.util.spec_from_file_location("demo", REPOSITORY / "experiments/demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    patch.setattr(demo, "run", typed.append)
    patch.chdir(empty)
    patch.setattr(demo.os, "chdir", lambda _: None)
    patch.setattr("sys.argv", ["demo.py"])
    demo.main()
    return typed


# --- the tutorial ---


def test_every_command_of_the_tutorial_is_run_by_a_test(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: dict[str, Done], looked: dict[str, Done]
) -> None:
    demo = typed_by_the_demo(monkeypatch, tmp_path)
    elsewhere = {*readme_commands(), *demo}
    assert "make demo" in elsewhere
    assert "experiments/demo.py" in (REPOSITORY / "Makefile").read_text()
    left = [line for line in tutorial() if line not in elsewhere | looked.keys() | said.keys()]
    assert left == ["make install"]  # of which `make demo` is made
    dry = subprocess.run(["make", "--dry-run", "install", f"VENV={tmp_path}/v"], cwd=REPOSITORY, capture_output=True)
    assert dry.returncode == 0, dry.stderr
    assert b"pip install" in dry.stdout
    for stage in STAGES:
        assert any(f"stage_configs/local/{stage}.toml" in line for line in demo), f"nobody trains {stage}"


def test_the_tutorials_inspections(said: dict[str, Done]) -> None:
    *fine, missing = said.values()
    assert [done.code for done in fine] == [0, 0]
    assert missing.code == 2
    assert "experiment.critic_checkpoint" in missing.err
    assert missing.err.count("->") == 1  # and nothing else


def test_the_tutorials_looks_and_evaluations(looked: dict[str, Done], trained: Path) -> None:
    for line, done in looked.items():
        assert done.code == 0, f"{line}\n{done.err}"
        for name in re.findall(r"--output (\S+\.\w+)", line):
            assert (trained / name).stat().st_size > 1000, name
    assert (trained / "weights.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (trained / "weights.html").read_text()[:200]
    compared = json.loads((trained / "comparison/compare.json").read_text())
    assert "training.beta" in json.dumps(compared)
    assert (trained / "comparison/curves.png").read_bytes().startswith(b"\x89PNG")
    plain, drafted = ([*trained.glob(f"evaluations/{place}/results.jsonl")] for place in ("*/*", "drafted"))
    answers = [[json.loads(line)["samples"] for line in file.read_text().splitlines()] for file in (*plain, *drafted)]
    texts = [[sample["program"] for samples in found for sample in samples] for found in answers]
    assert len(texts) == 2
    assert texts[0] == texts[1]
    assert len(texts[0]) == 3


def first_step(root: Path, run: str) -> dict[str, float]:
    record = json.loads((root / f"checkpoints/{run}/metrics.jsonl").read_text().splitlines()[0])
    assert record["step"] == 1
    metrics: dict[str, float] = record["metrics"]
    return metrics


def test_what_the_tutorial_says_of_a_smaller_temperature(trained: Path) -> None:
    before, sharper = (first_step(trained, run) for run in ("local-verifiable", "sharper"))
    for name in ("td/mean", "td/std", "td/min", "td/max", "train/value_loss"):
        assert sharper[name] == before[name]
    assert sharper["weight/std"] > 3 * before["weight/std"]
    assert before["weight/max"] < 2
    assert sharper["weight/max"] == pytest.approx(5.0)
    # With a critic that knows nothing, the end alone is a surprise.
    assert before["td/max"] == pytest.approx(0.5, abs=0.05)
    assert before["value/std"] < 0.05


# --- the pages of the stages ---


def names(rows: list[list[str]], heads: int) -> set[str]:
    """The metrics in a table's first column; those of heads one by one."""
    found = {name for row in rows for name in re.findall(r"`([\w/]+)`", row[0])}
    by_head = {name for name in found if name.endswith("_k")}
    return found - by_head | {f"{name[:-1]}{head}" for name in by_head for head in range(1, heads + 1)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_page_names_what_it_logs(trained: Path, stage: str) -> None:
    lines = (trained / f"checkpoints/local-{stage}/metrics.jsonl").read_text().splitlines()
    logged = {name for line in lines for name in json.loads(line)["metrics"]}
    [shared] = tables(DOCS / "stages.md", "metric", "what it is")
    [own] = tables(DOCS / f"stages/{stage}.md", "metric", "what it is")
    common = names(shared, 4)
    assert common <= logged
    assert {name for name in logged - common if not name.startswith("perf/")} == names(own, 4)


# --- a fifth weighting ---


def test_the_fifth_weightings_config_is_valid(untrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wmtp_ds.config import load_config
    from wmtp_ds.config.training import unregister_stage

    page = DOCS / "fifth_weighting.md"
    monkeypatch.chdir(untrained)
    config = Path("my_focal.toml")
    config.write_text(fenced(page, "toml")[0])
    namespace: dict[str, object] = {}
    exec("from pydantic import Field\nfrom wmtp_ds.config.training import TrainingConfig", namespace)
    exec(fenced(page, "python")[0], namespace)
    try:
        resolved = load_config(config)
    finally:
        unregister_stage("focal")
    assert (resolved.config.experiment.stage, resolved.config.training.late_weight) == ("focal", 3.0)  # type: ignore[attr-defined]


def test_the_fifth_weightings_control_deals_each_solutions_weights_anew() -> None:
    import torch

    from wmtp_ds.weighting import shuffle

    decisions_GL = torch.tensor([[False, True, True, True, True, False], [True, True, True, False, False, False]])
    weights_GL = torch.arange(12.0).view(2, 6) * decisions_GL
    given = {"weights_GL": weights_GL, "decisions_GL": decisions_GL, "shuffle_weights": shuffle.shuffle_weights}
    batch = type("Batch", (), {"row_ids": torch.tensor([3, 8])})
    namespace = given | {"batch": batch}
    exec(fenced(DOCS / "fifth_weighting.md", "python")[2], namespace)
    dealt_GL = namespace["weights_GL"]
    assert isinstance(dealt_GL, torch.Tensor)
    assert torch.equal(dealt_GL.sort(-1).values, weights_GL.sort(-1).values)
    assert not torch.equal(dealt_GL, weights_GL)
    assert not dealt_GL[~decisions_GL].any()
