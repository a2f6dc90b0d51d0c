"""One stage, from config to checkpoint: the loop that all stages share."""

import math
import time
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

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
from wmtp_ds.errors import RunError
from wmtp_ds.evaluation import evaluate
from wmtp_ds.export import Exporter
from wmtp_ds.guard import Guard
from wmtp_ds.launch import resolve_device
from wmtp_ds.look.during_training import WeightPages
from wmtp_ds.machines import check_machines
from wmtp_ds.metrics import WindowMetrics
from wmtp_ds.models.loading import load_policy
from wmtp_ds.out_of_memory import explain, is_out_of_memory
from wmtp_ds.peers import Peers
from wmtp_ds.plots import plot_losses
from wmtp_ds.progress import Display
from wmtp_ds.random_state import random_state, restore_random, seed_random
from wmtp_ds.resume import check_resume, fit_ranks, same_table
from wmtp_ds.rewards import fill_rewards
from wmtp_ds.run_data import RunData, open_data, world_size_from_launcher
from wmtp_ds.run_folder import RunFolder, is_main_process
from wmtp_ds.run_summary import BEST, FINAL, write_summary
from wmtp_ds.scores.use import use_scores
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
        RunError: if a checkpoint or an export cannot be written, memory runs out, or numbers stay bad (the config's
            table stability).
    """
    folder = RunFolder(Path(resolved.config.checkpoint.save_dir), resume)
    changes = check_resume(resolved, resume)
    resolved, cut = fit_ranks(resolved, resume, world_size_from_launcher())
    check_models(resolved)
    data = open_data(resolved, world_size_from_launcher())
    use_scores(resolved, data)
    critic = fetch_critic(resolved)
    if is_main_process():
        folder.lock()
    try:
        device = engine.start(resolve_device(resolved.config.runtime.device), resolved.config.runtime.peer_timeout)
        check_machines(resolved, folder, data, critic)
        fill_rewards(resolved, data, device)
        training = Training(resolved, data, folder, device, critic)
        for change in (*changes, *cut):
            training.display.say(f"changed since the checkpoint: {change}")
        return training.run(run_name or resolved.config.experiment.name)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        where = resolve_device(resolved.config.runtime.device)
        raise RunError(explain(error, resolved, where, distributed.world_size())) from error
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
        self.guard = Guard(folder.root, resolved, data, self.display.say)
        self.progress = Progress()
        self.validation_batches = data.validation_batches(distributed.rank(), distributed.world_size())
        self.validation: dict[str, float] = {}
        self.pages: WeightPages | None = None
        self.tracker: Tracker | None = None
        self.tags = {
            "trunk_fingerprint": fingerprint,
            "dataset_fingerprint": data.train.fingerprint,
            "validation_fingerprint": data.validation.fingerprint,
        }
        if data.scores is not None:
            self.tags |= data.scores.tags

    def run(self, run_name: str) -> int:
        """Train to the end, an early stop or a signal; returns the exit code."""
        status = "FAILED"
        # Around the end as well: once a rank has left, the launcher signals the others.
        with Interruption() as interruption:
            try:
                self.start(run_name)
                with ExitStack() as stack:
                    signal = self._loop(interruption, stack)
                if signal:
                    step = self.progress.step
                    self.display.say(f"stopped by signal {signal} at step {step}; go on with --resume auto")
                    status = "KILLED"
                    return 128 + signal
                self._finish()
                status = "FINISHED"
                return 0
            finally:
                self.close(status)

    def close(self, status: str) -> None:
        """End the tracked run and release what is held."""
        if status != "FAILED" and Peers.current is not None:
            Peers.current.watch_no_more()
        self.display.close()
        if self.tracker is not None:
            # After a signal or an error there is little time before the process is killed; `track sync` sends the rest.
            self.tracker.finish(status, timeout=30.0 if status == "FINISHED" else 10.0)
        if status == "KILLED":
            # The launcher ends all ranks once the first has left with another code than 0.
            distributed.barrier()
        self.engine.close()
        if self.reference is not None:
            self.reference.close()

    def _loop(self, interruption: Interruption, stack: ExitStack) -> int:
        """Optimizer steps until the end; returns the signal that interrupted them, or 0."""
        training = self.config.training
        if self.progress.stopped:
            return 0
        windows = stack.enter_context(closing(self._windows()))
        for window, waited in windows:
            if self.guard.passes_over(self.progress.step + 1):
                self.progress.step, signal = self.progress.step + 1, 0
            else:
                signal = self.take_step(window, interruption.signal, waited)
            if self.guard.rollback is not None:
                self._roll_back(self.guard.rollback)
                continue
            step, ending = self.progress.step, self._is_ending
            if ending or step % training.eval_interval == 0:
                self._evaluate()
            if signal or self._checkpoint_is_due(step):
                self._save()
            if signal or ending:
                return 0 if ending else signal
        return 0

    def _windows(self) -> Generator[tuple[list[Batch], float], None, None]:
        """The window of each step, and the wait for it: from where the run is, also after a rollback."""
        rank, world_size = distributed.rank(), distributed.world_size()
        while (step := self.progress.step) < self.data.total_steps:
            with closing(self.data.windows(step, rank, world_size)) as windows:
                for window, waited in timed(windows):
                    step += 1
                    yield window, waited
                    if self.progress.step != step:
                        break

    @property
    def _is_ending(self) -> bool:
        return self.progress.stopped or self.progress.step == self.data.total_steps

    def take_step(self, window: list[Batch], signal: int = 0, waited: float = 0.0) -> int:
        """One optimizer step over this rank's micro-batches, accounted for, shown, tracked and watched.

        ``wmtp-ds bench step`` measures this function.

        Args:
            window: the micro-batches of one accumulation window.
            signal: the number of a signal that this rank has received, or 0.
            waited: seconds that this rank has waited for ``window``; they are part of the step.

        Returns:
            The largest ``signal`` of any rank.
        """
        began = time.monotonic()
        metrics, losses, signal = self._step(window, signal, waited)
        step = self._advance(metrics, waited + time.monotonic() - began)
        log = (
            self._is_ending
            or step == 1
            or step % self.config.training.log_interval == 0
            or self.guard.verdict != "sound"
        )
        self.display.step(step, metrics, log)
        if self.tracker is not None and log:
            self.tracker.log(step, metrics | {"perf/mem_gib": memory_gib(self.device)})
        self.guard.answer(step, metrics, window, losses)
        return signal

    def _step(self, window: list[Batch], signal: int, waited: float) -> tuple[dict[str, float], list[Tensor], int]:
        """One optimizer step: metrics of the global batch, this rank's losses one by one, and any rank's signal."""
        window = [batch.to(self.device, non_blocking=True) for batch in window]
        totals = self.count(window)
        learning_rate = self.engine.learning_rate
        collected = WindowMetrics()
        for batch in window:
            reference_BS = batch.reference if self.reference is None else self.reference(batch)
            output = Output(*self.engine(batch, totals, reference_BS))  # model, then the stage's loss
            self.engine.backward(output.loss)
            self.engine.step()
            collected.add(output)
        same = {"optim/grad_norm": self.engine.grad_norm, "perf/tokens": totals.tokens, "data/places": totals.places}
        largest = {"perf/data_wait": waited} | self.guard.extremes(window)
        metrics, signal = collected.reduce(signal, same, largest)
        metrics["optim/lr"] = learning_rate
        metrics["optim/skipped_steps"] = self.engine.skipped_steps
        return metrics, collected.losses, signal

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
        if math.isfinite(loss := metrics["train/loss"]):
            progress.last_loss = loss
            progress.first_loss = loss if math.isnan(progress.first_loss) else progress.first_loss
        metrics["perf/step_time"] = seconds
        metrics["perf/seconds"], metrics["perf/tokens_seen"] = progress.seconds, progress.tokens
        metrics["perf/tokens_per_s"] = progress.tokens / progress.seconds
        metrics["perf/data_wait"] = progress.waited / progress.seconds
        metrics["data/padding"] = 1 - tokens / places
        self.guard.judge(metrics, rescaled=self.engine.rescaled)
        progress.stopped = self._should_stop(metrics)
        return progress.step

    def _should_stop(self, metrics: dict[str, float]) -> bool:
        """Rank 0 decides and tells the others, so that none runs on alone."""
        if not self.config.early_stopping.enabled:
            return False
        seen = {"loss": metrics["train/loss"]}
        if not self.engine.rescaled:  # while float16's loss scale is found, gradients overflow that are small
            seen["grad_norm"] = metrics["optim/grad_norm"]
        if "train/value_loss" in metrics:
            seen["value_loss"] = metrics["train/value_loss"]
        if "value/std" in metrics and self.config.training.bounds_value_variance:
            seen["value_variance"] = metrics["value/std"] ** 2
        stop: bool = distributed.broadcast_object(self.stopper.should_stop(seen) if self.main else None)
        return stop

    def _evaluate(self) -> None:
        """Validate, and look at what the stage weighs; a new best is exported."""
        began = time.monotonic()
        self.validation = evaluate(self.engine, self.validation_batches, self.device)
        times = {"perf/evaluation_time": time.monotonic() - began}
        if self.pages is not None:
            times["perf/weights_time"] = self._look(self.pages)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in self.validation.items() if "head" not in name)
        self.display.say(f"step {self.progress.step:>6}/{self.data.total_steps}  {shown}")
        if self.tracker is not None:
            self.tracker.log(self.progress.step, self.validation | times)
        # Not `>=`: a loss that is NaN is never the best.
        if not self.validation["val/loss"] < self.progress.best:
            return
        self.progress.best = self.validation["val/loss"]
        if self.config.checkpoint.save_best:
            self._export(BEST)

    def _look(self, pages: WeightPages) -> float:
        """A page of what the stage weighs now; returns the seconds that it took."""
        began, before = time.monotonic(), pages.silent
        written = pages.write(self.engine, self.reference, self.progress.step)
        if self.tracker is not None and written:
            self.tracker.log_artifact(pages.folder)
        if self.tracker is not None and pages.silent and not before:
            self.tracker.set_tags({"weights": pages.silent})
        return time.monotonic() - began

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
            "guard": self.guard.state_dict(),
            "stopper": distributed.broadcast_object(self.stopper.state_dict()),
            "run_id": distributed.broadcast_object(None if self.tracker is None else self.tracker.run_id),
            "validation": self.validation,
            "random": random_state(self.device),
        }
        files = {"config.toml": self.resolved.toml()}
        saved = self.checkpoints.save(self.engine, self.progress.step, state, files, self.data.plan.global_batch)
        self.guard.came_by(saved)

    def _restore(self, source: Path) -> str | None:
        """Go on from a checkpoint; returns the id of its tracked run."""
        state = self.checkpoints.restore(self.engine, source, self.display.say)
        self.progress = Progress(**state["progress"])
        # A run that had stopped early goes on if the conditions are others now.
        self.progress.stopped &= same_table(source, self.resolved, "early_stopping")
        self.stopper.load_state_dict(state["stopper"])
        self.guard.load_state_dict(state["guard"])
        self.guard.came_by(source)
        self.validation = state["validation"]
        restore_random(state.get("random"), self.device, (self.config.runtime.seed, self.progress.step))
        self.display.say(f"resumed from {source} at step {self.progress.step} of {self.data.total_steps}")
        run_id: str | None = state["run_id"]
        return run_id

    def _roll_back(self, source: Path) -> None:
        """Be again what the run was when it wrote a checkpoint, but for what is not to be repeated."""
        best = self.progress.best
        self._restore(source)
        self.progress.best = min(best, self.progress.best)  # its export is there already
        if self.tracker is not None:
            self.tracker.go_back(self.progress.step)

    # --- beginning and end ---

    def start(self, run_name: str) -> None:
        """Make the run's folder ready, restore a checkpoint to resume from, and begin the tracked run."""
        if self.main:
            self.folder.prepare(self.display.say)
        distributed.barrier()
        source = self.folder.source(self.checkpoints, self.display.say)
        run_id = self._restore(source) if source is not None else None
        if self.config.mlflow.log_weights:
            self.pages = WeightPages(self.data, self.folder.root, self.device)
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
        if source is not None:
            self.tracker.go_back(self.progress.step)
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
        if self.tracker is not None:
            self.tracker.wait_for_run_id()  # which the export names; a run of seconds may end before it is known
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
        # The picture and the best checkpoint are sent while the tracker finishes.
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
            mlflow_run_id=self.tracker.run_id,
            skipped_steps=self.engine.skipped_steps,
            passed_over_steps=self.guard.passed_over,
            truncated_prompts=self.data.collator.truncated,
            **self.validation,
        )
        self.display.say(f"done: {self.folder.root}")


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30
