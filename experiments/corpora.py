"""The data of the experiments: generated problems with solutions that were run, and a corpus with corrupted tokens."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import run
from sizes import Size
from transformers import PreTrainedTokenizerBase

from wmtp_ds.data.text_encoder import TextEncoder
from wmtp_ds.files import sha256_of, write_atomically
from wmtp_ds.models.loading import load_tokenizer
from wmtp_ds.models.micro import make_micro_models

TEMPLATE = "plain"


@dataclass(frozen=True)
class Files:
    """A training set and rows of other problems."""

    train: Path
    validation: Path

    def settings(self) -> dict[str, object]:
        """The keys of a config that name them."""
        return {"dataset.train": self.train, "dataset.validation": self.validation}


def problems(size: Size) -> Files:
    """Right and wrong solutions of the problems that a size uses; prompts without an example."""
    whole, own = size.folder / "data/all", size.folder / "data/problems"
    if size.problems:
        run(f"wmtp-ds data sample --problems {size.problems} --output {whole}")
    else:
        run(f"wmtp-ds data import mbpp --input {size.mbpp} --output {whole}")
    lowest, highest = size.difficulties
    for name in ("train", "validation"):
        rows = [row for row in read_rows(whole / f"{name}.jsonl") if lowest <= row["difficulty"] <= highest]
        write_rows(own / f"{name}.jsonl", [row | {"input": ""} for row in rows])
    return Files(own / "train.jsonl", own / "validation.jsonl")


def held_out(size: Size, files: Files) -> Path:
    """The rows of as many held-out problems as are solved for pass@1."""
    rows = read_rows(files.validation)
    chosen = list(dict.fromkeys(row["problem_id"] for row in rows))[: size.evaluated]
    file = files.validation.with_name("held_out.jsonl")
    write_rows(file, [row for row in rows if row["problem_id"] in set(chosen)])
    return file


def halves(files: Files, *, correct_only: bool = False) -> tuple[Files, Files]:
    """The training problems in two halves, by a hash of their ids; the held-out ones are the same for both.

    With right solutions only, each held-out problem has one: enough to measure a loss a dozen times a run.
    """
    name = "right" if correct_only else "both"
    found = []
    validation = files.validation.with_name(f"validation-{name}.jsonl")
    held_out = _kept(files.validation, correct_only)
    if correct_only:
        held_out = list({row["problem_id"]: row for row in held_out}.values())
    write_rows(validation, held_out)
    for half in (0, 1):
        rows = [row for row in _kept(files.train, correct_only) if _half(row["problem_id"]) == half]
        train = files.train.with_name(f"half-{half}-{name}.jsonl")
        write_rows(train, rows)
        found.append(Files(train, validation))
    return found[0], found[1]


def _kept(file: Path, correct_only: bool) -> list[dict[str, Any]]:
    return [row for row in read_rows(file) if row["is_correct"] or not correct_only]


def _half(problem_id: str) -> int:
    return hashlib.sha256(problem_id.encode()).digest()[0] % 2


def corrupted(files: Files, tokenizer: PreTrainedTokenizerBase, share: float) -> Files:
    """The same rows with a share of their solutions' tokens replaced at random; the validation rows stay clean.

    What is replaced is text again, whose tokens may be others: `intact` says how many are still what they were. Each
    row's ``metadata.spoilt`` has the places ``[begin, end)`` of what was put in, in characters.
    """
    if not share:
        return files
    encoder = TextEncoder(tokenizer)
    rng = random.Random(0)
    # Whole characters only: half of one would not survive being written as text.
    texts: list[str] = [tokenizer.decode([number]) for number in range(len(tokenizer))]  # type: ignore[misc]
    pieces = [text for text in texts if text and text.isascii() and text not in tokenizer.all_special_tokens]
    rows = []
    for row in read_rows(files.train):
        output, spoilt = "", []
        for begin, end in encoder.spans(row["output"]):
            replaced = rng.random() < share
            token = rng.choice(pieces) if replaced else row["output"][begin:end]
            if replaced:
                spoilt.append([len(output), len(output) + len(token)])
            output += token
        rows.append(row | {"output": output, "metadata": row.get("metadata", {}) | {"spoilt": spoilt}})
    file = files.train.with_name(f"{files.train.stem}-corrupted-{round(100 * share)}.jsonl")
    write_rows(file, rows)
    return Files(file, files.validation)


def marks(files: Files, tokenizer: PreTrainedTokenizerBase) -> list[list[bool]]:
    """Of each token of each training row's solution, the end token last: whether it holds any of what was put in."""
    encoder = TextEncoder(tokenizer)
    found = []
    for row in read_rows(files.train):
        spoilt = row.get("metadata", {}).get("spoilt", [])
        spans = encoder.spans(row["output"])
        found.append([any(begin < last and first < end for first, last in spoilt) for begin, end in spans] + [False])
    return found


def intact(files: Files, tokenizer: PreTrainedTokenizerBase) -> float:
    """The share of a training set's solution tokens that hold nothing of what was put in."""
    found = [spoilt for own in marks(files, tokenizer) for spoilt in own[:-1]]
    return 1 - sum(found) / len(found)


def policy(size: Size, files: Files, seed: int, heads: int) -> Path:
    """A random policy, made once; all models of a size have the tokenizer that its training problems teach.

    Args:
        size: of the model.
        files: of `problems`, whatever part of them it is to learn from.
        seed: of the weights.
        heads: how many.
    """
    making: dict[str, Any] = {
        "template": TEMPLATE,
        "vocab_size": size.vocab_size,
        "n_future_tokens": heads,
        "hidden_size": size.hidden_size,
        "trunk_layers": size.trunk_layers,
        "seed": seed,
    }
    key = hashlib.sha256(json.dumps([making, sha256_of(files.train)]).encode()).hexdigest()[:8]
    folder = size.folder / f"models/{heads}-heads-seed-{seed}-{key}"
    if not (folder / "policy/trunk_fingerprint.json").exists():
        make_micro_models(data=files.train, policy=folder / "policy", reference=folder / "unused", **making)
    return folder / "policy"


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder."""
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
    return tokenizer


def read_rows(file: Path) -> list[dict[str, Any]]:
    """All rows of a data file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A data file, unless it is there already and the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(_lines(rows))
    if not file.exists() or file.read_text() != text:
        write_atomically(file, text)


def _lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield json.dumps(row, ensure_ascii=False) + "\n"
