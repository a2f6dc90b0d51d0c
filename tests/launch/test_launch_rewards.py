"""A critic that learns a reward model's scores, through the launcher: computed by its ranks, or once into the data."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from preloaded import run_preloaded
from test_launch_parity import start
from test_launch_runs import job, metrics
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from wmtp_ds.data.index import build_index
from wmtp_ds.data.templates import get_template

pytestmark = pytest.mark.launch

MODEL, DATA = "storage/models/reward", "storage/data/sample"
OFF = 'mlflow.tracking_uri=""'


def make_reward_model(root: Path) -> None:
    """A random classifier, scores spread out, with the policy's tokenizer."""
    torch.manual_seed(11)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=832, num_labels=1, **sizes))
    model.score.weight.data *= 40
    model.save_pretrained(root / MODEL)
    PreTrainedTokenizerFast.from_pretrained(root / "storage/models/micro-policy").save_pretrained(root / MODEL)


@pytest.fixture(scope="module")
def trained(workspace: Path) -> Path:
    """The same critic three times: from the model, from the model's kept scores, and from scores in the data."""
    make_reward_model(workspace)
    for name in ("train", "validation"):
        typed = ["--input", f"{DATA}/{name}.jsonl", "--output", f"scored/{name}.jsonl", "--reward-model", MODEL]
        done = run_preloaded(["wmtp-ds", "data", "label", *typed, "--max-length", "256"], workspace)
        assert done.returncode == 0, done.stderr
    squash = 'models.reward.squash="zscore_sigmoid"'
    of_model = [
        'models.reward.source="model"',
        f'models.reward.path="{MODEL}"',
        'models.reward.dtype="float32"',
        squash,
    ]
    of_data = ['models.reward.source="scores"', squash]
    files = [f'dataset.{name}="scored/{name}.jsonl"' for name in ("train", "validation")]
    jobs = [
        job("critic", "rewards-model", OFF, *of_model),
        job("critic", "rewards-kept", OFF, *of_model),
        job("critic", "rewards-data", OFF, *of_data, *files),
        job("critic", "rewards-labels", OFF),
    ]
    start(workspace, jobs, 2)
    return workspace


def expected_scores(root: Path, name: str) -> np.ndarray:
    """Each row alone, in plain transformers."""
    model = LlamaForSequenceClassification.from_pretrained(root / MODEL).eval()
    model.config.pad_token_id = None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / MODEL)
    index = build_index(root / DATA / f"{name}.jsonl")
    scores = []
    for number in range(len(index)):
        row = index.read_row(number)
        text = get_template("alpaca")(row) + row.output
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            scores.append(model(input_ids=torch.tensor([ids])).logits.item())
    return np.array(scores)


def test_ranks_score_as_plain_transformers_does(trained: Path) -> None:
    kept = [np.load(file) for file in (trained / "storage/cache/tokens").glob("rewards-*.npy")]
    by_length = {len(scores): scores for scores in kept}
    for name in ("train", "validation"):
        expected = expected_scores(trained, name)
        found = by_length[len(expected)]
        drawn = ~np.isnan(found)
        assert drawn.sum() >= 10
        np.testing.assert_allclose(found[drawn], expected[drawn], atol=1e-4)
        assert expected.std() > 0.1


def test_the_critic_learns_from_scores(trained: Path) -> None:
    found = {name: metrics(trained, f"rewards-{name}") for name in ("model", "kept", "data", "labels")}
    assert found["kept"] == found["model"]
    losses = {name: [values["train/value_loss"] for _, values in sorted(of.items())] for name, of in found.items()}
    assert losses["data"] == pytest.approx(losses["model"], abs=1e-5)
    assert losses["labels"] != pytest.approx(losses["model"], abs=1e-2)


def test_scores_in_the_data_are_the_models(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "scored/validation.jsonl").read_text().splitlines()]
    found = [row["metadata"]["reward_score"] for row in rows]
    np.testing.assert_allclose(found, expected_scores(trained, "validation"), atol=1e-4)
