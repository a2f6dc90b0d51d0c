"""One stage, from config to checkpoint: the loop that all stages share."""

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch

from wmtp_ds import distributed, engine
from wmtp_ds.assembly import (
    Loader,
    build_engine,
    build_reference,
    check_models,
    fetch_critic,
    trunk_fingerprint,
)
from wmtp_ds.checkpoint import Checkpoints
from wmtp_ds.config import Resolved
from wmtp_ds.data.batches import Batch
from wmtp_ds.data.loader import timed
from wmtp_ds.early_stopping import EarlyStopping
from wmtp_ds.evaluation import evaluate
from wmtp_ds.export import Exporter
from wmtp_ds.launch import resolve_device
from wmtp_ds.metrics import WindowMetrics
from wmtp_ds.models.loading import load_policy
from wmtp_ds.plots import plot_losses
from wmtp_ds.progress import Display
from wmtp_ds.random_state import random_state, restore_random, seed_random
from wmtp_ds.resume import check_resume, fit_ranks, same_table
from wmtp_ds.rewards import fill_rewards
from wmtp_ds.run_data import RunData, open_data, world_size_from_launcher
from wmtp_ds.run_folder import RunFolder, is_main_process
from wmtp_ds.run_summary import BEST, FINAL, write_summary
from wmtp_ds.signals import Interruption
from wmtp_ds.stages.base import Output, Totals, make_stage
from wmtp_ds.tracking import Tracker, start_tracking
from wmtp_ds.tracking_state import METRICS_FILE
from wmtp_kernels import backend


def train(resolved: Resolved, *, run_name: str | None = None, resume: str = "never") -> int:
    """Train the stage that a config describes; every rank calls this.

    Args:
        resolved: a checked config.
        run_name: of the tracked run; ``experiment.name`` by default.
        resume: "auto" (the newest sound checkpoint in save_dir, if any), "never", or a checkpoint's path.

    Returns:
        0, or 128 plus the number of the signal that ended the run after a checkpoint was saved.

    Raises:
        UserError: for what the user can mend, before the process group forms where it can be known then.
        RunError: if a checkpoint or an export cannot be written.
    """
    folder = RunFolder(Path(resolved.config.checkpoint.save_dir), resume)
    changes = check_resume(resolved, resume)
    resolved, cut = fit_ranks(resolved, resume, world_size_from_launcher())
    check_models(resolved)
    data = open_data(resolved, world_size_from_launcher())
    critic = fetch_critic(resolved)
    if is_main_process():
        folder.lock()
    try:
        device = engine.start(resolve_device(resolved.config.runtime.device))
        fill_rewards(resolved, data, device)
        training = Training(resolved, data, folder, device, critic)
        for change in (*changes, *cut):
            training.display.say(f"changed since the checkpoint: {change}")
        return training.run(run_name or resolved.config.experiment.name)
    finally:
        folder.close()


@dataclass
class Progress:
    """Where a run is; saved in every checkpoint."""

    step: int = 0
    best: float = float("inf")
    stopped: bool = False
    seconds: float = 0.0
    waited: float = 0.0
    tokens: float = 0.0
    places: float = 0.0
    first_loss: float = float("nan")
    last_loss: float = float("nan")


class Training:
    """What one rank holds while a stage trains."""

    def __init__(
        self,
        resolved: Resolved,
        data: RunData,
        folder: RunFolder,
        device: torch.device,
        critic: Path | None,
        load: Loader = load_policy,
    ):
        config = resolved.config
        self.resolved, self.config, self.data, self.folder, self.device = resolved, config, data, folder, device
        self.main = distributed.is_main()
        self.display = Display(self.main, data.total_steps)
        seed_random(config.runtime.seed)
        self.stage = make_stage(config.experiment.stage, config.training)
        self.reference = build_reference(resolved, load)
        self.engine = build_engine(resolved, self.stage, critic, data.total_steps, load)
        fingerprint = trunk_fingerprint(Path(config.models.policy.path))
        self.exporter = Exporter(self.engine, resolved, data.tokenizer, fingerprint)
        self.checkpoints = Checkpoints(
            folder.root, limit=config.checkpoint.save_total_limit, exclude_frozen=not self.stage.trains_policy
        )
        self.stopper = EarlyStopping(config.early_stopping)
        self.progress = Progress()
        self.validation_batches = data.validation_batches(distributed.rank(), distributed.world_size())
        self.validation: dict[str, float] = {}
        self.tracker: Tracker | None = None
        self.tags = {"trunk_fingerprint": fingerprint, "dataset_fingerprint": data.train.fingerprint}

    def run(self, run_name: str) -> int:
        """Train to the end, an early stop or a signal; returns the exit code."""
        status = "FAILED"
        try:
            self.start(run_name)
            with Interruption() as interruption, ExitStack() as stack:
                signal = self._loop(interruption, stack)
            if signal:
                self.display.say(f"stopped by signal {signal} at step {self.progress.step}; go on with --resume auto")
                status = "KILLED"
                return 128 + signal
            self._finish()
            status = "FINISHED"
            return 0
        finally:
            self.close(status)

    def close(self, status: str) -> None:
        """End the tracked run and release what is held."""
        self.display.close()
        if self.tracker is not None:
            # After a signal there is little time before the process is killed; `track sync` sends what is left.
            self.tracker.finish(status, timeout=10.0 if status == "KILLED" else 30.0)
        self.engine.close()
        if self.reference is not None:
            self.reference.close()

    def _loop(self, interruption: Interruption, stack: ExitStack) -> int:
        """Optimizer steps until the end; returns the signal that interrupted them, or 0."""
        training = self.config.training
        if self.progress.stopped:
            return 0
        windows = self.data.windows(self.progress.step, distributed.rank(), distributed.world_size())
        stack.callback(windows.close)
        for window, waited in timed(windows):
            signal = self.take_step(window, interruption.signal, waited)
            step, ending = self.progress.step, self._is_ending
            if ending or step % training.eval_interval == 0:
                self._evaluate()
            if signal or self._checkpoint_is_due(step):
                self._save()
            if signal or ending:
                return 0 if ending else signal
        return 0

    @property
    def _is_ending(self) -> bool:
        return self.progress.stopped or self.progress.step == self.data.total_steps

    def take_step(self, window: list[Batch], signal: int = 0, waited: float = 0.0) -> int:
        """One optimizer step over this rank's micro-batches, accounted for, shown and tracked.

        ``wmtp-ds bench step`` measures this function.

        Args:
            window: the micro-batches of one accumulation window.
            signal: the number of a signal that this rank has received, or 0.
            waited: seconds that this rank has waited for ``window``; they are part of the step.

        Returns:
            The largest ``signal`` of any rank.
        """
        began = time.monotonic()
        metrics, signal = self._step(window, signal, waited)
        step = self._advance(metrics, waited + time.monotonic() - began)
        log = self._is_ending or step == 1 or step % self.config.training.log_interval == 0
        self.display.step(step, metrics, log)
        if self.tracker is not None and log:
            self.tracker.log(step, metrics | {"perf/mem_gib": memory_gib(self.device)})
        return signal

    def _step(self, window: list[Batch], signal: int, waited: float) -> tuple[dict[str, float], int]:
        """One optimizer step over this rank's micro-batches: metrics of the global batch, and any rank's signal."""
        window = [batch.to(self.device, non_blocking=True) for batch in window]
        totals = self.count(window)
        learning_rate = self.engine.learning_rate
        collected = WindowMetrics()
        for batch in window:
            reference_BS = None if self.reference is None else self.reference(batch)
            output = Output(*self.engine(batch, totals, reference_BS))  # model, then the stage's loss
            self.engine.backward(output.loss)
            self.engine.step()
            collected.add(output)
        same = {"optim/grad_norm": self.engine.grad_norm, "perf/tokens": totals.tokens, "data/places": totals.places}
        metrics, signal = collected.reduce(signal, same, {"perf/data_wait": waited})
        metrics["optim/lr"] = learning_rate
        return metrics, signal

    def count(self, window: list[Batch]) -> Totals:
        """What losses are divided by, over all ranks and micro-batches, known before the first backward."""
        n = self.engine.module.n
        packed = torch.stack([self.stage.counts(batch.host, n).pack() for batch in window]).sum(0)
        totals = Totals.unpack(distributed.sum_over_ranks(packed.to(self.device, non_blocking=True)), n)
        if not self.stage.needs_window:
            return totals
        with self.engine.without_gradient():
            values = [self.engine(batch, mode="values") for batch in window]
        return replace(totals, standardisation=self.stage.standardise(values, window))

    def _advance(self, metrics: dict[str, float], seconds: float) -> int:
        """Account for a step that was taken, and decide whether it was the last; returns its number."""
        progress = self.progress
        progress.step += 1
        progress.seconds += seconds
        progress.waited += metrics["perf/data_wait"]
        tokens, places = metrics.pop("perf/tokens"), metrics.pop("data/places")
        progress.tokens += tokens
        progress.places += places
        progress.last_loss = metrics["train/loss"]
        if progress.step == 1:
            progress.first_loss = metrics["train/loss"]
        metrics["perf/step_time"] = seconds
        metrics["perf/tokens_per_s"] = progress.tokens / progress.seconds
        metrics["perf/data_wait"] = progress.waited / progress.seconds
        metrics["data/padding"] = 1 - tokens / places
        progress.stopped = self._should_stop(metrics)
        return progress.step

    def _should_stop(self, metrics: dict[str, float]) -> bool:
        """Rank 0 decides and tells the others, so that none runs on alone."""
        if not self.config.early_stopping.enabled:
            return False
        seen = {"loss": metrics["train/loss"], "grad_norm": metrics["optim/grad_norm"]}
        if "train/value_loss" in metrics:
            seen["value_loss"] = metrics["train/value_loss"]
        if "value/std" in metrics and not self.stage.trains_policy:
            seen["value_variance"] = metrics["value/std"] ** 2
        stop: bool = distributed.broadcast_object(self.stopper.should_stop(seen) if self.main else None)
        return stop

    def _evaluate(self) -> None:
        """Validate; a new best is exported."""
        self.validation = evaluate(self.engine, self.validation_batches, self.device)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in self.validation.items() if "head" not in name)
        self.display.say(f"step {self.progress.step:>6}/{self.data.total_steps}  {shown}")
        if self.tracker is not None:
            self.tracker.log(self.progress.step, self.validation)
        # Not `>=`: a loss that is NaN is never the best.
        if not self.validation["val/loss"] < self.progress.best:
            return
        self.progress.best = self.validation["val/loss"]
        if self.config.checkpoint.save_best:
            self._export(BEST)

    def _export(self, name: str) -> None:
        run_id = None if self.tracker is None else self.tracker.run_id
        facts = {"step": self.progress.step, "stage": self.config.experiment.stage, "mlflow_run_id": run_id}
        path = self.exporter.write(name, facts | self.validation | {"train/loss": self.progress.last_loss})
        if self.tracker is not None and name == BEST:
            self.tracker.log_artifact(path, "checkpoints")

    # --- checkpoints ---

    def _checkpoint_is_due(self, step: int) -> bool:
        """``save_checkpoint_every`` epochs have passed since the last one, and at the end if that is on at all."""
        every = self.config.checkpoint.save_checkpoint_every * self.data.steps_per_epoch
        if not every:
            return False
        return step == self.data.total_steps or self.progress.stopped or int(step // every) > int((step - 1) // every)

    def _save(self) -> None:
        state = {
            "progress": asdict(self.progress),
            "stopper": distributed.broadcast_object(self.stopper.state_dict()),
            "run_id": distributed.broadcast_object(None if self.tracker is None else self.tracker.run_id),
            "validation": self.validation,
            "random": random_state(self.device),
        }
        files = {"config.toml": self.resolved.toml()}
        self.checkpoints.save(self.engine, self.progress.step, state, files, self.data.plan.global_batch)

    def _restore(self, source: Path) -> str | None:
        """Go on from a checkpoint; returns the id of its tracked run."""
        state = self.checkpoints.restore(self.engine, source, self.display.say)
        self.progress = Progress(**state["progress"])
        # A run that had stopped early goes on if the conditions are others now.
        self.progress.stopped &= same_table(source, self.resolved, "early_stopping")
        self.stopper.load_state_dict(state["stopper"])
        self.validation = state["validation"]
        restore_random(state.get("random"), self.device, (self.config.runtime.seed, self.progress.step))
        self.display.say(f"resumed from {source} at step {self.progress.step} of {self.data.total_steps}")
        run_id: str | None = state["run_id"]
        return run_id

    # --- beginning and end ---

    def start(self, run_name: str) -> None:
        """Make the run's folder ready, restore a checkpoint to resume from, and begin the tracked run."""
        if self.main:
            self.folder.prepare(self.display.say)
        distributed.barrier()
        source = self.folder.source(self.checkpoints, self.display.say)
        run_id = self._restore(source) if source is not None else None
        if not self.main:
            return
        (self.folder.root / "config.toml").write_text(self.resolved.toml())
        tags = {
            **self.config.experiment.tags,
            **self.tags,
            "stage": self.config.experiment.stage,
            "world_size": str(distributed.world_size()),
            "zero_stage": "3",
            "kernels": backend(self.device),
            "config_hash": self.resolved.hash(),
        }
        self.tracker = start_tracking(
            self.config.mlflow,
            run_name=run_name,
            run_dir=self.folder.root,
            tags=tags,
            params=self.resolved.flat(),
            resume_run_id=run_id,
            resume=source is not None,
        )
        self.tracker.log_artifact(self.folder.root / "config.toml")
        for warning in (*(str(w) for w in self.resolved.warnings), *self.data.plan.warnings):
            self.display.say(f"warning: {warning}")
        if self.data.too_long:
            self.display.say(f"{self.data.too_long} solutions are longer than dataset.max_length and are left out")
        self.display.say(
            f"{self.config.experiment.stage}: {self.data.total_steps} steps of {self.data.plan.global_batch} "
            f"sequences from {len(self.data.train)} rows, {distributed.world_size()} ranks on {self.device.type}"
        )

    def _finish(self) -> None:
        """The final export, the picture, and what the run's folder says of it."""
        if self.config.checkpoint.save_final:
            self._export(FINAL)
        if not self.main or self.tracker is None:
            return
        progress = self.progress
        if self.stopper.stop_reason:
            self.display.say(f"stopped early at step {progress.step}: {self.stopper.stop_reason}")
            self.tracker.set_tags({"early_stopping/reason": self.stopper.stop_reason})
            figures: dict[str, float] = {"final_step": progress.step, "counter": self.stopper.counter}
            if self.stopper.best_value is not None:
                figures["best_value"] = self.stopper.best_value
            self.tracker.log(progress.step, {f"early_stopping/{name}": value for name, value in figures.items()})
        picture = self.folder.root / "loss.png"
        plot_losses({self.config.experiment.stage: self.folder.root / METRICS_FILE}, picture)
        self.tracker.log_artifact(picture, "plots")
        # The picture and the best checkpoint are sent while the tracker finishes; the run's id is known by now.
        write_summary(
            self.folder.root,
            completed=True,
            stage=self.config.experiment.stage,
            steps=progress.step,
            world_size=distributed.world_size(),
            first_loss=progress.first_loss,
            last_loss=progress.last_loss,
            seconds=progress.seconds,
            wall_seconds=time.time() - psutil.Process().create_time(),
            tokens_per_s=progress.tokens / max(progress.seconds, 1e-9),
            data_wait=progress.waited / max(progress.seconds, 1e-9),
            padding=1 - progress.tokens / max(progress.places, 1.0),
            config_hash=self.resolved.hash(),
            mlflow_run_id=self.tracker.wait_for_run_id(),
            truncated_prompts=self.data.collator.truncated,
            **self.validation,
        )
        self.display.say(f"done: {self.folder.root}")


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30
