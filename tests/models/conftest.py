"""Small Llama policies, whole and in folders."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from wmtp_ds.models.config_file import write_config
from wmtp_ds.models.loading import save_weights
from wmtp_ds.models.mtp import MTPLlamaForCausalLM

MakePolicy = Callable[..., MTPLlamaForCausalLM]


@pytest.fixture(scope="session")
def make_policy() -> MakePolicy:
    """Make a random policy: grouped-query attention, two trunk blocks, every parameter (norms, too) random."""

    def make(n: int = 4, *, seed: int = 0, **changes: Any) -> MTPLlamaForCausalLM:
        fields = {
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "n_future_tokens": n,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = MTPLlamaForCausalLM(LlamaConfig(**fields | changes)).eval()
            for name, parameter in model.named_parameters():
                is_norm = name.endswith("norm.weight")
                torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.5 if is_norm else 0.2)
        return model

    return make


@pytest.fixture(scope="session")
def write_policy() -> Callable[..., Path]:
    """Write a policy's folder, without a tokenizer."""

    def write(model: MTPLlamaForCausalLM, folder: Path, **options: Any) -> Path:
        folder.mkdir(parents=True)
        save_weights(model, folder, **options)
        write_config(folder, model.config, next(model.parameters()).dtype)
        return folder

    return write


@pytest.fixture(scope="session")
def policy(make_policy: MakePolicy) -> MTPLlamaForCausalLM:
    """The policy in ``policy_folder``; read only."""
    return make_policy()


@pytest.fixture(scope="session")
def policy_folder(
    policy: MTPLlamaForCausalLM, write_policy: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with four heads in one file; read only."""
    return write_policy(policy, tmp_path_factory.mktemp("models") / "policy")


@pytest.fixture
def folder(policy_folder: Path, tmp_path: Path) -> Path:
    """A copy of ``policy_folder`` to damage."""
    return Path(shutil.copytree(policy_folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Two sequences of eleven token ids."""
    return torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(0))
