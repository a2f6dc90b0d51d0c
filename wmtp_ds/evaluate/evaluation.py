"""An evaluation from beginning to end: samples, verdicts, predictions, figures; each goes on where it was cut short."""

import json
import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wmtp_ds import __version__
from wmtp_ds.data.dataset_files import code_version, fingerprint_of
from wmtp_ds.data.text_encoder import TextEncoder
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.evaluate.files import SUMMARY
from wmtp_ds.evaluate.model import Place, load_model
from wmtp_ds.evaluate.problems import Problem, ProblemSet
from wmtp_ds.evaluate.results import VERDICTS, judge, summarise, write_results
from wmtp_ds.evaluate.samples import Prompter, SampleFiles, SampleOptions, draw_samples
from wmtp_ds.evaluate.teacher import predict
from wmtp_ds.files import read_json
from wmtp_ds.models.config_file import model_key

# (what is being done, what is counted) -> a context that gives start(total) and advance(count).
Progress = Callable[[str, str], AbstractContextManager[tuple[Callable[[int], None], Callable[[int], None]]]]
_FORMAT = 1  # raise it when the same model, problems and options give other files


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
        """All that decides the samples."""
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
            UserError: the model cannot be loaded, or the folder holds another evaluation.
            RunError: no sandbox works here, or a process that draws samples has failed.
        """
        made_from = self.made_from()
        finished = self._finished(made_from, force)
        if finished is not None:
            return finished | {"reused": True}
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {self.output}: cannot be made: {error.strerror}") from None
        files = SampleFiles(self.output, made_from)
        began = time.monotonic()
        drawn = self._draw(files, progress)
        seconds = time.monotonic() - began
        known = files.known()
        numbers = range(self.options.n_samples)
        samples = [known[problem.problem_id, number] for problem in self.problem_set.problems for number in numbers]
        with progress("running programs", "samples") as (start, advance):
            start(len(samples))
            results = judge(
                self.problem_set.problems,
                samples,
                self.output,
                made_from | {"code": code_version()},
                workers=self.workers,
                on_done=advance,
            )
        figures = summarise(results, self.ks)
        if drawn:
            figures["seconds_per_sample"] = seconds / drawn
        figures["prediction"] = self._predict(progress)
        summary = {
            "model": str(self.place.folder),
            "problems": self.problem_set.name,
            "left_out": self.problem_set.left_out,
            "figures": figures,
            "made_from": made_from,
        }
        write_results(self.output, results, self.ks, summary)
        files.remove()
        (self.output / f".partial-{VERDICTS}.journal").unlink(missing_ok=True)
        return summary | {"reused": False}

    def _finished(self, made_from: Mapping[str, Any], force: bool) -> dict[str, Any] | None:
        file = self.output / SUMMARY
        if not file.exists():
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
                model, tokenizer = load_model(self.place, device=torch.device(self.device), dtype=self.dtype)
                with files.journal(0) as journal:
                    prompter = Prompter(tokenizer, self.options.prompt)
                    draw_samples(model, prompter, missing, self.options, journal, advance)
            elif missing:
                self._draw_in_processes(files, missing, advance)
        return len(missing)

    def _draw_in_processes(
        self, files: SampleFiles, missing: Sequence[tuple[Problem, int]], advance: Callable[[int], None]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        told: multiprocessing.Queue[int | str] = context.Queue()
        started = []
        for number in range(self.processes):
            part = list(missing[number :: self.processes])
            process = context.Process(target=_draw_part, args=(self, files, part, number, told), daemon=True)
            process.start()
            started.append(process)
        running, error = set(range(self.processes)), ""
        while running and not error:
            try:
                said = told.get(timeout=1.0)
            except queue.Empty:
                # One that the system has ended has no last word.
                dead = [number for number in running if started[number].exitcode]
                error = f"it was ended with code {started[dead[0]].exitcode}" if dead else ""
                continue
            if isinstance(said, int) and said > 0:
                advance(said)
            elif isinstance(said, int):
                running.discard(-said)
            else:
                error = said
        for process in started:
            if error:
                process.terminate()
            process.join()
        if error:
            raise RunError(f"a process that draws samples has failed: {error}. What is drawn is kept in {self.output}.")

    def _predict(self, progress: Progress) -> dict[str, float] | None:
        """How well the heads predict the references; None where there are none."""
        references = [problem for problem in self.problem_set.problems if problem.reference is not None]
        if not references:
            return None
        model, tokenizer = load_model(self.place, device=torch.device(self.device), dtype=self.dtype)
        prompter, encoder = Prompter(tokenizer, self.options.prompt), TextEncoder(tokenizer, needs_bos=False)
        pairs = []
        for problem in references:
            solution = str(problem.reference)
            if self.options.prompt == "completion" and problem.beginning is not None:
                solution = solution.removeprefix(problem.beginning)
            pairs.append((prompter.tokens(problem), [*encoder([solution])[0], encoder.eos_id]))
        with progress("predicting references", "solutions") as (start, advance):
            start(len(pairs))
            return predict(model, pairs, batch_size=max(1, self.options.batch_size // 4), on_done=advance)


def _draw_part(
    evaluation: Evaluation,
    files: SampleFiles,
    part: list[tuple[Problem, int]],
    number: int,
    told: "multiprocessing.Queue[int | str]",
) -> None:
    """What one of several processes does; tells how many samples are done, and at its end −``number``, or an error."""
    try:
        device = torch.device("cpu")
        if evaluation.device == "cuda":
            device = torch.device("cuda", number % torch.cuda.device_count())
        else:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // evaluation.processes))
        model, tokenizer = load_model(evaluation.place, device=device, dtype=evaluation.dtype)
        with files.journal(number) as journal:
            prompter = Prompter(tokenizer, evaluation.options.prompt)
            draw_samples(model, prompter, part, evaluation.options, journal, told.put)
        told.put(-number)
    except Exception as error:
        told.put(f"{type(error).__name__}: {error}")


def to_json(summary: Mapping[str, Any]) -> str:
    """For programs."""
    return json.dumps({key: value for key, value in summary.items() if key != "made_from"})
