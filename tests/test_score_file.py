"""``wmtp-ds data label --reward-model``: scores in the data, against plain transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForSequenceClassification

import wmtp_ds.score_file as module
from wmtp_ds.cli.data_label import label
from wmtp_ds.data.rows import parse_row
from wmtp_ds.data.templates import get_template
from wmtp_ds.errors import UserError
from wmtp_ds.models.micro import train_tokenizer
from wmtp_ds.score_file import score_file

COUNT = 9


def row(number: int) -> dict[str, Any]:
    return {
        "problem_id": f"p{number // 2}",
        "instruction": "Füge hinzu.",
        "output": "x = 1\n" * (1 + number % 4) + f"y = {number}\n",
        "is_correct": number % 2 == 0,
        "metadata": {"kept": number} if number % 3 else {},
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "in.jsonl"
    lines = [json.dumps(row(number), ensure_ascii=False) for number in range(COUNT)]
    file.write_text("\n".join(lines[:4]) + "\n\n" + "\n".join(lines[4:]) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = train_tokenizer(iter([row(3)["output"], "Füge hinzu."]), 300)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def expected(model: Path) -> list[float]:
    """One row at a time, in plain transformers."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    classifier = LlamaForSequenceClassification.from_pretrained(model).eval()
    classifier.config.pad_token_id = None
    scores = []
    for number in range(COUNT):
        found = parse_row(json.dumps(row(number)).encode(), "x", 1)
        text = get_template("alpaca")(found) + found.output
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            scores.append(classifier(input_ids=torch.tensor([ids])).logits.item())
    return scores


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_row_gets_its_score_and_keeps_the_rest(source: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.jsonl"
    report = score_file(source, output, model, batch_size=2)
    rows, scores = read(output), expected(model)
    assert [found["metadata"].pop("reward_score") for found in rows] == pytest.approx(scores, abs=1e-5)
    assert len({found["metadata"].pop("reward_model") for found in rows}) == 1
    assert rows == [row(number) for number in range(COUNT)]
    assert report["rows"] == COUNT
    assert report["all"]["mean"] == pytest.approx(sum(scores) / COUNT, abs=1e-5)
    assert report["correct"]["max"] == pytest.approx(max(scores[::2]), abs=1e-5)
    assert report["incorrect"]["min"] == pytest.approx(min(scores[1::2]), abs=1e-5)
    assert [entry.name for entry in output.parent.iterdir()] == ["out.jsonl"]


def test_an_interruption_loses_nothing(
    source: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCHES_AT_ONCE", 2)
    score_file(source, tmp_path / "whole.jsonl", model, batch_size=1)
    calls = []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(list(args[3]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **options)

    original = module.score_rows
    monkeypatch.setattr(module, "score_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score_file(source, tmp_path / "out.jsonl", model, batch_size=1)
    assert not (tmp_path / "out.jsonl").exists()
    score_file(source, tmp_path / "out.jsonl", model, batch_size=1)
    assert calls == [[0, 1], [2, 3], [4, 5], [4, 5], [6, 7], [8]]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob(".partial-*"))


def test_nothing_is_overwritten_by_accident(source: Path, model: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(UserError, match="is the input"):
        score_file(source, source, model)
    with pytest.raises(UserError, match="is a folder"):
        score_file(source, tmp_path, model)
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(UserError, match="exists: give another --output, or --force"):
        score_file(source, tmp_path / "out.jsonl", model)
    assert (source.read_bytes(), (tmp_path / "out.jsonl").read_text()) == (before, "mine")
    score_file(source, tmp_path / "out.jsonl", model, force=True)
    assert len(read(tmp_path / "out.jsonl")) == COUNT


def test_no_model(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist: name the folder"):
        score_file(source, tmp_path / "out.jsonl", tmp_path / "nowhere")


def test_the_command(source: Path, model: Path, tmp_path: Path) -> None:
    typed = ["--input", str(source), "--output", str(tmp_path / "out.jsonl"), "--reward-model", str(model)]
    done = CliRunner().invoke(label, [*typed, "--max-length", "20", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"] == COUNT
    told = CliRunner().invoke(label, [*typed, "--force"])
    assert "9 rows with metadata.reward_score" in told.output
    assert "incorrect" in told.output


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["--workers", "2", "--reward-model", "x"], "--workers is about running solutions"),
        (["--batch-size", "2"], "--batch-size is about a reward model"),
    ],
)
def test_what_does_not_go_together(source: Path, tmp_path: Path, typed: list[str], says: str) -> None:
    done = CliRunner().invoke(label, ["--input", str(source), "--output", str(tmp_path / "o.jsonl"), *typed])
    assert done.exit_code == 2
    assert says in done.output
