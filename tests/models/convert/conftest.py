"""Small models in the layouts of others, written by means of their own and of plain torch alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import LLAMA, RELEASE, VOCABULARY, divide, randomise, release_state
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json of 259 tokens: three special ones and the bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model like Llama 2's, of fewer tokens."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = [line for file in Path(__file__).parents[1].glob("*.py") for line in file.read_text().splitlines()]
    lines = [line for line in lines if line.isascii()]
    (folder / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture
def make_llama(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., Path]:
    """Writes a model as transformers does."""

    def make(
        name: str = "source",
        *,
        dtype: torch.dtype = torch.float32,
        shard: str = "10GB",
        seed: int = 0,
        tokenizer: bool = True,
        **changes: Any,
    ) -> Path:
        folder = tmp_path / name
        model = LlamaForCausalLM(LlamaConfig(**LLAMA | changes))
        randomise(dict(model.named_parameters()), seed)
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        if tokenizer:
            shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
        return folder

    return make


@pytest.fixture
def make_release(tmp_path: Path, sentencepiece_file: Path) -> Callable[..., tuple[Path, dict[str, torch.Tensor]]]:
    """Writes a model in Meta's layout; gives the folder and the whole weights."""

    def make(
        name: str = "release",
        *,
        ranks: int = 1,
        embedding_axis: int = 1,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        extra: dict[str, torch.Tensor] | None = None,
        files: tuple[str, ...] | None = None,
        **changes: Any,
    ) -> tuple[Path, dict[str, torch.Tensor]]:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        params = {key: value for key, value in (RELEASE | changes).items() if value is not None}
        width = int(2 * 4 * params["dim"] / 3)
        width = int(params.get("ffn_dim_multiplier", 1) * width)
        multiple = params.get("multiple_of", 16)
        state = release_state(params, -(-width // multiple) * multiple, dtype, seed)
        names = files or (
            ("consolidated.pth",) if ranks == 1 else tuple(f"consolidated.{rank:02d}.pth" for rank in range(ranks))
        )
        for file, part in zip(names, divide(state, ranks, embedding_axis), strict=True):
            torch.save(part | (extra or {}), folder / file)
        (folder / "params.json").write_text(json.dumps(params))
        shutil.copy(sentencepiece_file, folder / "tokenizer.model")
        return folder, state

    return make
