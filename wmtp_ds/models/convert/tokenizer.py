"""Tokenizers on their way from one model's folder to another's.

What counts is tokenizer.json: any library reads the same tokens from it. Two things stand in the way. Classes of
transformers 5 that tokenizer_config.json may name (``LlamaTokenizer``, ``GPT2Tokenizer``) take the vocabulary alone and
build the rest anew: a space at the start of indented code is lost, digits are cut elsewhere. So the class becomes the
one that takes tokenizer.json as it stands. And older models have a tokenizer.model alone, of which a tokenizer.json is
made. Either way the result is tried on a few texts before a model is written.
"""

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from wmtp_ds.errors import UserError
from wmtp_ds.models.config_file import read_json_object
from wmtp_ds.models.convert.tokenizer_models import PLAIN_CLASS, PROBES, from_tokenizer_model, spaces_as_sentencepiece
from wmtp_ds.models.loading import in_one_line, load_tokenizer
from wmtp_ds.models.tokenizer_file import read_vocabulary

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# In a tokenizer_config.json: of the machine that wrote it, or of code that is not run.
_DROPPED = ("backend", "is_local", "local_files_only", "auto_map", "name_or_path")


@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer is: a folder with tokenizer.json, one of another kind, a tokenizer.model, or a GGUF file."""

    kind: Literal["json", "folder", "model", "gguf", "none"]
    path: Path

    def files(self) -> list[Path]:
        """What is read of it."""
        if self.kind in ("json", "folder"):
            return [self.path / name for name in _COPIED if (self.path / name).is_file()]
        return [self.path] if self.path.is_file() else []


def find_tokenizer(folder: Path, override: Path | None = None) -> TokenizerSource:
    """The tokenizer of a model's folder, or what ``override`` (a folder or file) holds.

    Raises:
        UserError: if the override holds none. That a model's folder has none is said when it is needed.
    """
    place = override or folder
    if place.is_file():
        if place.name == "tokenizer.json":
            return TokenizerSource("json", place.parent)
        return TokenizerSource("model", place)
    if (place / "tokenizer.json").is_file():
        return TokenizerSource("json", place)
    if (place / "tokenizer.model").is_file():
        return TokenizerSource("model", place / "tokenizer.model")
    if (place / "vocab.json").is_file():
        return TokenizerSource("folder", place)
    if override is not None:
        raise UserError(f"--tokenizer {override}: there is no tokenizer.json and no tokenizer.model.")
    return TokenizerSource("none", place)


def write_tokenizer(source: TokenizerSource, folder: Path, fields: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Put a tokenizer into a model's folder, whose config.json is there already.

    Args:
        source: where it comes from.
        folder: where it goes.
        fields: the model's config; its ``vocab_size`` must hold every token.

    Returns:
        The ids of its special tokens, as config.json names them, and what deserves a warning.

    Raises:
        UserError: if there is no tokenizer, it is damaged, or it has tokens that the model does not embed.
    """
    if source.kind == "none":
        raise UserError(
            f"{source.path} has no tokenizer (tokenizer.json or tokenizer.model). Copy it there, or name it with "
            "--tokenizer."
        )
    try:
        if source.kind == "json":
            for file in source.files():
                shutil.copyfile(file, folder / file.name)
        else:
            _make(source, fields).save_pretrained(folder)
            if source.kind == "model":
                shutil.copyfile(source.path, folder / "tokenizer.model")
            if source.kind == "gguf":
                _drop_invented(folder, fields["vocab_size"])
        _settle_class(folder, fields)
        return _check(source, folder, fields)
    except OSError:
        raise
    except UserError as error:  # what is wrong is wrong in the source
        raise UserError(str(error).replace(str(folder), str(source.path))) from None
    except Exception as error:  # transformers, tokenizers and sentencepiece raise bare Exceptions, too
        raise UserError(f"the tokenizer in {source.path} cannot be read: {in_one_line(error)}") from None


def _make(source: TokenizerSource, fields: dict[str, Any]) -> Any:
    if source.kind == "gguf":
        # Without a word on code, transformers would ask on the terminal whether that of the folder may run.
        tokenizer = AutoTokenizer.from_pretrained(
            source.path.parent, gguf_file=source.path.name, local_files_only=True, trust_remote_code=False
        )
        backend = tokenizer.backend_tokenizer
        if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):  # which loses a space at the start of a text
            backend.normalizer, backend.pre_tokenizer = spaces_as_sentencepiece(), None
        return tokenizer
    if source.kind == "folder":
        return AutoTokenizer.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    return from_tokenizer_model(source.path, fields["vocab_size"])


def _drop_invented(folder: Path, vocab_size: int) -> None:
    """Take out what transformers adds to the vocabulary of a GGUF file that names no token for unknown text."""
    file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content, config = (read_json_object(path, "it was written just now.") for path in (file, config_file))
    invented = {entry["content"] for entry in content["added_tokens"] if entry["id"] >= vocab_size}
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] not in invented]
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    config = {name: value for name, value in config.items() if not isinstance(value, str) or value not in invented}
    config_file.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


def _settle_class(folder: Path, fields: dict[str, Any]) -> None:
    """Let tokenizer.json be taken as it stands, by transformers old and new."""
    file, others = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config, named = (read_json_object(path, "") if path.exists() else {} for path in (file, others))
    config = {name: value for name, value in config.items() if name not in _DROPPED}
    # What a class knew by itself is now said, as far as the model's config does.
    for name, token in _special_tokens(folder, fields).items():
        if name not in named:
            config.setdefault(name, token)
    config |= {"tokenizer_class": PLAIN_CLASS, "model_input_names": ["input_ids", "attention_mask"]}
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _special_tokens(folder: Path, fields: dict[str, Any]) -> dict[str, str]:
    """The tokens of the ids that the model's config names."""
    tokens = read_vocabulary(folder / "tokenizer.json")
    named = {}
    for name in ("bos", "eos", "pad"):
        number = fields.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if number in tokens:
            named[f"{name}_token"] = tokens[number]
    return named


def _check(source: TokenizerSource, folder: Path, fields: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    vocabulary = read_vocabulary(folder / "tokenizer.json")
    size, highest = fields["vocab_size"], max(vocabulary)
    if highest >= size:
        raise UserError(
            f"the tokenizer in {source.path} has a token of id {highest} ({vocabulary[highest]!r}), but the model "
            f"embeds {size} tokens: it is of another vocabulary. Name the model's own with --tokenizer."
        )
    load_tokenizer(folder)
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text_of = partial(loaded.decode, clean_up_tokenization_spaces=False)
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in PROBES:
        ids = plain.encode(text, add_special_tokens=False).ids
        if loaded(text, add_special_tokens=False).input_ids != ids or text_of(ids) != plain.decode(ids):
            raise UserError(
                f"the tokenizer in {source.path}: transformers reads {text!r} in another way than its tokenizer.json "
                f"says (its tokenizer_config.json names the class {type(loaded).__name__})."
            )
    named = {f"{name}_token_id": getattr(loaded, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {name: number for name, number in named.items() if number is not None}, _doubts(
        source, fields, vocabulary, loaded
    )


def _doubts(source: TokenizerSource, fields: dict[str, Any], vocabulary: dict[int, str], loaded: Any) -> list[str]:
    """Signs of a tokenizer that is another model's, each of which some real model shows."""
    doubts = []
    spare = fields["vocab_size"] - 1 - max(vocabulary)
    if spare > max(1024, fields["vocab_size"] // 20):
        size = fields["vocab_size"]
        doubts.append(f"the model embeds {size} tokens, the tokenizer in {source.path} has {len(vocabulary)}")
    ends = fields.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    if ends != [None] and loaded.eos_token_id not in ends:
        doubts.append(
            f"the tokenizer in {source.path} ends texts with id {loaded.eos_token_id} ({loaded.eos_token}), the "
            f"model's config with {', '.join(map(str, ends))}"
        )
    return doubts
