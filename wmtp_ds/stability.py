"""Tells a step whose numbers are bad from a sound one. Pure Python; every rank sees the same and decides the same.

Four kinds, all told from metrics that are on the host anyway:

- *bad*: the loss or the gradient of the global batch is NaN or infinite. The engine has skipped the update. Too many
  in a row (``max_skipped_steps``) end the run. Where float16's loss scale was too large, only the gradient overflowed
  and the scale was lowered: that is how the scale is found, and no bad step.
- *spike*: the loss is above ``spike_factor`` times the running median of the last ``spike_window`` losses, of which
  half must be there. Rolled back to a checkpoint, the run passes over the steps that are to blame.
- *collapsed weights*: every weight lies at a clip bound, or each solution's weight on one token.
- *a constant critic*: the value head predicts one value for all, although rewards differ.

The last two are warned about once each, with advice, when they last for some steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from wmtp_ds.config.schema import StabilityConfig

Verdict = Literal["sound", "bad", "spike"]

# How many steps in a row something must last before it is warned about: weights differ from the first step on, while
# a fresh value head starts out constant.
COLLAPSED_STEPS = 5
CONSTANT_STEPS = 20
# Weights this close to the bounds, as a share of the square of their distance, count as at the bounds.
_AT_BOUNDS = 1e-4
# In nats: a token with 99.3 % of its solution's weight, the rest on one other, makes an entropy of 0.04.
_NO_ENTROPY = 0.05
# A deviation of values, in units of reward.
_CONSTANT_VALUE = 5e-3


class Stability:
    """What judges steps, and what it remembers, which belongs into checkpoints (:meth:`state_dict`).

    Args:
        config: the table ``stability``.
        training: the table ``training``: the clip bounds of the weights, and what advice names.

    Attributes
    ----------
    streak:
        The bad steps since the last one that was taken: of each its number and the lines of the data to look at.
    passed_over:
        Steps, counted from 1, that are not to be trained on.
    rollbacks:
        How often the run went back.
    limit, seen:
        Above which the last step's loss was a spike (infinite where nothing is), and by how many losses before it.
    """

    def __init__(self, config: StabilityConfig, training: Any) -> None:
        self._config = config
        self._training = training
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._lasting: dict[str, int] = {}
        self._warned: set[str] = set()
        self.streak: list[tuple[int, list[int]]] = []
        self.passed_over: set[int] = set()
        self.rollbacks = 0
        self.limit, self.seen = math.inf, 0

    def judge(self, loss: float, grad_norm: float, *, rescaled: bool = False) -> Verdict:
        """Take in one optimizer step.

        Args:
            loss: of the global batch.
            grad_norm: before clipping.
            rescaled: whether the gradient overflowed for no other reason than float16's loss scale.
        """
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or rescaled):
            return "bad"
        if not rescaled:
            self.streak.clear()
        self.limit, self.seen = math.inf, len(self._losses)
        if self._config.spike_factor and 2 * self.seen >= self._config.spike_window:
            self.limit = self._config.spike_factor * median(self._losses)
        self._losses.append(loss)
        return "spike" if loss > self.limit else "sound"

    @property
    def must_stop(self) -> bool:
        """Whether too many steps in a row were bad."""
        return 0 < self._config.max_skipped_steps <= len(self.streak)

    def skipped(self, step: int, lines: list[int]) -> None:
        """Note a bad step and the lines of the data to look at."""
        self.streak.append((step, lines))
        # A run that never stops must not remember all of them.
        del self.streak[: -max(self._config.max_skipped_steps, 1)]

    def blame(self, step: int) -> set[int]:
        """The steps to pass over because ``step`` spiked.

        Its own rows, first of all. But where the step before it has been passed over and the loss is high all the
        same, it was no row's loss that was high: the update before all these broke the weights, and goes, too.
        """
        blamed = {step}
        if step - 1 in self.passed_over:
            before = step - 1
            while before in self.passed_over:
                before -= 1
            if before > 0:
                blamed.add(before)
        return blamed

    def warnings(self, metrics: Mapping[str, float], *, rewards_differ: bool) -> list[str]:
        """What has to be said of this step's weights and values, each thing once in a run.

        Args:
            metrics: with ``weight/*`` and ``value/*`` where the stage has them.
            rewards_differ: whether two sequences of the global batch have different rewards.
        """
        training, found = self._training, []
        if self._lasts("bounds", COLLAPSED_STEPS, self._at_bounds(metrics)):
            low, high = training.weight_clip_min, training.weight_clip_max
            found.append(
                f"every weight of the last {COLLAPSED_STEPS} steps lies at a clip bound (training.weight_clip_min = "
                f"{low:g}, weight_clip_max = {high:g}): how large a TD error is counts for nothing. Raise "
                f"training.beta (now {training.beta:g}) or move the bounds apart; td/* shows the TD errors."
            )
        entropy = metrics.get("weight/entropy", math.inf)
        if self._lasts("entropy", COLLAPSED_STEPS, entropy < _NO_ENTROPY):
            found.append(
                f"the entropy of the weights was below {_NO_ENTROPY:g} for {COLLAPSED_STEPS} steps: each solution is "
                "learned from hardly more than one of its tokens. Raise training.beta or training.weight_clip_min, or "
                "lower training.weight_clip_max; weight/* shows the weights."
            )
        constant = rewards_differ and metrics.get("value/std", math.inf) < _CONSTANT_VALUE
        if self._lasts("constant", CONSTANT_STEPS, constant):
            found.append(
                f"the value head has predicted about {metrics['value/mean']:.3g} for every token of the last "
                f"{CONSTANT_STEPS} steps (deviation below {_CONSTANT_VALUE:g}) although rewards differ: it tells "
                f"correct from incorrect solutions by nothing. Raise training.value_lr (now {training.value_lr:g}), "
                'set value_head.type = "mlp" or train it longer as a critic; `wmtp-ds data stats` shows the labels.'
            )
        return found

    def _at_bounds(self, metrics: Mapping[str, float]) -> bool:
        low, high = (getattr(self._training, f"weight_clip_{end}", None) for end in ("min", "max"))
        if low is None or high is None or not low < high or "weight/std" not in metrics:
            return False
        # Bhatia and Davis: of numbers in [low, high], the variance is at most (mean - low)(high - mean), which it
        # reaches where all of them are at the bounds, and nowhere else.
        mean = metrics["weight/mean"]
        return (mean - low) * (high - mean) - metrics["weight/std"] ** 2 < _AT_BOUNDS * (high - low) ** 2

    def _lasts(self, name: str, steps: int, holds: bool) -> bool:
        """Whether something has held for ``steps`` steps in a row, for the first time in the run."""
        self._lasting[name] = self._lasting.get(name, 0) + 1 if holds else 0
        if self._lasting[name] < steps or name in self._warned:
            return False
        self._warned.add(name)
        return True

    def once(self, name: str) -> bool:
        """Whether this is asked for the first time in the run: for what is to be said once."""
        if name in self._warned:
            return False
        self._warned.add(name)
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, in plain Python types."""
        return {
            "losses": list(self._losses),
            "lasting": dict(self._lasting),
            "warned": sorted(self._warned),
            "streak": [[step, list(lines)] for step, lines in self.streak],
            "passed_over": sorted(self.passed_over),
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`. Raises KeyError for a state that lacks an entry.

        With a shorter window than before, the latest losses are kept.
        """
        self._losses = deque(map(float, state["losses"]), maxlen=self._config.spike_window)
        self._lasting = dict(state["lasting"])
        self._warned = set(state["warned"])
        self.streak = [(int(step), list(lines)) for step, lines in state["streak"]]
        self.passed_over = set(state["passed_over"])
        self.rollbacks = int(state["rollbacks"])

    def go_back(self, state: Mapping[str, Any], blamed: set[int]) -> None:
        """Go back to an earlier :meth:`state_dict`, to pass over ``blamed``; what was decided since then stays so."""
        passed_over, rollbacks, warned = self.passed_over | blamed, self.rollbacks + 1, self._warned
        self.load_state_dict(state)
        self.passed_over, self.rollbacks = passed_over, rollbacks
        self._warned |= warned
