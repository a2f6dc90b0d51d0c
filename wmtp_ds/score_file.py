"""Writes a reward model's scores into a data file, once, so that no run has to load that model.

As with labels, two passes: scores are entered in a journal in the rows' order, so that the same command goes on after
a kill; then file and journal are read side by side and the scored file is written.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wmtp_ds.data.index import DataIndex, build_index
from wmtp_ds.data.label_file_journal import Journal
from wmtp_ds.data.rows import decode_object, read_lines
from wmtp_ds.data.templates import get_template
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.files import open_file, replace_file, sha256_of
from wmtp_ds.models.config_file import model_key
from wmtp_ds.models.loading import load_tokenizer
from wmtp_ds.models.reward import RewardEncoder, load_reward_model
from wmtp_ds.reward_values import SCORE_KEY
from wmtp_ds.rewards import score_rows

_BATCHES_AT_ONCE = 32  # among the rows of so many, those of alike lengths share a batch


def score_file(
    source: Path,
    output: Path,
    model: Path,
    *,
    dtype: str = "float32",
    template: str = "alpaca",
    max_length: int = 2048,
    batch_size: int = 8,
    force: bool = False,
    on_start: Callable[[int], None] = lambda total: None,
    on_done: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Write ``output``: the rows of ``source`` with ``metadata.reward_score``, the score before any squashing.

    Args:
        source: a data file.
        output: the scored file; its name appears when it is complete.
        model: folder of a sequence classifier with one label.
        dtype: what it computes in.
        template: of the prompt, for a tokenizer without a chat template.
        max_length: tokens of a solution with its prompt; longer ones lose their left.
        batch_size: solutions of one forward pass.
        force: replace an output that is there.
        on_start: called with the number of rows before they are scored.
        on_done: called with how many are done since the last call.

    Returns:
        Counts, and mean, standard deviation and range of the scores, of all rows, correct and incorrect ones.

    Raises:
        UserError: the input or the model is not what it should be, or the output is there or cannot be written.
        RunError: if writing fails.
    """
    if output.exists() and (output.is_dir() or output.samefile(source)):
        raise UserError(f"{output}: is {'a folder' if output.is_dir() else 'the input'}: give --output another file")
    if output.exists() and not force:
        raise UserError(f"{output}: exists: give another --output, or --force to replace it")
    index = build_index(source)
    if not model.is_dir():
        raise UserError(f"--reward-model: {model} does not exist: name the folder of a reward model")
    key = model_key(model)
    made_from = {
        "command": "data label --reward-model",
        "input": index.fingerprint,
        "model": key,
        "options": [dtype, template, max_length],
    }
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with Journal(output, made_from, _is_score) as journal:
            if journal.entries > len(index):
                raise UserError(f"{journal.path}: holds more than the {len(index)} rows of {source}: delete it")
            on_start(len(index))
            on_done(journal.entries)
            if journal.entries < len(index):
                encoder = RewardEncoder(load_tokenizer(model), get_template(template), max_length)
                _score(index, model, getattr(torch, dtype), encoder, batch_size, journal, on_done)
            scores = np.array([entry["score"] for entry in journal], np.float64)
            _write(source, output, scores, key)
            journal.remove()
    except OSError as error:
        raise RunError(
            f"{output}: could not be written: {error.strerror}. Mend that; the same command goes on"
        ) from None
    return {
        "rows": len(index),
        "sha256": sha256_of(output),
        "all": _summary(scores),
        "correct": _summary(scores[index.is_correct]),
        "incorrect": _summary(scores[~index.is_correct]),
    }


def _score(
    index: DataIndex,
    folder: Path,
    dtype: torch.dtype,
    encoder: RewardEncoder,
    batch_size: int,
    journal: Journal,
    on_done: Callable[[int], None],
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_reward_model(folder, dtype=dtype).to(device)
    for start in range(journal.entries, len(index), batch_size * _BATCHES_AT_ONCE):
        rows = range(start, min(start + batch_size * _BATCHES_AT_ONCE, len(index)))
        scores = score_rows(
            model, encoder, index, rows, batch_size=batch_size, vocabulary=model.vocabulary, device=device,
            on_done=on_done,
        )  # fmt: skip
        for score in scores.tolist():
            journal.append({"score": score})


def _write(source: Path, output: Path, scores: np.ndarray, key: str) -> None:
    partial = output.with_name(f".partial-{output.name}")
    remaining = iter(scores.tolist())
    changed = RunError(f"{source}: has changed while it was being scored: run the same command again")
    with open_file(source) as handle, partial.open("w", encoding="utf-8") as file:
        for _, number, line in read_lines(handle, source):
            if not line.strip():
                continue
            row = decode_object(line, f"{source}:{number}")
            if (score := next(remaining, None)) is None:
                raise changed
            row["metadata"] = (row.get("metadata") or {}) | {SCORE_KEY: score, "reward_model": key}
            file.write(json.dumps(row) + "\n")  # ASCII: half a surrogate pair can be escaped, not encoded
    if next(remaining, None) is not None:
        raise changed
    replace_file(partial, output)


def _is_score(entry: dict[str, Any]) -> bool:
    return isinstance(entry.get("score"), int | float)


def _summary(scores: np.ndarray) -> dict[str, float] | None:
    if not len(scores):
        return None
    return {
        "mean": float(scores.mean()),
        "std": float(scores.std()),
        "min": float(scores.min()),
        "max": float(scores.max()),
    }
