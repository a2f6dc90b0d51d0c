"""`wmtp-ds data stats`: against counts made by reading the batches of a run."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from wmtp_ds.cli.main import main
from wmtp_ds.config import load_config
from wmtp_ds.data.batches import Collator
from wmtp_ds.data.index import build_index
from wmtp_ds.data.loader import Ranks, load_packed, load_windows
from wmtp_ds.data.statistics import PERCENTILES, TokenLengths, describe_tokens, spread
from wmtp_ds.data.statistics_plan import plan_run
from wmtp_ds.data.templates import get_template

MAX_LENGTH = 90

CONFIG = """
extends = "{root}/stage_configs/local/verifiable.toml"
[models.policy]
path = "tokenizer"
[dataset]
train = "train.jsonl"
max_length = 90
cache_dir = "cache"
template = "plain"
[data_sampling]
n_samples = 40
[training]
n_epochs = 1.5
batch_size = 2
gradient_accumulation_steps = 2
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data file, a tokenizer of one token a character, and a config, in the current directory."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "problem_id": f"p{i // 5}",
            "instruction": "i" * int(rng.integers(5, 60)),
            "output": "o" * int(rng.integers(1, 100)),
            "is_correct": bool(i % 2),
            "difficulty": 1 + i % 11,
        }
        for i in range(60)
    ]
    del rows[0]["difficulty"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    core = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "i": 2, "o": 3, "\n": 4, "?": 5}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(
        tmp_path / "tokenizer"
    )
    root = Path(__file__).parents[2]
    (tmp_path / "run.toml").write_text(CONFIG.format(root=root))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["data", "stats", *args])
    assert isinstance(end.value.code, int)
    return end.value.code


def report_of(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert run(*args, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def rows_of(workspace: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workspace / "train.jsonl").read_text().splitlines()]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=300))
def test_percentiles_by_their_definition(values: list[int]) -> None:
    found = spread(np.array(values))
    for p in PERCENTILES:
        expected = next(v for v in sorted(values) if 100 * sum(w <= v for w in values) >= p * len(values))
        assert found[f"p{p}"] == expected
    assert (found["min"], found["max"]) == (min(values), max(values))


def test_counts_and_bytes_without_a_tokenizer(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(capsys, "train.jsonl", "--template", "plain")
    rows = rows_of(workspace)
    assert (report["rows"], report["correct"], report["incorrect"], report["problems"]) == (60, 30, 30, 12)
    assert report["tokens"] is report["plan"] is None
    assert report["rows_per_problem"]["min"] == report["rows_per_problem"]["max"] == 5
    assert report["bytes"]["solution"]["max"] == max(len(row["output"]) for row in rows)
    assert report["bytes"]["prompt"]["min"] == min(len(row["instruction"]) for row in rows) + 2
    assert report["by_difficulty"]["0"] == {"correct": 0, "incorrect": 1, "problems": 1}
    assert sum(sum((c["correct"], c["incorrect"])) for c in report["by_difficulty"].values()) == 60


def test_problems_with_one_kind_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    labels = [("a", True), ("b", False), ("c", True), ("c", False), ("d", True)]
    rows = [{"problem_id": p, "instruction": p, "output": "x", "is_correct": correct} for p, correct in labels]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = report_of(capsys, str(file))
    assert (report["problems_without_correct"], report["problems_without_incorrect"]) == (1, 2)


def test_the_borders_of_max_length() -> None:
    lengths = TokenLengths(np.array([0, 1, 0, 3, 4]), np.array([8, 8, 9, 5, 5]), 10)
    assert lengths.fits.tolist() == [True, True, False, True, True]
    assert lengths.truncated.tolist() == [False, True, False, False, True]
    assert lengths.sequences.tolist() == [10, 10, 0, 10, 10]
    assert lengths.supervised.tolist() == [9, 9, 0, 6, 6]
    told = describe_tokens(lengths)
    assert (told["tokens"], told["supervised_tokens"]) == (40, 30)
    assert (told["sequence"]["min"], told["sequence"]["max"]) == (10, 11)  # before anything is cut


def test_what_max_length_does_is_what_the_collator_does(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = report_of(capsys, "--config", "run.toml")["tokens"]
    index = build_index("train.jsonl")
    collator = Collator(PreTrainedTokenizerFast.from_pretrained("tokenizer"), get_template("plain"), MAX_LENGTH)
    batch = collator([index.read_row(i) for i in range(len(index))], np.arange(len(index)))
    assert (tokens["prompts_truncated"], tokens["solutions_skipped"]) == (collator.truncated, collator.skipped)
    assert min(collator.truncated, collator.skipped) > 3
    assert tokens["supervised_tokens"] == int(batch.supervised.sum())
    assert tokens["tokens"] == int(batch.segment_ids.sum()) - collator.skipped  # those are a BOS alone
    same = report_of(capsys, "train.jsonl", "--tokenizer", "tokenizer", "--max-length", "90", "--template", "plain",
                     "--cache-dir", "")  # fmt: skip
    assert same["tokens"] == tokens


@pytest.mark.parametrize("ranks", [1, 2])
def test_phases_are_what_training_reads(workspace: Path, capsys: pytest.CaptureFixture[str], ranks: int) -> None:
    found = report_of(capsys, "--config", "run.toml", "--num_gpus", str(ranks))["plan"]
    index = build_index("train.jsonl")
    collator = Collator(PreTrainedTokenizerFast.from_pretrained("tokenizer"), get_template("plain"), MAX_LENGTH)
    lengths = [(len(p), len(s)) for p, s in collator.encode([index.read_row(i) for i in range(len(index))])]
    token_lengths = TokenLengths(*np.array(lengths).T, MAX_LENGTH)
    plan, _ = plan_run(load_config(Path("run.toml"), checks=False), index, token_lengths, ranks)
    assert found["steps"] == plan.total_steps
    assert len(found["phases"]) == 3
    supervised = {"all": 0, "correct": 0, "incorrect": 0}
    by_draw: list[int] = []
    places = tokens = 0
    windows = [
        load_windows(index, plan, collator, rank=rank, world_size=ranks, batch_size=2, accumulation=2)
        for rank in range(ranks)
    ]
    for of_ranks in zip(*windows, strict=True):
        for micro_batch in range(2):
            for rank in range(ranks):
                batch = of_ranks[rank][micro_batch]
                counts = batch.supervised.sum(1)
                by_draw += counts.tolist()
                supervised["all"] += int(counts.sum())
                supervised["correct"] += int(counts[batch.correct].sum())
                supervised["incorrect"] += int(counts[~batch.correct].sum())
                places += batch.input_ids.numel()
                tokens += int((batch.segment_ids > 0).sum())
    assert found["run"]["supervised_tokens"] == supervised["all"]
    assert found["run"]["supervised_tokens_correct"] == supervised["correct"]
    assert found["run"]["supervised_tokens_incorrect"] == supervised["incorrect"]
    assert found["run"]["tokens"] == tokens
    assert found["padding"]["unpacked"] == pytest.approx(1 - tokens / places, abs=1e-4)
    assert found["epochs"] == pytest.approx(len(plan.draws) / 40, abs=1e-4)
    for phase, (start, end) in zip(found["phases"], plan.phases, strict=True):
        drawn = plan.draws[start:end].tolist()
        assert phase["distinct_rows"] == len(set(drawn))
        assert phase["distinct_problems"] == len({index.read_row(i).problem_id for i in drawn})
        assert phase["correct"] == sum(index.read_row(i).is_correct for i in drawn) == len(drawn) - phase["incorrect"]
        assert phase["prompts_truncated"] == sum(sum(lengths[i]) + 2 > MAX_LENGTH for i in drawn)
        assert phase["supervised_tokens"] == sum(by_draw[start:end])
        assert sum(of_bin["supervised_tokens"] for of_bin in phase["by_bin"].values()) == phase["supervised_tokens"]
        assert sum(of_bin["draws"] for of_bin in phase["by_bin"].values()) == phase["draws"] == end - start
    places = tokens = 0
    for step in range(plan.total_steps):
        for rank in range(ranks):
            for batch in load_packed(index, collator, plan.rows(step), None, Ranks(rank, ranks, 2), 2):
                places += batch.input_ids.numel()
                tokens += int((batch.segment_ids > 0).sum())
    assert found["padding"]["packed"] == pytest.approx(1 - tokens / places, abs=1e-4)


def test_a_config_without_a_curriculum_has_one_phase(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = "--config", "run.toml", "--override", "data_sampling.curriculum_learning=false"
    plan = report_of(capsys, *args, "--plot", "picture.png")["plan"]
    assert [phase["epoch_range"] for phase in plan["phases"]] == [[0.0, 1.0]]
    assert plan["phases"][0]["supervised_tokens"] == plan["run"]["supervised_tokens"]
    assert "by_bin" not in plan["run"]
    assert (workspace / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_and_the_picture(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config", "run.toml", "--plot", "pictures/data.png") == 0
    out = capsys.readouterr().out
    for text in ("60 rows (30 correct, 30 incorrect) of 12 problems", "unknown", "0.3 to 0.7", "medium", "padding: "):
        assert text in out
    picture = (workspace / "pictures" / "data.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert run("train.jsonl", "--plot", "bytes.png") == 0
    assert (workspace / "bytes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Name a data FILE"),
        (["none.jsonl"], "none.jsonl: no such data file"),
        (["train.jsonl", "--num_gpus", "2"], "--num_gpus is about a run"),
        (["train.jsonl", "--override", "a=1"], "--override is about a run"),
        (["train.jsonl", "--max-length", "9"], "--max-length is about tokens"),
        (["train.jsonl", "--cache-dir", "x"], "--cache-dir is about tokens"),
        (["--config", "run.toml", "--max-length", "9"], "--max-length is what the config says"),
        (["--config", "run.toml", "--tokenizer", "tokenizer"], "--tokenizer is what the config says"),
        (["--config", "none.toml"], "none.toml"),
        (["train.jsonl", "--tokenizer", "nowhere"], "nowhere"),
        (["train.jsonl", "--plot", "train.jsonl"], "give a name that ends with .png"),
        (["train.jsonl", "--plot", "train.jsonl/x.png"], "its folder is a file"),
        (["train.jsonl", "--plot", "tokenizer.png"], "is a folder: give --plot the name of a file"),
        (["train.jsonl", "--plot", "link.png"], "is the input"),
    ],
)
def test_errors_are_one_message(
    workspace: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    (workspace / "tokenizer.png").mkdir()
    (workspace / "link.png").symlink_to("train.jsonl")
    before = (workspace / "train.jsonl").read_bytes()
    assert run(*args) == 2
    assert (workspace / "train.jsonl").read_bytes() == before
    assert message in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_leaves_the_one_before(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "picture.png").write_text("before")

    def full(figure: Any, path: Path, **options: Any) -> None:
        path.write_text("half a pic")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert run("train.jsonl", "--plot", "picture.png") == 1
    assert "picture.png: writing failed: No space left on device" in capsys.readouterr().err
    assert (workspace / "picture.png").read_text() == "before"
    assert not list(workspace.glob(".partial-*"))
