"""A tokenizer.json without the library: what each id means, and a fingerprint of that."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmtp_ds.errors import UserError
from wmtp_ds.files import read_json


def read_vocabulary(file: Path) -> dict[int, str]:
    """The token of each id in a tokenizer.json, added tokens included.

    Raises:
        UserError: if the file is missing or damaged, or holds no vocabulary.
    """
    try:
        content = read_json(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing. Copy the tokenizer again.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}. Copy the tokenizer again.") from None
    tokens = vocabulary_of(content)
    if not tokens:
        raise UserError(f"{file} holds no vocabulary. Copy the tokenizer again.")
    return tokens


def vocabulary_of(content: Any) -> dict[int, str]:
    """The token of each id in the content of a tokenizer.json; empty if it has none."""
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of the ids
            tokens = {index: str(entry[0]) for index, entry in enumerate(vocabulary)}
        else:
            tokens = {int(index): str(token) for token, index in vocabulary.items()}
        for entry in content.get("added_tokens") or ():
            tokens[int(entry["id"])] = str(entry["content"])
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, IndexError):
        return {}
    return tokens


def tokenizer_fingerprint(tokens: Mapping[int, str]) -> str:
    """SHA-256 (hex) of what each id means: ``id NUL token NUL`` in UTF-8, in the order of the ids.

    Two models whose tokenizers agree in it give the same meaning to the same ids.
    """
    digest = hashlib.sha256()
    for number, token in sorted(tokens.items()):
        digest.update(f"{number}\0{token}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
