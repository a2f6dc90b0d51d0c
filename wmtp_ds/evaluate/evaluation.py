"""An evaluation from beginning to end: samples, verdicts, predictions, figures; each goes on where it was cut short."""

import json
import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wmtp_ds import __version__
from wmtp_ds.data.dataset_files import code_version, fingerprint_of
from wmtp_ds.data.label_file_journal import begun_from
from wmtp_ds.data.text_encoder import TextEncoder
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.evaluate.files import RESULTS, SUMMARY
from wmtp_ds.evaluate.model import Place, load_model
from wmtp_ds.evaluate.problems import Problem, ProblemSet
from wmtp_ds.evaluate.results import VERDICTS, judge, summarise, write_results
from wmtp_ds.evaluate.samples import Prompter, SampleFiles, SampleOptions, check_beginnings, draw_samples
from wmtp_ds.evaluate.teacher import predict
from wmtp_ds.files import read_json, try_lock
from wmtp_ds.models.causal import learned_positions
from wmtp_ds.models.config_file import model_key
from wmtp_ds.out_of_memory import is_out_of_memory
from wmtp_ds.signals import die_with_parent
from wmtp_ds.tracking_state import METRICS_FILE, STATE_FILE

# (what is being done, what is counted) -> a context that gives start(total) and advance(count).
Progress = Callable[[str, str], AbstractContextManager[tuple[Callable[[int], None], Callable[[int], None]]]]
_FORMAT = 2  # raise it when the same model, problems and options give other files
# What an evaluation's folder holds, besides names that begin with a dot; `previous` is of `start_tracking`.
_OURS = frozenset((RESULTS, SUMMARY, METRICS_FILE, STATE_FILE, "previous"))
_LOCK = ".evaluate.lock"


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and how.

    Attributes:
        place: of the model.
        problem_set: what it is asked.
        options: how samples are drawn.
        ks: of pass@k; none is larger than the number of samples.
        output: a folder of the evaluation's own.
        device: "cuda" or "cpu".
        dtype: of the weights; None: see `load_model`.
        processes: that draw samples side by side, each with a copy of the model.
        workers: sandboxes at a time; None: one a CPU.
    """

    place: Place
    problem_set: ProblemSet
    options: SampleOptions
    ks: tuple[int, ...]
    output: Path
    device: str
    dtype: str | None = None
    processes: int = 1
    workers: int | None = None

    def made_from(self) -> dict[str, Any]:
        """All that decides the samples and the figures."""
        problems = [
            [problem.problem_id, asdict(problem.row), problem.beginning, repr(problem.tests), repr(problem.limits)]
            for problem in self.problem_set.problems
        ]
        return {
            "command": "evaluate",
            "format": _FORMAT,
            "version": __version__,
            "model": model_key(self.place.folder),
            "problems": fingerprint_of(problems),
            "references": fingerprint_of([problem.reference for problem in self.problem_set.problems]),
            "options": self.options.deciding(),
            "dtype": self.dtype,
            "device": self.device,
        }

    def run(self, progress: Progress, *, force: bool = False) -> dict[str, Any]:
        """The summary; also written, with a line a problem, into ``output``.

        Args:
            progress: shows how far it is.
            force: replace an evaluation of something else.

        Raises:
            UserError: the model cannot be loaded or the problems not be asked in this way, or the folder holds
                something else or is another command's just now.
            RunError: no sandbox works here, a process that draws samples has failed, the memory is too small, or the
                model was replaced meanwhile.
        """
        check_beginnings(self.problem_set.problems, self.options.prompt)
        self._check_output()
        with self._alone():
            made_from = self.made_from()
            finished = self._finished(made_from, force)
            if finished is not None:
                return finished | {"reused": True}
            return self._evaluate(made_from, progress) | {"reused": False}

    def _check_output(self) -> None:
        """The folder is there, and an evaluation's own."""
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            names = sorted(path.name for path in self.output.iterdir())
        except OSError as error:
            raise UserError(f"--output {self.output}: cannot be made: {error.strerror}") from None
        foreign = [name for name in names if name not in _OURS and not name.startswith(".")]
        if foreign:
            raise UserError(
                f"--output {self.output}: holds other files ({foreign[0]}): name a folder for the evaluation alone"
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else evaluates into the folder; the lock ends with the process, however it ends."""
        try:
            lock = (self.output / _LOCK).open("ab")
        except OSError:  # a folder that may only be read: nobody writes to it
            yield
            return
        with lock:
            if not try_lock(lock):
                raise UserError(
                    f"--output {self.output}: another process evaluates into it: wait for it, or give another --output"
                )
            yield

    def _evaluate(self, made_from: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        files = SampleFiles(self.output, made_from)
        began = time.monotonic()
        drawn = self._draw(files, progress)
        seconds = time.monotonic() - began
        self._check_model(files, made_from)
        known = files.known()
        numbers = range(self.options.n_samples)
        samples = [known[problem.problem_id, number] for problem in self.problem_set.problems for number in numbers]
        with progress("running programs", "samples") as (start, advance):
            start(len(samples))
            results = judge(
                self.problem_set.problems,
                samples,
                self.output,
                {**made_from, "code": code_version()},
                workers=self.workers,
                on_done=advance,
            )
        figures = summarise(results, self.ks)
        if drawn:
            figures["seconds_per_sample"] = seconds / drawn
        figures["prediction"] = self._predict(progress)
        self._check_model(files, made_from)
        summary = {
            "model": str(self.place.folder),
            "problems": self.problem_set.name,
            "left_out": self.problem_set.left_out,
            "figures": figures,
            "made_from": made_from,
        }
        write_results(self.output, results, self.ks, summary)
        self._remove_partial(files)
        return summary

    def _remove_partial(self, files: SampleFiles) -> None:
        files.remove()
        (self.output / f".partial-{VERDICTS}.journal").unlink(missing_ok=True)

    def _check_model(self, files: SampleFiles, made_from: Mapping[str, Any]) -> None:
        """The model is still the one that it was.

        Raises:
            RunError: it is not; what was drawn is of both, and removed.
        """
        try:
            same = model_key(self.place.folder) == made_from["model"]
        except OSError:  # it is being replaced just now
            same = False
        if not same:
            self._remove_partial(files)
            raise RunError(
                f"{self.place.folder} was replaced while it was evaluated, so samples of two models are mixed, and "
                "dropped. A run that still trains replaces its best export: evaluate one of its checkpoints (step_…), "
                "or wait until it has ended; then give the same command again"
            )

    def _finished(self, made_from: Mapping[str, Any], force: bool) -> dict[str, Any] | None:
        file = self.output / SUMMARY
        if not file.exists():
            self._check_partial(made_from, force)
            return None
        try:
            summary = read_json(file)
            same, has_all = summary["made_from"] == made_from, all(f"pass@{k}" in summary["figures"] for k in self.ks)
        except (OSError, ValueError, KeyError, TypeError):
            same = has_all = False
        if same and has_all:
            return dict(summary)
        if force:
            file.unlink()
            return None
        raise UserError(
            f"--output {self.output}: holds another evaluation (of another model, other problems or options): give "
            "another --output, or --force to replace it"
        )

    def _check_partial(self, made_from: Mapping[str, Any], force: bool) -> None:
        """What was cut short here is this evaluation, or nothing: what is of another would be thrown away."""
        for journal in sorted(self.output.glob(".partial-*.journal")):
            begun = begun_from(journal, needs_entry=True)
            # Which code runs the programs decides verdicts alone, and these are soon made again.
            if begun is not None and {key: value for key, value in begun.items() if key != "code"} != made_from:
                if force:
                    journal.unlink(missing_ok=True)
                    continue
                raise UserError(
                    f"--output {self.output}: holds another evaluation that was cut short (of another model, other "
                    "problems or options): give another --output, or --force to drop it"
                )

    def _draw(self, files: SampleFiles, progress: Progress) -> int:
        """Draw what is missing; returns how many that was."""
        known = files.known()
        numbers = range(self.options.n_samples)
        wanted = [(problem, number) for problem in self.problem_set.problems for number in numbers]
        missing = [pair for pair in wanted if (pair[0].problem_id, pair[1]) not in known]
        with progress("drawing samples", "samples") as (start, advance):
            start(len(wanted))
            advance(len(wanted) - len(missing))
            if missing and self.processes == 1:
                with self._memory(self.options.batch_size), files.journal(0) as journal:
                    model, tokenizer = load_model(self.place, device=torch.device(self.device), dtype=self.dtype)
                    prompter = Prompter(tokenizer, self.options.prompt)
                    draw_samples(model, prompter, missing, self.options, journal, advance)
            elif missing:
                self._draw_in_processes(files, missing, advance)
        return len(missing)

    @contextmanager
    def _memory(self, rows: int) -> Iterator[None]:
        """Raises RunError where the memory is too small."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                f"out of memory with {rows} sequences at a time on each of {self.processes} copies of the model: lower "
                "--batch-size or --processes; the same command goes on"
            ) from None

    def _draw_in_processes(
        self, files: SampleFiles, missing: Sequence[tuple[Problem, int]], advance: Callable[[int], None]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        told: multiprocessing.Queue[int | UserError] = context.Queue()
        started = []
        for number in range(self.processes):
            part = list(missing[number :: self.processes])
            process = context.Process(
                target=_draw_part, args=(self, files, part, number, told, os.getpid()), daemon=True
            )
            process.start()
            started.append(process)
        running = set(range(self.processes))
        error: UserError | None = None
        while running and error is None:
            try:
                said = told.get(timeout=1.0)
            except queue.Empty:
                # One that the system has ended has no last word.
                dead = [number for number in running if started[number].exitcode]
                if dead:
                    error = RunError(f"it was ended with code {started[dead[0]].exitcode}")
                continue
            if isinstance(said, int) and said > 0:
                advance(said)
            elif isinstance(said, int):
                running.discard(-said)
            else:
                error = said
        for process in started:
            if error is not None:
                process.terminate()
            process.join()
        if error is not None:
            kind = RunError if error.exit_code == RunError.exit_code else UserError
            raise kind(f"a process that draws samples has failed: {error}. What is drawn is kept in {self.output}.")

    def _predict(self, progress: Progress) -> dict[str, float] | None:
        """How well the heads predict the references; None where there are none."""
        references = [problem for problem in self.problem_set.problems if problem.reference is not None]
        if not references:
            return None
        model, tokenizer = load_model(self.place, device=torch.device(self.device), dtype=self.dtype)
        prompter, encoder = Prompter(tokenizer, self.options.prompt), TextEncoder(tokenizer, needs_bos=False)
        pairs, most = [], learned_positions(model)
        for problem in references:
            if (solution := prompter.solution(problem)) is not None:
                pairs.append((prompter.tokens(problem), [*encoder([solution])[0], encoder.eos_id]))
        fitting = [pair for pair in pairs if most is None or len(pair[0]) + len(pair[1]) <= most]
        rows = max(1, self.options.batch_size // 4)
        with progress("predicting references", "solutions") as (start, advance), self._memory(rows):
            start(len(fitting))
            figures = predict(model, fitting, batch_size=rows, on_done=advance)
        if len(fitting) < len(pairs):
            figures["references_left_out"] = len(pairs) - len(fitting)
        return figures


def _draw_part(
    evaluation: Evaluation,
    files: SampleFiles,
    part: list[tuple[Problem, int]],
    number: int,
    told: "multiprocessing.Queue[int | UserError]",
    parent: int,
) -> None:
    """What one of several processes does; tells how many samples are done, and at its end −``number``, or an error."""
    die_with_parent()
    if os.getppid() != parent:  # it has died while this process began
        os._exit(1)
    try:
        device = torch.device("cpu")
        if evaluation.device == "cuda":
            device = torch.device("cuda", number % torch.cuda.device_count())
        else:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // evaluation.processes))
        with evaluation._memory(evaluation.options.batch_size), files.journal(number) as journal:
            model, tokenizer = load_model(evaluation.place, device=device, dtype=evaluation.dtype)
            prompter = Prompter(tokenizer, evaluation.options.prompt)
            draw_samples(model, prompter, part, evaluation.options, journal, told.put)
        told.put(-number)
    except UserError as error:
        told.put(error)
    except Exception as error:
        told.put(RunError(f"{type(error).__name__}: {error}"))


def to_json(summary: Mapping[str, Any]) -> str:
    """For programs."""
    return json.dumps({key: value for key, value in summary.items() if key != "made_from"})
