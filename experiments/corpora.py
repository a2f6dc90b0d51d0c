"""The data of the experiments: generated problems with solutions that were run, and a corpus with corrupted tokens."""

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
from wmtp_ds.files import write_atomically
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
    """Correct and incorrect solutions, half and half, of the problems that a size uses."""
    whole, own = size.folder / "data/all", size.folder / "data/problems"
    run(f"wmtp-ds data sample --problems {size.problems} --output {whole}")
    lowest, highest = size.difficulties
    for name in ("train", "validation"):
        rows = [row for row in read_rows(whole / f"{name}.jsonl") if lowest <= row["difficulty"] <= highest]
        write_rows(own / f"{name}.jsonl", rows)
    return Files(own / "train.jsonl", own / "validation.jsonl")


def held_out(size: Size, files: Files) -> Path:
    """The rows of as many held-out problems as are solved for pass@1."""
    rows = read_rows(files.validation)
    chosen = list(dict.fromkeys(row["problem_id"] for row in rows))[: size.evaluated]
    file = size.folder / "data/held_out.jsonl"
    write_rows(file, [row for row in rows if row["problem_id"] in set(chosen)])
    return file


def halves(size: Size, files: Files) -> tuple[Files, Files]:
    """Correct solutions alone, their problems in two halves: for a reference model, and for what learns beside it."""
    rows = [row for row in read_rows(files.train) if row["is_correct"]]
    held = [row for row in read_rows(files.validation) if row["is_correct"]]
    chosen = list(dict.fromkeys(row["problem_id"] for row in rows))[::2]
    folder = size.folder / "data/halves"
    write_rows(folder / "reference.jsonl", [row for row in rows if row["problem_id"] in set(chosen)])
    write_rows(folder / "policy.jsonl", [row for row in rows if row["problem_id"] not in set(chosen)])
    write_rows(folder / "validation.jsonl", held)
    return (
        Files(folder / "reference.jsonl", folder / "validation.jsonl"),
        Files(folder / "policy.jsonl", folder / "validation.jsonl"),
    )


def corrupted(files: Files, tokenizer: PreTrainedTokenizerBase, share: float) -> Files:
    """The same rows with a share of their solutions' tokens replaced at random; the validation rows stay clean."""
    if not share:
        return files
    encoder = TextEncoder(tokenizer)
    rng = random.Random(0)
    # Whole characters only: half of one would not survive being written as text.
    texts = [tokenizer.decode([number]) for number in range(len(tokenizer))]
    pieces = [text for text in texts if text and text.isascii() and text not in tokenizer.all_special_tokens]
    rows = []
    for row in read_rows(files.train):
        tokens = [row["output"][begin:end] for begin, end in encoder.spans(row["output"])]
        output = "".join(rng.choice(pieces) if rng.random() < share else token for token in tokens)
        rows.append(row | {"output": output})
    file = files.train.with_name(f"{files.train.stem}-corrupted-{round(100 * share)}.jsonl")
    write_rows(file, rows)
    return Files(file, files.validation)


def policy(size: Size, files: Files, seed: int, heads: int) -> Path:
    """A random policy whose tokenizer has learned from ``files``; made once."""
    folder = size.folder / f"models/{heads}-heads-seed-{seed}"
    if not (folder / "policy/trunk_fingerprint.json").exists():
        make_micro_models(
            data=files.train,
            policy=folder / "policy",
            reference=folder / "unused",
            template=TEMPLATE,
            vocab_size=size.vocab_size,
            n_future_tokens=heads,
            hidden_size=size.hidden_size,
            trunk_layers=size.trunk_layers,
            seed=seed,
        )
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
