"""Small random models for trying everything on a CPU: a policy, a smaller reference, and their tokenizer."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from wmtp_ds.data.index import build_index
from wmtp_ds.data.templates import get_template
from wmtp_ds.models.config_file import write_config
from wmtp_ds.models.fingerprint import store_trunk_fingerprint
from wmtp_ds.models.loading import save_weights
from wmtp_ds.models.mtp import MTPLlamaForCausalLM

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text round-trips. Ids 0, 1, 2 are padding, beginning and end.

    Args:
        texts: what to learn merges from.
        vocab_size: at least 259 (256 bytes and three special tokens).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def sample_texts(file: Path, template: str) -> Iterator[str]:
    """Prompts and solutions of a data file, as training will see them."""
    index = build_index(file)
    for number in range(len(index)):
        row = index.read_row(number)
        yield get_template(template)(row)
        yield row.output


def make_micro_models(
    *,
    data: Path,
    policy: Path,
    reference: Path,
    template: str = "alpaca",
    vocab_size: int = 768,
    n_future_tokens: int = 4,
    hidden_size: int = 64,
    trunk_layers: int = 2,
    seed: int = 0,
) -> tuple[int, int]:
    """Write a small random policy, a smaller reference, and one tokenizer for both.

    Args:
        data: JSONL file that the tokenizer learns from.
        policy, reference: folders to write; what is there is replaced.
        template: prompt template of the data.
        vocab_size: of the tokenizer; the models' is rounded up to a multiple of 64.
        n_future_tokens: heads of the policy.
        hidden_size: of the policy; a multiple of 32.
        trunk_layers: of the policy.
        seed: of the random weights.

    Returns:
        The numbers of parameters of policy and reference.

    Raises:
        UserError: if the data cannot be read.
    """
    tokenizer = train_tokenizer(sample_texts(data, template), vocab_size)
    vocab = -(-len(tokenizer) // 64) * 64
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    policy_config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 16 * 16,
        num_hidden_layers=trunk_layers + 1,
        num_attention_heads=hidden_size // 16,
        num_key_value_heads=hidden_size // 32,
        **common,
    )
    reference_config = LlamaConfig(
        hidden_size=hidden_size * 2 // 3 // 16 * 16,
        intermediate_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=hidden_size * 2 // 3 // 16,
        **common,
    )
    return (
        _write_random(policy, policy_config, n_future_tokens, tokenizer, seed),
        _write_random(reference, reference_config, None, tokenizer, seed + 1),
    )


def _write_random(folder: Path, config: LlamaConfig, heads: int | None, tokenizer: Any, seed: int) -> int:
    """A random policy with as many heads, or a plain Llama (None); its size."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with_heads = LlamaConfig.from_dict(config.to_dict() | {"n_future_tokens": heads or 1})
        model = MTPLlamaForCausalLM(with_heads)
    save_weights(model, partial)
    write_config(partial, config if heads is None else with_heads, torch.float32)
    tokenizer.save_pretrained(partial)
    store_trunk_fingerprint(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return sum(parameter.numel() for parameter in model.parameters())
