"""What a stage weighs while it trains: at every evaluation a page, of the same solutions each time."""

import json
import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wmtp_ds import distributed
from wmtp_ds.data.loader import load_batch
from wmtp_ds.engine import Engine, FrozenEngine
from wmtp_ds.look.columns import Solution, tokens_of
from wmtp_ds.look.page import render
from wmtp_ds.look.statistics import histogram, main_column, summary
from wmtp_ds.run_data import RunData

FOLDER = "weights"
_SHORT = 1500  # bytes: a longer solution makes a page that nobody reads

logger = logging.getLogger(__name__)


class WeightPages:
    """Pages ``weights/step_….html`` in a run's folder, with the histogram's counts beside each as JSON.

    Every rank looks at one micro-batch of validation rows, the same ones each time; the histogram is over all of them,
    and the first one is shown, shaded token by token. Groups that a stage forms of a micro-batch, and constants of a
    global batch, are those of these rows. Nothing that the training depends on is touched.

    Args:
        data: of the run.
        root: the run's folder.
        device: of this rank.
    """

    def __init__(self, data: RunData, root: Path, device: torch.device):
        config = data.resolved.config
        self._data, self._root, self._device = data, root, device
        self._title = f"{config.experiment.stage}: {config.experiment.name}"
        self._rows = chosen_rows(data, config.runtime.seed)
        size, rank = config.training.batch_size, distributed.rank()
        own = self._rows[rank * size : (rank + 1) * size]
        self._batch = load_batch(data.validation, data.validation_collator, own, data.validation_tokens)
        self._count = min(len(self._rows), size * distributed.world_size())
        place = int(self._rows[0])  # read now: the file may be another one by then
        self._row, self._line = data.validation.read_row(place), int(data.validation.line[place])
        self._warned = False
        self.silent = ""  # why there is nothing to look at, and never will be
        if data.scores is not None and self._batch.reference is None:
            self.silent = "unknown: the reference's losses of the validation data were not computed (data score)"

    @property
    def folder(self) -> Path:
        """Of the pages."""
        return self._root / FOLDER

    def write(self, engine: Engine, reference: FrozenEngine | None, step: int) -> bool:
        """Look, and write the page of a step; every rank must call this.

        Args:
            engine: of a ``StageModel``.
            reference: of the reference model; None where the stage needs none.
            step: optimizer steps taken.

        Returns:
            Whether there is a new page: not for uniform weights (see ``silent``), nor for numbers that are not finite.
            A disk that is full is warned about, once.
        """
        if self.silent:
            return False
        columns = self._look(engine, reference)
        main = main_column(columns)
        if main not in columns:
            self.silent = "unknown: the stage's look has neither weight nor value"
            return False
        decisions = self._batch.decisions
        correct_BS = self._batch.correct[:, None].expand_as(decisions)
        seen = torch.stack([columns[main].double(), correct_BS.double()], -1)[decisions]
        everything = distributed.gather_arrays(seen).numpy()
        # Of what all ranks have, so that all of them come to the same end.
        if columns.keys() == {"weight"} and (everything[:, 0] == 1).all():
            self.silent = "uniform: every token weighs 1"
        if self.silent or not np.isfinite(everything).all():
            return False
        if distributed.is_main():
            first = {name: column_BS[0][decisions[0]] for name, column_BS in columns.items()}
            return self._write(step, main, first, everything)
        return True

    def _look(self, engine: Engine, reference: FrozenEngine | None) -> dict[str, Tensor]:
        """The stage's columns of this rank's rows, ``[B, S]`` float32 on the CPU."""
        with engine.without_gradient(evaluate=True):
            batch = self._batch.to(self._device)
            reference_BS = batch.reference if reference is None else reference(batch)
            columns: dict[str, Tensor] = engine(batch, None, reference_BS, mode="look")
        return {name: column_BS.float().cpu() for name, column_BS in columns.items()}

    def _write(self, step: int, main: str, first: dict[str, Tensor], everything: npt.NDArray[np.float64]) -> bool:
        encoder = self._data.validation_collator.encoder
        solution = Solution(self._row, self._line, tokens_of(self._row, first, encoder))
        found = histogram(everything[:, 0], everything[:, 1] > 0.5)
        figures = summary([solution]) | {"distribution": found}
        facts = {
            "step": str(step),
            "shown": f"{self._data.validation.path}:{self._line}",
            "histogram": f"of {len(everything)} tokens of {self._count} validation solutions",
        }
        record = {"step": step, "column": main, "solutions": self._count, "tokens": len(everything)} | found
        try:
            self.folder.mkdir(exist_ok=True)
            self._place(f"step_{step:08d}.json", json.dumps(record) + "\n")
            self._place(f"step_{step:08d}.html", render(self._title, facts, [solution], figures))
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning("cannot write %s (%s): training goes on without pages", self.folder, error)
            return False
        return True

    def _place(self, name: str, text: str) -> None:
        # Made beside the folder: the tracker sends whatever it finds in it.
        temporary = self._root / f".{FOLDER}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.folder / name)


def chosen_rows(data: RunData, seed: int) -> npt.NDArray[np.int64]:
    """The validation rows in an order that the seed draws; the first, which is shown, is short if any is: int64."""
    rows = np.random.default_rng(seed).permutation(data.validation_rows)
    lengths = data.validation.output_bytes[rows]
    short = np.flatnonzero(lengths <= _SHORT)
    first = int(short[0]) if len(short) else int(lengths.argmin())
    return np.concatenate([rows[first : first + 1], np.delete(rows, first)])
