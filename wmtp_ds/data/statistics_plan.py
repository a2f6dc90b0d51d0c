"""What a run will learn from, phase by phase: counted over the draws of its sample plan, not estimated."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wmtp_ds.config.resolved import Resolved
from wmtp_ds.data.index import DataIndex
from wmtp_ds.data.packing import pack
from wmtp_ds.data.pool import bin_of_each
from wmtp_ds.data.sampling import SamplePlan, count_steps, epoch_size, sample_plan
from wmtp_ds.data.statistics import TokenLengths

_STEPS_PACKED = 200  # of a run, as many steps at most are packed to measure padding


class Cut(NamedTuple):
    """How a global batch is cut: sequences of a micro-batch, micro-batches of a rank, ranks."""

    batch_size: int
    accumulation: int
    ranks: int

    @property
    def draws(self) -> int:
        """Sequences of the global batch."""
        return self.batch_size * self.accumulation * self.ranks


def plan_run(resolved: Resolved, index: DataIndex, lengths: TokenLengths, ranks: int) -> tuple[SamplePlan, Cut]:
    """The sample plan of a run of a config on a data file, as training makes it.

    Raises:
        UserError: there are no rows of a kind that the config asks for.
    """
    sampling, training = resolved.config.data_sampling, resolved.config.training
    cut = Cut(training.batch_size, training.gradient_accumulation_steps, ranks)
    steps = count_steps(training.n_epochs, epoch_size(index, sampling, lengths.fits), cut.draws, training.max_steps)
    return sample_plan(index, sampling, total_steps=steps, global_batch=cut.draws, eligible=lengths.fits), cut


def describe_plan(
    plan: SamplePlan, cut: Cut, index: DataIndex, lengths: TokenLengths, resolved: Resolved
) -> dict[str, Any]:
    """Draws, tokens and supervised tokens of each phase and of the run, and padding; ready for JSON."""
    sampling = resolved.config.data_sampling
    bins = dict(sampling.difficulty_bins) if sampling.curriculum_learning else {}
    ranges = [list(phase.epoch_range) for phase in sampling.curriculum_schedule] if bins else [[0.0, 1.0]]
    phases = [
        {"epoch_range": span, **_describe(plan.draws[start:end], index, lengths, bins, plan.global_batch)}
        for span, (start, end) in zip(ranges, plan.phases, strict=True)
    ]
    return {
        "steps": plan.total_steps,
        "global_batch": plan.global_batch,
        "ranks": cut.ranks,
        "epochs": round(len(plan.draws) / plan.epoch_rows, 4),
        "phases": phases,
        "run": _describe(plan.draws, index, lengths, bins, plan.global_batch),
        "padding": {
            "unpacked": round(padding_unpacked(plan, cut, lengths.sequences), 4),
            "packed": round(padding_packed(plan, cut, lengths), 4),
            "pack_sequences": sampling.pack_sequences,
        },
        "warnings": list(plan.warnings),
    }


def _describe(
    draws: npt.NDArray[np.int64],
    index: DataIndex,
    lengths: TokenLengths,
    bins: dict[str, Any],
    global_batch: int,
) -> dict[str, Any]:
    """Counts over draws, each time that a row is drawn."""
    supervised, right = lengths.supervised[draws], index.is_correct[draws]
    found: dict[str, Any] = {
        "draws": len(draws),
        "steps": round(len(draws) / global_batch, 2),
        "distinct_rows": len(np.unique(draws)),
        "distinct_problems": len(np.unique(index.problem[draws])),
        "correct": int(right.sum()),
        "incorrect": int((~right).sum()),
        "prompts_truncated": int(lengths.truncated[draws].sum()),
        "tokens": int(lengths.sequences[draws].sum()),
        "supervised_tokens": int(supervised.sum()),
        "supervised_tokens_correct": int(supervised[right].sum()),
        "supervised_tokens_incorrect": int(supervised[~right].sum()),
    }
    if bins:
        bin_of_draw = bin_of_each(index.difficulty[draws], bins)
        found["by_bin"] = {
            name: {
                "draws": int((bin_of_draw == b).sum()),
                "supervised_tokens": int(supervised[bin_of_draw == b].sum()),
            }
            for b, name in enumerate(bins)
        }
    return found


def padding_unpacked(plan: SamplePlan, cut: Cut, sequences: npt.NDArray[np.int64]) -> float:
    """The share of places that hold no token, over all micro-batches of the run, each as wide as its longest row."""
    widths_MB = sequences[plan.draws].reshape(-1, cut.batch_size)
    places = int(widths_MB.max(axis=1).sum()) * cut.batch_size
    return 1 - int(widths_MB.sum()) / places


def padding_packed(plan: SamplePlan, cut: Cut, lengths: TokenLengths) -> float:
    """The same with packed rows, over all steps or 200 that are spread evenly over the run."""
    steps = np.unique(np.linspace(0, plan.total_steps - 1, _STEPS_PACKED).round().astype(np.int64))
    tokens = places = 0
    for step in steps.tolist():
        of_step = lengths.sequences[plan.rows(step)].tolist()
        packed = pack(
            of_step,
            capacity=lengths.max_length,
            micro_batches=cut.accumulation * cut.ranks,
            most_rows=cut.batch_size,
        )
        for rows in packed:
            width = max((sum(of_step[place] for place in row) for row in rows), default=0)
            places += width * len(rows)
        tokens += sum(of_step)
    return 1 - tokens / places
