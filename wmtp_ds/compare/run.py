"""One run, wherever it was read from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from wmtp_ds.evaluate.files import Finished

Series = dict[int, float]  # optimizer step -> value
TRAIN_DATA, VALIDATION_DATA = "dataset_fingerprint", "validation_fingerprint"


@dataclass(frozen=True)
class Run:
    """A run, or one of its checkpoints.

    Attributes:
        name: for tables.
        identity: the same for the same run, whatever it was called.
        config: resolved, by dotted keys, as texts (those that MLflow has as parameters); empty if it is not known.
        series: of each metric; steps that were taken twice are in it once, as they counted in the end.
        tags: of the tracked run, as far as they are known.
        completed: whether it came to its end; None if it is not known.
        steps, tokens, seconds: of training; None where they are not known.
        evaluations: that `wmtp-ds evaluate` has made of it.
        remarks: what its reader should know.
    """

    name: str
    identity: str
    config: Mapping[str, str] = field(default_factory=dict)
    series: Mapping[str, Series] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    completed: bool | None = None
    steps: int | None = None
    tokens: float | None = None
    seconds: float | None = None
    evaluations: tuple[Finished, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def stage(self) -> str | None:
        """The stage that it trains."""
        return self.config.get("experiment.stage") or self.tags.get("stage")

    @property
    def ranks(self) -> int | None:
        """How many there were."""
        ranks = self.tags.get("world_size", "")
        return int(ranks) if ranks.isdecimal() else None

    @property
    def rows_per_step(self) -> int | None:
        """Sequences of one optimizer step, over all ranks."""
        keys = ("training.batch_size", "training.gradient_accumulation_steps")
        parts = [self.config.get(key, "") for key in keys]
        if self.ranks is None or not all(part.isdecimal() for part in parts):
            return None
        return math.prod(map(int, parts)) * self.ranks


def without_others_losses(series: Mapping[str, Series], stage: str | None) -> dict[str, Series]:
    """A critic's ``val/loss`` is its value loss, which has a name of its own; a policy's is another thing."""
    return {name: values for name, values in series.items() if not (stage == "critic" and name == "val/loss")}


def last(values: Series) -> float | None:
    """The value of the last step."""
    return values[max(values)] if values else None
