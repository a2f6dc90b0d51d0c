"""A tokenizer.json of a tokenizer.model: SentencePiece's (Llama 1 and 2) or tiktoken's (Llama 3)."""

import base64
import binascii
import re
from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from wmtp_ds.errors import UserError
from wmtp_ds.files import read_bytes

# The class that takes tokenizer.json as it stands, under the name that old and new versions of transformers know.
PLAIN_CLASS = "PreTrainedTokenizerFast"
# Texts that two ways of reading one tokenizer are compared on.
PROBES = (
    "def f(x):\n    return x + 1\n",
    "    indented",
    "  two",
    " a",
    "a  b",
    "\tif x:\n\t\ty = [0] * 10**9",
    "x = 1234567890",
    "naïve Ünïcode – 中文 👩‍👩‍👧",
    "'it''s' \"quoted\" \\ \r\n",
    "\n\n",
)


def from_tokenizer_model(file: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a tokenizer.model of either kind; ``vocab_size`` is how many tokens the model embeds.

    Raises:
        UserError: if it cannot be read, or not so that it gives the same tokens.
    """
    content = read_bytes(file)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        return from_tiktoken(file, content, vocab_size)
    return from_sentencepiece(file)


def from_sentencepiece(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a SentencePiece model (Llama 1 and 2, Meta's multi-token-prediction models).

    A space is put before the text and each space becomes U+2581, as SentencePiece does there; unknown characters fall
    back to bytes.

    Raises:
        UserError: if sentencepiece is not installed, or gives other tokens for some text.
    """
    try:
        import sentencepiece
    except ImportError:
        raise UserError(f"{file} is a SentencePiece model. To read it: pip install sentencepiece") from None
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    pieces = [model.id_to_piece(number) for number in range(model.vocab_size())]
    ids = {piece: number for number, piece in enumerate(pieces)}
    splits = []
    for number, piece in enumerate(pieces):
        if model.is_control(number) or model.is_unknown(number) or model.is_byte(number):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                splits.append((-model.get_score(number), ids[left], ids[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(splits)]
    unknown, begin, end = (model.id_to_piece(number) for number in (model.unk_id(), model.bos_id(), model.eos_id()))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = spaces_as_sentencepiece()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _compare(file, "sentencepiece", model.encode, tokenizer)
    return _finish(tokenizer, begin, end, [unknown, begin, end], unk_token=unknown)


def spaces_as_sentencepiece() -> normalizers.Normalizer:
    """A space before the text, also before one that begins with a space; each space as U+2581."""
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def from_tiktoken(file: Path, content: bytes, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of Llama 3: lines of a token in base64 and its rank; special tokens follow up to ``vocab_size``.

    Raises:
        UserError: if a line is malformed, or ranks are missing or repeated.
    """
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{file}, line {number}: not a token in base64 and its rank. Copy it again.") from None
    if sorted(ranks.values()) != list(range(len(content.splitlines()))):
        raise UserError(f"{file}: its ranks are not 0, 1, 2, …, each once. Copy it again.")

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks  # the library's own reader keeps a copy of every file that it has read

    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    special = [begin, end, *(f"<|reserved_special_token_{number}|>" for number in (0, 1))]
    special += ["<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>"]
    special += ["<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    special += [f"<|reserved_special_token_{number}|>" for number in range(3, vocab_size)]
    tokenizer = Converter(vocab_file=str(file)).converted()
    return _finish(tokenizer, begin, end, special[: max(2, vocab_size - len(ranks))])


def _finish(
    tokenizer: tokenizers.Tokenizer, begin: str, end: str, special: list[str], **tokens: str
) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, clean_up_tokenization_spaces=False, **tokens
    )


def _compare(file: Path, library: str, encode: Callable[[str], list[int]], tokenizer: tokenizers.Tokenizer) -> None:
    for text in PROBES:
        theirs, ours = encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if theirs != ours:
            raise UserError(
                f"{file}: {library} reads {text!r} as {theirs}, the tokenizer.json made of it as {ours}. Models of "
                "this kind are not supported; put a tokenizer.json of the model beside it."
            )
