"""Selections that no model makes: reference scores of `wmtp-ds data score` with other numbers in them."""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import corpora
import numpy as np
from commands import run
from runs import Run

from wmtp_ds.config import load_config
from wmtp_ds.files import sha256_of
from wmtp_ds.scores.manifest import read_manifest


def score(reference: Run, files: corpora.Files) -> Path:
    """A reference's scores of a training set, for the runs of `rho1`."""
    size = reference.size
    config = load_config(size.config("rho1"), [f"dataset.train={files.train}"], checks=False).config
    folder = size.folder / "scores" / f"{files.train.stem}-{reference.name}"
    run(
        f"wmtp-ds data score --reference {reference.model} --input {files.train} --output {folder} --force "
        f"--max-length {config.dataset.max_length} --template {config.dataset.template} "
        f"--compute-dtype {config.reference_dtype} --device {size.device}"
    )
    return folder


def by_lot(scored: Path, name: str, marked: Sequence[Sequence[bool]], seed: int) -> dict[str, object]:
    """Settings that let `rho1` select by lot, but what is marked only when there is nothing else.

    Args:
        scored: scores of the training set, that only lend their form.
        name: of the new ones.
        marked: of each supervised token of each row.
        seed: of the lot.
    """
    rng = random.Random(seed)
    values = [[rng.random() + (not one) for one in row] for row in marked]
    folder = with_other_scores(scored, scored.with_name(f"{scored.name}-{name}-{seed}"), values)
    return {"training.excess": "reference", "models.reference.scores": folder}


def with_other_scores(scored: Path, folder: Path, values: Sequence[Sequence[float]]) -> Path:
    """The same scores with other numbers: one for each supervised token of each row, the end token last.

    Args:
        scored: the folder of the scores of a single data file.
        folder: of the new ones.
        values: of each row of that file; those of rows that were not scored are left out.
    """
    manifest = read_manifest(scored)
    [own] = manifest.inputs
    ends = np.load(scored / own.index.name)[:, 0]
    counts = np.diff(ends, prepend=0)
    kept = [row for row, count in zip(values, counts, strict=True) if count]
    assert [len(row) for row in kept] == counts[counts > 0].tolist(), "one number for each scored token"
    numbers = np.concatenate([np.asarray(row, manifest.settings.dtype) for row in kept])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(scored / own.index.name, folder / own.index.name)
    shards, begin = [], 0
    for shard in own.shards:
        part = numbers[begin : begin + shard.tokens]
        begin += shard.tokens
        np.save(folder / shard.name, part)
        digest = sha256_of(folder / shard.name)
        shards.append(shard.model_copy(update={"sha256": digest, "loss": float(part.sum(dtype=np.float64))}))
    changed = own.model_copy(update={"shards": tuple(shards)})
    manifest.model_copy(update={"inputs": (changed,)}).write(folder)
    return folder
