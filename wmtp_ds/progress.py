"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere, from rank 0 alone."""

import sys
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class Display:
    """Log lines, and a bar below them where there is a terminal to draw it on.

    Args:
        enabled: False on every rank but 0, where nothing is shown.
        total_steps: of the run.
    """

    def __init__(self, enabled: bool, total_steps: int):
        self.total_steps = total_steps
        self._console = Console(file=sys.stderr, quiet=not enabled, soft_wrap=True, highlight=False, emoji=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._first: tuple[float, int] | None = None
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("training", total=total_steps, figures="")
            self._bar.start()

    def say(self, text: str) -> None:
        """A line."""
        self._console.print(text, markup=False)

    def step(self, step: int, metrics: dict[str, float], log: bool) -> None:
        """An optimizer step: moves the bar, and with ``log`` prints a line."""
        if self._first is None:
            self._first = (time.monotonic(), step)
        began, first = self._first
        per_step = (time.monotonic() - began) / (step - first) if step > first else metrics["perf/step_time"]
        eta = timedelta(seconds=round(per_step * (self.total_steps - step)))
        speed = metrics["perf/tokens_per_s"]
        if self._bar is not None:
            figures = f"loss {metrics['train/loss']:.4f}  {speed:,.0f} tok/s  ETA {eta}"
            self._bar.update(self._task, completed=step, figures=figures)
        if log:
            self.say(
                f"step {step:>6}/{self.total_steps}  {step / self.total_steps:6.1%}  loss {metrics['train/loss']:.4f}  "
                f"norm {metrics['optim/grad_norm']:.3g}  lr {metrics['optim/lr']:.2e}  {speed:,.0f} tok/s  ETA {eta}"
            )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
