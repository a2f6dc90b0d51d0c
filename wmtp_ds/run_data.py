"""The data of a run: which rows each optimizer step reads, and the batches made of them."""

import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_ds.config import Resolved
from wmtp_ds.data.batches import Batch, Collator, eligible_rows, validation_batches
from wmtp_ds.data.evaluation_only import refuse_evaluation_rows
from wmtp_ds.data.index import DataIndex, build_index
from wmtp_ds.data.loader import Ranks, load_batch, load_packed, load_windows
from wmtp_ds.data.sampling import SamplePlan, count_steps, epoch_size, sample_plan
from wmtp_ds.data.templates import get_template
from wmtp_ds.data.token_cache import TokenCache, open_token_cache
from wmtp_ds.errors import UserError
from wmtp_ds.launch import resolve_device
from wmtp_ds.models.loading import load_tokenizer
from wmtp_ds.scores.reader import ReferenceScores

# Rows of an attention mask begin at multiples of this many elements, or torch's kernel copies the mask in each block.
MASK_ALIGNMENT = 16


@dataclass
class RunData:
    """Training windows and validation batches of one rank. Made before the process group forms."""

    resolved: Resolved
    tokenizer: Any
    train: DataIndex
    validation: DataIndex
    plan: SamplePlan
    collator: Collator
    validation_collator: Collator
    validation_rows: np.ndarray
    too_long: int
    train_tokens: TokenCache | None
    validation_tokens: TokenCache | None
    scores: ReferenceScores | None = None  # of the reference model, if they were computed beforehand

    def train_rows(self) -> np.ndarray:
        """The rows that the run draws, each once, in the file's order: int64."""
        drawn = np.zeros(len(self.train), np.bool_)
        for step in range(self.total_steps):
            drawn[self.plan.rows(step)] = True
        return np.flatnonzero(drawn)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.plan.total_steps

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of one epoch, which need not be whole."""
        return self.plan.epoch_rows / self.plan.global_batch

    def windows(self, start: int, rank: int, world_size: int) -> Generator[list[Batch], None, None]:
        """This rank's micro-batches of each optimizer step from ``start`` on."""
        training = self.resolved.config.training
        return load_windows(
            self.train,
            self.plan,
            self.collator,
            rank=rank,
            world_size=world_size,
            batch_size=training.batch_size,
            accumulation=training.gradient_accumulation_steps,
            start=start,
            cache=self.train_tokens,
            packed=self.resolved.config.data_sampling.pack_sequences,
        )

    def validation_batches(self, rank: int, world_size: int) -> list[Batch]:
        """This rank's share of the validation rows; as many batches on every rank."""
        size = self.resolved.config.training.batch_size
        data = self.validation, self.validation_collator
        if self.resolved.config.data_sampling.pack_sequences:
            return load_packed(*data, self.validation_rows, self.validation_tokens, Ranks(rank, world_size, size))
        shares = validation_batches(self.validation_rows, rank, world_size, size)
        return [load_batch(*data, rows, self.validation_tokens) for rows in shares]


def open_data(resolved: Resolved, world_size: int) -> RunData:
    """Index the data, check that it has what the stage needs, and plan every draw of the run.

    Raises:
        UserError: for malformed or empty data, or rows of a kind that is needed and not there.
    """
    config = resolved.config
    tokenizer = load_tokenizer(Path(config.models.policy.tokenizer_path))
    train = build_index(Path(config.dataset.train))
    if not config.dataset.allow_evaluation_data:
        refuse_evaluation_rows(config.dataset.train)
    validation = build_index(Path(config.dataset.validation))
    on_gpu = resolve_device(config.runtime.device) == "cuda"
    collator, validation_collator = (
        Collator(
            tokenizer,
            get_template(config.dataset.template),
            config.dataset.max_length,
            pad_to_multiple_of=MASK_ALIGNMENT if config.data_sampling.pack_sequences and on_gpu else 1,
        )
        for _ in range(2)
    )
    cache_dir = Path(config.dataset.cache_dir).expanduser() if config.dataset.cache_dir else None
    tokens, validation_tokens = (
        open_token_cache(index, collator.encoder, collator.template, cache_dir) for index in (train, validation)
    )
    eligible, too_long = eligible_rows(train, tokenizer, config.dataset.max_length, tokens)
    training = config.training
    global_batch = training.batch_size * training.gradient_accumulation_steps * world_size
    steps = count_steps(
        training.n_epochs, epoch_size(train, config.data_sampling, eligible), global_batch, training.max_steps
    )
    plan = sample_plan(train, config.data_sampling, total_steps=steps, global_batch=global_batch, eligible=eligible)
    fits, _ = eligible_rows(validation, tokenizer, config.dataset.max_length, validation_tokens)
    # Validation loss is over correct solutions; a value head is judged on incorrect ones, too.
    wanted = fits if training.has_value_head else fits & validation.is_correct
    rows = np.flatnonzero(wanted)
    if not len(rows):
        kind = "solution" if training.has_value_head else "correct solution"
        raise UserError(
            f"dataset.validation: {config.dataset.validation} has no {kind} of at most {config.dataset.max_length} "
            "tokens (dataset.max_length). Add some, or raise the limit."
        )
    return RunData(
        resolved,
        tokenizer,
        train,
        validation,
        plan,
        collator,
        validation_collator,
        rows,
        too_long,
        tokens,
        validation_tokens,
    )


def world_size_from_launcher() -> int:
    """The number of ranks that the launcher has announced, known before the process group forms."""
    return int(os.environ.get("WORLD_SIZE", "1"))
