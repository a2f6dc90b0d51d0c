"""Tokens of a solution: each character is shown once, however many tokens it is."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from wmtp_ds.data.rows import Row
from wmtp_ds.data.text_encoder import TextEncoder
from wmtp_ds.look.columns import Solution, tokens_of
from wmtp_ds.look.page import render
from wmtp_ds.look.statistics import summary
from wmtp_ds.models.micro import train_tokenizer

TEXT = "x = 1  # a — b 😀\n"


def byte_level() -> PreTrainedTokenizerFast:
    return train_tokenizer(iter(["x = 1"]), 260)


def byte_fallback() -> PreTrainedTokenizerFast:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"x=1#ab"]
    vocabulary = {name: number for number, name in enumerate(names)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def words() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def solution(tokenizer: PreTrainedTokenizerFast) -> Solution:
    encoder, row = TextEncoder(tokenizer), Row("p", "Do it.", TEXT, True)
    [ids] = encoder([TEXT])
    return Solution(row, 1, tokens_of(row, {"weight": torch.arange(len(ids) + 1.0)}, encoder))


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback(), words()], ids=["bytes", "fallback", "words"])
def test_every_character_is_shown_once(tokenizer: Any) -> None:
    found = solution(tokenizer).tokens
    assert "".join(token.text for token in found) == TEXT
    assert [token.kind for token in found].count("end") == 1
    assert found[-1].kind == "end"
    assert [token.columns["weight"] for token in found] == list(range(len(found)))


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=["bytes", "fallback"])
def test_further_bytes_of_a_character_say_what_they_are_of(tokenizer: Any) -> None:
    one = solution(tokenizer)
    parts = [token for token in one.tokens if token.part_of == "😀"]
    assert [token.text for token in parts] == ["😀", "", "", ""]
    assert [token.kind for token in parts] == ["comment"] * 4
    assert [token.text for token in one.tokens if token.part_of == "—"] == ["—", "", ""]
    page = render("t", {}, [one], summary([one]))
    assert page.count("part of &#x27;😀&#x27;") == 4
    assert page.count("□") == page.count("end of the solution") == 1
