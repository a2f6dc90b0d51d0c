"""Decides, once every optimizer step, whether training has gone on long enough. Pure Python, one rank.

Three conditions:

- *converged*: the monitored loss has not improved by ``min_delta`` for ``patience`` checks;
- *unstable*: of the last ``grad_norm_window_size`` gradient norms (a full window), at least the share
  ``grad_norm_threshold_ratio`` exceeds ``grad_norm_threshold``;
- *out of range*: the variance of the predicted values is outside [``variance_min``, ``variance_max``].

Mode ``any`` stops at any of the three; ``all`` when converged while stable and in range; ``loss_only`` when
converged.

Numbers that are none: a loss that is NaN or infinite is a check without improvement (and never the best
value); a gradient norm that is NaN or infinite exceeds every threshold (a skipped step reports one); a
variance that is NaN or infinite is outside every bound. A metric that is missing changes nothing: without the
monitored loss there was no check.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmtp_ds.config.schema import EarlyStoppingConfig

GRAD_NORM = "grad_norm"
VALUE_VARIANCE = "value_variance"


class EarlyStopping:
    """The conditions and what they remember, which belongs into checkpoints (:meth:`state_dict`).

    Attributes
    ----------
    best_value:
        Lowest monitored loss so far, from which improvement is counted; None before the first finite one.
    counter:
        Checks since the loss last improved by ``min_delta``.
    stop_reason:
        Why :meth:`should_stop` last said True; None if it said False.
    """

    def __init__(self, config: EarlyStoppingConfig) -> None:
        self._config = config
        self._norms: deque[float] = deque(maxlen=config.grad_norm_window_size)
        self.best_value: float | None = None
        self.counter = 0
        self.stop_reason: str | None = None

    def should_stop(self, metrics: Mapping[str, float]) -> bool:
        """Take in one optimizer step and say whether to stop; False, always, if early stopping is off.

        ``metrics`` holds the monitored loss under the name that ``monitor`` gives it, ``grad_norm`` (before
        clipping) and, for a stage that trains a value head alone, ``value_variance``.
        """
        if not self._config.enabled:
            return False
        converged = self._converged(metrics.get(self._config.monitor))
        unstable = self._unstable(metrics.get(GRAD_NORM))
        out_of_range = self._out_of_range(metrics.get(VALUE_VARIANCE))
        self.stop_reason = None
        if self._config.mode == "any":
            self.stop_reason = converged or unstable or out_of_range
        elif self._config.mode == "loss_only":
            self.stop_reason = converged
        elif converged and not unstable and not out_of_range:
            self.stop_reason = f"{converged}, and training is stable"
        return self.stop_reason is not None

    def _converged(self, loss: float | None) -> str | None:
        config = self._config
        if loss is not None:
            if math.isfinite(loss) and (self.best_value is None or loss < self.best_value - config.min_delta):
                self.best_value = float(loss)
                self.counter = 0
            else:
                self.counter += 1
        if self.counter < config.patience:
            return None
        best = "finite value yet" if self.best_value is None else f"best {self.best_value:.6g}"
        return (
            f"converged: {config.monitor} has not improved by {config.min_delta:g} for {self.counter} checks "
            f"({'no ' if self.best_value is None else ''}{best})"
        )

    def _unstable(self, norm: float | None) -> str | None:
        config = self._config
        if norm is not None:
            self._norms.append(float(norm))
        # The window's length, not the deque's limit: a restored state may be shorter.
        if len(self._norms) < config.grad_norm_window_size:
            return None
        exceeding = sum(not norm <= config.grad_norm_threshold for norm in self._norms)
        if exceeding / len(self._norms) < config.grad_norm_threshold_ratio:
            return None
        return (
            f"unstable: {exceeding} of the last {len(self._norms)} gradient norms exceed {config.grad_norm_threshold:g}"
        )

    def _out_of_range(self, variance: float | None) -> str | None:
        low, high = self._config.variance_min, self._config.variance_max
        if variance is None or (low is None and high is None):
            return None
        if math.isfinite(variance) and (low is None or variance >= low) and (high is None or variance <= high):
            return None
        bounds = f"[{'-inf' if low is None else f'{low:g}'}, {'inf' if high is None else f'{high:g}'}]"
        return f"out of range: the variance of the predicted values is {variance:g}, outside {bounds}"

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, in plain Python types (norms may be NaN or infinite)."""
        return {
            "monitor": self._config.monitor,
            "best_value": self.best_value,
            "counter": self.counter,
            "grad_norms": list(self._norms),
            "stop_reason": self.stop_reason,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`. Raises KeyError for a state that lacks an entry.

        With another ``monitor`` than before, the count of checks starts anew; with a shorter window, the
        latest norms are kept.
        """
        norms = [float(norm) for norm in state["grad_norms"]]
        best, counter, reason = state["best_value"], int(state["counter"]), state["stop_reason"]
        if state["monitor"] != self._config.monitor:
            best, counter = None, 0
        self._norms = deque(norms, maxlen=self._config.grad_norm_window_size)
        self.best_value = None if best is None else float(best)
        self.counter = counter
        self.stop_reason = reason
