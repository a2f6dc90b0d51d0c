"""One process's part of a scoring: the reference in memory, and the scores of shards of rows written with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from wmtp_ds.data.batches import Collator
from wmtp_ds.data.groups import Rows
from wmtp_ds.data.index import DataIndex, build_index
from wmtp_ds.data.loader import read_pairs
from wmtp_ds.data.templates import get_template
from wmtp_ds.data.token_cache import TokenCache, open_token_cache
from wmtp_ds.errors import UserError
from wmtp_ds.files import replace_file, sha256_of
from wmtp_ds.models.loading import load_policy, load_tokenizer
from wmtp_ds.models.reference import ReferenceModel
from wmtp_ds.scores.manifest import Settings, Shard
from wmtp_ds.scores.reader import Losses


@dataclass(frozen=True)
class Work:
    """What processes need to know.

    Attributes:
        inputs: the data files.
        output: where scores go.
        reference, tokenizer: model folders.
        settings: what decides the scores.
        batch_size: rows of one forward pass.
        device: "cuda" or "cpu".
        cache_dir: where the data's tokens are kept; None for nowhere.
    """

    inputs: tuple[Path, ...]
    output: Path
    reference: Path
    tokenizer: Path
    settings: Settings
    batch_size: int
    device: str
    cache_dir: Path | None


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one input, whose scores make one file."""

    name: str
    source: int
    first: int
    rows: int
    tokens: int


class Data:
    """The rows of one input as token ids."""

    def __init__(self, work: Work, source: Path, tokenizer: object):
        settings = work.settings
        self.index: DataIndex = build_index(source)
        self.collator = Collator(tokenizer, get_template(settings.template), settings.max_length)
        encoder, template = self.collator.encoder, self.collator.template
        self.cache: TokenCache | None = open_token_cache(self.index, encoder, template, work.cache_dir)
        self._correct_only = settings.correct_only

    def read(self, rows: range) -> list[tuple[Rows, int]]:
        """Each row's sequence, and how many of its last tokens are scored: none of a row that is left out."""
        pairs, labels = read_pairs(self.index, self.collator, np.arange(rows.start, rows.stop), self.cache)
        found = [self.collator.sequence(*pair) for pair in pairs]
        wanted = labels | np.bool_(not self._correct_only)
        return [(tokens, count if keep else 0) for (tokens, count), keep in zip(found, wanted, strict=True)]


class Scorer:
    """The reference on one device."""

    def __init__(self, work: Work, device: torch.device):
        self._work, self._device = work, device
        tokenizer = load_tokenizer(work.tokenizer)
        self._data = [Data(work, source, tokenizer) for source in work.inputs]
        dtype = getattr(torch, work.settings.compute_dtype)
        self._model = ReferenceModel(load_policy(work.reference, dtype=dtype, n_future_tokens=1)).eval()
        torch.nn.Module.to(self._model, device)

    def write(self, piece: Piece, on_done: Callable[[int], None] = lambda count: None) -> Shard:
        """Score a piece's rows and write its file, which has its name when it is whole.

        Args:
            piece: which rows.
            on_done: called with how many of them are done since the last call.

        Raises:
            UserError: a loss is not finite; names the row.
            OSError: it cannot be written.
        """
        losses = self.score(piece, on_done)
        path = self._work.output / piece.name
        partial = path.with_name(f".partial-{path.name}")
        with partial.open("wb") as stream:
            np.save(stream, losses, allow_pickle=False)
        replace_file(partial, path)
        return Shard(
            name=piece.name,
            size=path.stat().st_size,
            sha256=sha256_of(path),
            rows=piece.rows,
            tokens=len(losses),
            loss=float(losses.sum(dtype=np.float64)),
        )

    def score(self, piece: Piece, on_done: Callable[[int], None]) -> np.ndarray:
        """The scores of a piece's rows, one row after another, in the dtype they are kept in: [tokens]."""
        data, size = self._data[piece.source], self._work.batch_size
        rows = range(piece.first, piece.first + piece.rows)
        sequences = data.read(rows)
        scored = [place for place, (_, count) in enumerate(sequences) if count]
        # Those of alike lengths share a batch, so that little is padding; the longest first: what does not fit the
        # memory shows at once.
        scored.sort(key=lambda place: (-len(sequences[place][0]), place))
        found: dict[int, Losses] = {}
        on_done(len(rows) - len(scored))
        for start in range(0, len(scored), size):
            places = scored[start : start + size]
            for place, losses in zip(places, self._losses(data, [sequences[place] for place in places]), strict=True):
                with np.errstate(over="ignore"):  # which is seen below
                    kept = losses.astype(self._work.settings.dtype)
                if not np.isfinite(kept).all():
                    raise UserError(_not_finite(data.index.where(rows[place]), losses, self._work.settings))
                found[place] = kept
            on_done(len(places))
        ordered = [found[place] for place in sorted(found)]
        return np.concatenate(ordered) if ordered else np.zeros(0, self._work.settings.dtype)

    def _losses(self, data: Data, sequences: Sequence[tuple[Rows, int]]) -> list[Losses]:
        batch = data.collator.join(sequences, [True] * len(sequences), range(len(sequences)))
        with torch.no_grad():
            losses_BS = self._model(batch.to(self._device)).float().cpu().numpy()
        return [losses_BS[b, len(tokens) - count : len(tokens)] for b, (tokens, count) in enumerate(sequences)]


def _not_finite(where: str, losses: Losses, settings: Settings) -> str:
    wrong = losses[~np.isfinite(losses)]
    if len(wrong):
        return (
            f"--reference: the loss of a token of {where} is {wrong[0]}: the weights are damaged, or --compute-dtype "
            f"{settings.compute_dtype} is too narrow for them: try bfloat16 or float32"
        )
    return f"--dtype float16: the loss of a token of {where} is {losses.max():g}, beyond its range: take float32"


def device_of(kind: str, number: int) -> torch.device:
    """The device of a process, by its number: GPUs are dealt round."""
    return torch.device("cuda", number % torch.cuda.device_count()) if kind == "cuda" else torch.device("cpu")
