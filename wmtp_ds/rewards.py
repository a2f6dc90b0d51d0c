"""Rewards of solutions from a reward model: each solution that a run reads is scored once, before training.

The scores of a frozen model are constants. They are computed by all ranks together, in an engine of its own that is
gone before the policy is loaded, and kept beside the data's tokens, so that another run over the same rows, or a
resume, need not compute them again.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wmtp_ds import distributed
from wmtp_ds.assembly import build_reward
from wmtp_ds.config import Resolved
from wmtp_ds.data.index import DataIndex
from wmtp_ds.data.templates import get_template
from wmtp_ds.errors import UserError
from wmtp_ds.files import open_file
from wmtp_ds.models.config_file import model_key
from wmtp_ds.models.loading import load_tokenizer
from wmtp_ds.models.reward import RewardEncoder, padded
from wmtp_ds.reward_values import Scores, Squash, stored_score
from wmtp_ds.run_data import RunData

logger = logging.getLogger("wmtp_ds")

# (input_ids [B, S], lengths [B], pad_id) -> [B]
Scorer = Callable[[Tensor, Tensor, int], Tensor]


def score_rows(
    scorer: Scorer,
    encoder: RewardEncoder,
    index: DataIndex,
    row_ids: Sequence[int] | npt.NDArray[np.int64],
    *,
    batch_size: int,
    vocabulary: int,
    device: torch.device,
    on_done: Callable[[int], None] = lambda count: None,
) -> Scores:
    """The score of each row, by all ranks together; each calls this with the same rows and gets all scores.

    Args:
        scorer: the reward model, perhaps in an engine whose forward is a collective.
        encoder: rows to tokens.
        index: the data file.
        row_ids: which rows.
        batch_size: sequences of one forward pass.
        vocabulary: tokens that the model embeds.
        device: where the model is.
        on_done: called with how many rows were scored since the last call, by all ranks.

    Raises:
        UserError: if a score is not finite; names the row.
    """
    # Long ones first: what does not fit the memory shows at once. Alike lengths share a batch.
    order = np.asarray(row_ids, np.int64)
    order = order[np.argsort(-index.output_bytes[order], kind="stable")]
    rank, world = distributed.rank(), distributed.world_size()
    scores_R = torch.zeros(len(order), dtype=torch.float64)
    for start in range(0, len(order), batch_size * world):  # as many passes on every rank
        mine = slice(start + rank * batch_size, min(start + (rank + 1) * batch_size, len(order)))
        sequences = [encoder(index.read_row(int(row))) for row in order[mine]] or [[0]]
        input_ids_BS, lengths_B, pad_id = padded(sequences, vocabulary)
        with torch.no_grad():
            found_B = scorer(input_ids_BS.to(device), lengths_B.to(device), pad_id)
        count = len(order[mine])
        scores_R[mine] = found_B[:count].double().cpu()
        on_done(min(start + batch_size * world, len(order)) - start)
    scores_R = distributed.sum_over_ranks(scores_R.to(device)).cpu()
    wrong = (~scores_R.isfinite()).nonzero().flatten()
    if len(wrong):
        line, score = index.line[order[int(wrong[0])]], scores_R[wrong[0]].item()
        raise UserError(
            f"models.reward.path: the reward model's score of {index.path}:{line} is {score}. "
            "Its weights are damaged, or models.reward.dtype is too narrow for it: try bfloat16 or float32."
        )
    places = np.empty(len(index), np.int64)
    places[order] = np.arange(len(order))
    result: Scores = scores_R.numpy()[places[np.asarray(row_ids, np.int64)]].astype(np.float32)
    return result


class ScoreCache:
    """Scores of a data file's rows, kept in a file: float32 ``[rows]``, NaN where a row was never scored.

    Args:
        folder: made if need be.
        parts: everything that scores depend on.
        rows: of the data file.
    """

    def __init__(self, folder: Path, parts: Sequence[object], rows: int):
        key = hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:24]
        self.path, self.rows = folder / f"rewards-{key}.npy", rows

    def load(self) -> Scores:
        """What is known; all NaN if there is no file, or it is damaged."""
        try:
            with open_file(self.path) as file:
                scores = np.load(file, allow_pickle=False)
        except Exception:  # a damaged header makes of numpy what it likes
            return np.full(self.rows, np.nan, np.float32)
        fits = isinstance(scores, np.ndarray) and scores.dtype == np.float32 and scores.shape == (self.rows,)
        return scores if fits else np.full(self.rows, np.nan, np.float32)

    def store(self, scores: Scores) -> None:
        """Keep them; a folder that cannot be written costs time in the next run, and nothing else."""
        partial = self.path.with_name(f".partial-{self.path.name}-{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as stream:
                np.save(stream, scores, allow_pickle=False)
            partial.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()


def fill_rewards(resolved: Resolved, data: RunData, device: torch.device) -> None:
    """Give the run's batches their rewards, where ``models.reward`` asks for others than is_correct. Collective.

    Raises:
        UserError: if the reward model cannot be loaded, a score is not finite, or a row lacks one.
    """
    config = resolved.config
    source = config.models.reward.source
    if not config.training.uses_rewards or source == "is_correct":
        return
    rows = data.train_rows()
    files = [(data.train, rows), (data.validation, data.validation_rows)]
    if source == "scores":
        scores = [stored_scores(index, wanted) for index, wanted in files]
    else:
        scores = _scores_of_model(resolved, files, device)
    squash = Squash.of(config.models.reward.squash, scores[0])
    for collator, (index, wanted), found in zip((data.collator, data.validation_collator), files, scores, strict=True):
        collator.rewards = np.full(len(index), np.nan, np.float32)  # seen at once if a row is read that nobody scored
        collator.rewards[wanted] = squash(found)


def _scores_of_model(
    resolved: Resolved, files: list[tuple[DataIndex, npt.NDArray[np.int64]]], device: torch.device
) -> list[Scores]:
    """The reward model's scores of the wanted rows of each file; those that no earlier run has kept are computed."""
    config = resolved.config
    folder = config.models.reward.path
    assert folder is not None
    parts = (model_key(folder), config.models.reward.dtype, config.dataset.template, config.dataset.max_length)
    cache_dir = Path(config.dataset.cache_dir or config.checkpoint.save_dir).expanduser()
    caches = [ScoreCache(cache_dir, (index.fingerprint, *parts), len(index)) for index, _ in files]
    # Rank 0's view: what one rank finds in its files, another might not.
    known: list[Scores] = distributed.broadcast_object([cache.load() for cache in caches])
    missing = [wanted[np.isnan(scores[wanted])] for (_, wanted), scores in zip(files, known, strict=True)]
    if any(map(len, missing)):
        encoder = RewardEncoder(
            load_tokenizer(folder), get_template(config.dataset.template), config.dataset.max_length
        )
        if distributed.is_main():
            logger.info("%s scores %d solutions", folder, sum(map(len, missing)))
        engine = build_reward(resolved)
        try:
            for (index, _), scores, rows in zip(files, known, missing, strict=True):
                scores[rows] = score_rows(
                    engine, encoder, index, rows, batch_size=config.training.batch_size,
                    vocabulary=engine.module.vocabulary, device=device,
                )  # fmt: skip
        finally:
            engine.close()
        if distributed.is_main():
            for cache, scores in zip(caches, known, strict=True):
                cache.store(scores)
    return [scores[wanted] for (_, wanted), scores in zip(files, known, strict=True)]


def stored_scores(index: DataIndex, row_ids: Sequence[int] | npt.NDArray[np.int64]) -> Scores:
    """The scores that rows carry in their metadata, as ``wmtp-ds data label --reward-model`` writes them.

    Raises:
        UserError: if a row has none, or one that is no finite number; names the line.
    """
    scores = np.empty(len(row_ids), np.float32)
    for place, row in enumerate(row_ids):
        scores[place] = stored_score(index.read_row(int(row)), f"{index.path}:{index.line[int(row)]}")
    return scores
