"""What a run does about bad numbers: it skips, reports, warns, goes back to a checkpoint, or stops.

`wmtp_ds.stability` says which steps are bad. All ranks call everything here together and come to the same decisions,
because they decide by metrics that are the same on all of them; a sound step costs no exchange and no wait.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from wmtp_ds import distributed
from wmtp_ds.bad_steps import BadStep, BadSteps, describe_lines
from wmtp_ds.checkpoint_files import step_of, verify_manifest
from wmtp_ds.config import Resolved
from wmtp_ds.data.batch import Batch
from wmtp_ds.errors import RunError
from wmtp_ds.run_data import RunData
from wmtp_ds.stability import Stability, Verdict

REWARD_HIGH, REWARD_LOW = "data/reward_high", "data/minus_reward_low"


class Guard:
    """Watches over the steps of a run.

    Args:
        root: ``checkpoint.save_dir``.
        resolved: the run's config.
        data: the run's data.
        say: shows a line, on rank 0.

    Attributes
    ----------
    verdict:
        Of the last step.
    rollback:
        The checkpoint to restore before the next step, if the last one asks for that.
    """

    def __init__(self, root: Path, resolved: Resolved, data: RunData, say: Callable[[str], None]):
        self._config, self._training = resolved.config.stability, resolved.config.training
        self._say, self._data = say, data
        self._stability = Stability(self._config, self._training)
        self._bad_steps = BadSteps(root, resolved, data.train)
        self._course: list[Path] = []  # the checkpoints that this run has come by, oldest first
        self._blamed: set[int] = set()
        self._rewards_differ = self._is_high = False
        self.verdict: Verdict = "sound"
        self.rollback: Path | None = None

    def extremes(self, window: Sequence[Batch]) -> dict[str, float]:
        """The highest reward of this rank's sequences, and minus the lowest; of any rank the largest is wanted."""
        if not self._training.has_value_head:
            return {}
        rewards = np.concatenate([batch.host.rewards.numpy() for batch in window])
        return {REWARD_HIGH: float(rewards.max()), REWARD_LOW: -float(rewards.min())}

    def judge(self, metrics: dict[str, float], *, rescaled: bool) -> Verdict:
        """Judge a step by its metrics over the global batch, and take out of them what nobody else wants to know."""
        high, minus_low = metrics.pop(REWARD_HIGH, 0.0), metrics.pop(REWARD_LOW, 0.0)
        self._rewards_differ = high > -minus_low
        self.verdict = self._stability.judge(metrics["train/loss"], metrics["optim/grad_norm"], rescaled=rescaled)
        return self.verdict

    def answer(self, step: int, metrics: dict[str, float], window: Sequence[Batch], losses: Sequence[Tensor]) -> None:
        """Do what the verdict on a step asks for.

        Args:
            step: its number, counted from 1.
            metrics: of the global batch.
            window: this rank's micro-batches.
            losses: each one's share of the loss.

        Raises:
            RunError: if the run must not go on.
        """
        if self.verdict == "bad":
            self._answer_bad(step, metrics, window, losses)
            return
        if self.verdict == "spike":
            self._answer_spike(step, metrics, window, losses)
        self._is_high = self.verdict == "spike"
        for warning in self._stability.warnings(metrics, rewards_differ=self._rewards_differ):
            self._say(f"warning: step {step}: {warning}")

    def _answer_bad(
        self, step: int, metrics: dict[str, float], window: Sequence[Batch], losses: Sequence[Tensor]
    ) -> None:
        loss, stability = metrics["train/loss"], self._stability
        what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        found = self._report(step, what, metrics, window, losses)
        stability.skipped(step, found.lines)
        # The lines of a single step as they are reported: which of them it is, the user must find out.
        self._say(f"warning: step {step} was skipped: {what}. Look at {self._lines(found.lines)}; {found.place}")
        if not stability.must_stop:
            return
        first, count = stability.streak[0][0], len(stability.streak)
        lines = sorted({line for _, of_step in stability.streak for line in of_step})
        raise RunError(
            f"stopped at step {step}: {count} step{'s' if count > 1 else ''} in a row had a loss or a gradient that is "
            f"not finite (stability.max_skipped_steps). Their updates were skipped: the weights are as before step "
            f"{first}. Look at {self._lines(lines)}; reports are in {self._bad_steps.folder}. If these rows are right, "
            f"training has diverged: lower training.learning_rate, or use bfloat16 or float32 if the model's dtype is "
            f"float16, and {self._where_to_go_on()}",
            everywhere=True,
        )

    def _answer_spike(
        self, step: int, metrics: dict[str, float], window: Sequence[Batch], losses: Sequence[Tensor]
    ) -> None:
        rolls_back = self._config.on_spike == "rollback"
        if self._is_high and not rolls_back:
            return  # said when it began
        stability = self._stability
        what = (
            f"the loss {metrics['train/loss']:.4g} is above {stability.limit:.4g}, {self._config.spike_factor:g} times "
            f"the median of the {stability.seen} losses before"
        )
        blamed = stability.blame(step)
        source = self._sound_checkpoint(before=min(blamed)) if rolls_back else None
        has_ended = rolls_back and stability.rollbacks >= self._config.max_rollbacks
        passed_over = {number: self._data.plan.rows(number - 1).tolist() for number in sorted(blamed)}
        goes_back = source is not None and not has_ended
        found = self._report(step, what, metrics, window, losses, passed_over=passed_over if goes_back else {})
        if has_ended:
            raise RunError(
                f"stopped at step {step}: {what}, after {stability.rollbacks} rollbacks (stability.max_rollbacks). "
                f"Look at {self._lines(found.lines)}; {found.place}. Lower training.learning_rate or "
                f"training.max_grad_norm, or raise stability.spike_factor, and {self._where_to_go_on()}",
                everywhere=True,
            )
        self._say(f"warning: step {step}: a spike: {what}. {found.place}")
        if not goes_back:
            if rolls_back and stability.once("no checkpoint"):
                self._say(
                    f"warning: there is no checkpoint of this run before step {min(blamed)} to go back to; going on. "
                    "checkpoint.save_checkpoint_every says how often one is written."
                )
            return
        names = ", ".join(map(str, sorted(blamed)))
        self._say(f"going back to {source}; the rows of step{'s' if len(blamed) > 1 else ''} {names} are passed over")
        self._blamed, self.rollback = blamed, source

    def _report(
        self,
        step: int,
        what: str,
        metrics: dict[str, float],
        window: Sequence[Batch],
        losses: Sequence[Tensor],
        passed_over: dict[int, list[int]] | None = None,
    ) -> BadStep:
        return self._bad_steps.report(
            step,
            what,
            metrics,
            window,
            losses,
            is_spike=self.verdict == "spike",
            source=self._course[-1] if self._course else None,
            passed_over=passed_over,
        )

    def _lines(self, lines: Sequence[int]) -> str:
        return describe_lines(self._data.train.path, lines)

    def _where_to_go_on(self) -> str:
        if not self._course:
            return "start again (there is no checkpoint)."
        return f"go on with --resume {self._course[-1]}."

    # --- passing over and going back ---

    def passes_over(self, step: int) -> bool:
        """Whether a step, counted from 1, is not to be trained on; says so."""
        if step not in self._stability.passed_over:
            return False
        self._say(f"step {step} is passed over, because of the spike")
        return True

    @property
    def passed_over(self) -> list[int]:
        """The steps, counted from 1, that are not to be trained on."""
        return sorted(self._stability.passed_over)

    def came_by(self, checkpoint: Path) -> None:
        """Note a checkpoint that was written, or that the run has gone on from."""
        self._course = [earlier for earlier in self._course if earlier.name < checkpoint.name] + [checkpoint]

    def _sound_checkpoint(self, before: int) -> Path | None:
        """The newest sound checkpoint of this run in which step ``before`` has not been taken; same on every rank."""
        found: Path | None = None
        if distributed.is_main():
            for checkpoint in reversed(self._course):
                step = step_of(checkpoint.name)
                if step is not None and step < before and verify_manifest(checkpoint) is None:
                    found = checkpoint
                    break
        source: Path | None = distributed.broadcast_object(found)
        return source

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, in plain Python types."""
        return self._stability.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; where that is a rollback, what has been decided since stays decided."""
        if self.rollback is None:
            self._stability.load_state_dict(state)
            return
        self._stability.go_back(state, self._blamed)
        self.rollback, self._blamed = None, set()
