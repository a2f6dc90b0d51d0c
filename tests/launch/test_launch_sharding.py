"""Weights are loaded sharded: no rank ever holds the whole model."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from transformers import LlamaConfig

from wmtp_ds.models.config_file import write_config
from wmtp_ds.models.loading import save_weights
from wmtp_ds.models.mtp import MTPLlamaForCausalLM

pytestmark = pytest.mark.launch

RANKS = 4


def make_policy(folder: Path, tied: bool) -> MTPLlamaForCausalLM:
    """Some fifty million random parameters in several files."""
    plain = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=9,
        num_attention_heads=8,
        vocab_size=8192,
        tie_word_embeddings=tied,
    )
    config = LlamaConfig.from_dict(plain.to_dict() | {"n_future_tokens": 4})
    torch.manual_seed(int(tied))
    model = MTPLlamaForCausalLM(config)
    folder.mkdir()
    save_weights(model, folder, shard_bytes=60_000_000)
    write_config(folder, config, torch.float32)
    return model


def test_no_rank_ever_holds_the_whole_model(workspace: Path, tmp_path: Path) -> None:
    models = {name: make_policy(tmp_path / name, tied=name == "tied") for name in ("untied", "tied")}
    small = workspace / "storage/models/micro-policy"
    folders = [str(small), *(str(tmp_path / name) for name in models), str(tmp_path)]
    done = run_ranks(Path(__file__).with_name("load_sharded.py"), folders, RANKS, tmp_path)
    assert done.returncode == 0, done.stdout

    for name, model in models.items():
        size = 4 * sum(p.numel() for p in model.parameters())
        sums = [p.double().sum().item() for p in model.parameters()]
        assert size > 150_000_000
        for rank in range(RANKS):
            held = json.loads((tmp_path / f"{name}-{rank}.json").read_text())
            assert held["sums"] == pytest.approx(sums, abs=1e-6)
            assert held["whole"] == 0
            # A quarter stays on each rank; for a moment also the largest tensor, as it is read and handed out.
            assert held["end"] < 0.45 * size, held
            assert held["peak"] < 0.6 * size, held
