"""Samples of a model on problems, written down one by one, so that a run that was cut short goes on."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from wmtp_ds.data.label_file_journal import Journal
from wmtp_ds.data.templates import get_template
from wmtp_ds.data.text_encoder import TextEncoder
from wmtp_ds.decoding import Completion, Limits, Sampling, generate, generate_by_transformers
from wmtp_ds.errors import UserError
from wmtp_ds.evaluate.answers import completed, is_over, program_of
from wmtp_ds.evaluate.model import Model
from wmtp_ds.evaluate.problems import Problem
from wmtp_ds.models.causal import learned_positions
from wmtp_ds.models.mtp import MTPLlamaForCausalLM

SAMPLES = "samples"
# The function's beginning is the prompt itself, for models that were not taught to follow instructions.
COMPLETION = "completion"


@dataclass(frozen=True)
class SampleOptions:
    """What samples depend on besides the model and the problems.

    Attributes:
        n_samples: of each problem.
        sampling: how tokens are chosen.
        max_new_tokens: of a sample.
        prompt: a template of `wmtp_ds.data.templates`, or "completion".
        speculative: draft with the extra heads.
        batch_size: samples at a time; no part of what decides them.
    """

    n_samples: int
    sampling: Sampling
    max_new_tokens: int = 512
    prompt: str = "alpaca"
    speculative: bool = False
    batch_size: int = 16

    def deciding(self) -> dict[str, Any]:
        """What another value of would give other samples."""
        return {name: value for name, value in asdict(self).items() if name != "batch_size"}


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
        problem_id, number: which.
        text: as the model wrote it.
        program: what is run of it.
        tokens: that were generated.
        passes: of the model for them, behind the prompt.
        ended: by the model itself.
        cut_off: reached the most tokens allowed without an end.
    """

    problem_id: str
    number: int
    text: str
    program: str
    tokens: int
    passes: int
    ended: bool
    cut_off: bool

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Sample":
        """As a line of the file has it."""
        return cls(**{name: entry[name] for name in cls.__dataclass_fields__})


def stream_of(problem_id: str, number: int) -> int:
    """The random numbers of a sample, whatever it is drawn together with."""
    return int.from_bytes(hashlib.sha256(f"{number}\0{problem_id}".encode()).digest()[:6], "big")


def check_beginnings(problems: Sequence[Problem], prompt: str) -> None:
    """Each problem can be asked in this way.

    Raises:
        UserError: beginnings are to be completed, and there are some without.
    """
    lacking = [problem.problem_id for problem in problems if problem.beginning is None]
    if prompt == COMPLETION and lacking:
        raise UserError(
            f"--prompt completion goes on with the beginning of a function, and {len(lacking)} of {len(problems)} "
            f"problems have none ({lacking[0]}): take --prompt alpaca or plain; problems of --problems humaneval have "
            "beginnings"
        )


class Prompter:
    """Problems to token ids, and token ids to samples."""

    def __init__(self, tokenizer: Any, prompt: str):
        self._tokenizer = tokenizer
        self._encoder = TextEncoder(tokenizer, needs_bos=False)
        self._template = None if prompt == COMPLETION else get_template(prompt)

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a sample."""
        return frozenset([self._encoder.eos_id])

    def text(self, problem: Problem) -> str:
        """The prompt of a problem."""
        if self._template is not None:
            return self._template(problem.row)
        assert problem.beginning is not None, "see check_beginnings"
        return problem.beginning.rstrip() + "\n"

    def solution(self, problem: Problem) -> str | None:
        """The reference, or what of it follows the prompt; None where there is none, or it begins otherwise."""
        if self._template is not None or problem.reference is None:
            return problem.reference
        prompt = self.text(problem)
        return problem.reference.removeprefix(prompt) if problem.reference.startswith(prompt) else None

    def tokens(self, problem: Problem) -> list[int]:
        """The prompt's token ids, BOS first where there is one."""
        return [*self._encoder.beginning, *self._encoder([self.text(problem)])[0]]

    def decode(self, tokens: Sequence[int]) -> str:
        """Token ids to text."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def is_over(self, tokens: Sequence[int]) -> bool:
        """Whether a completion of a function has come to its end; others end when the model says so."""
        return self._template is None and is_over(self.decode(tokens))

    def sample(self, problem: Problem, number: int, completion: Completion) -> Sample:
        """What came of a prompt."""
        text = self.decode(completion.tokens)
        program = completed(self.text(problem), text) if self._template is None else program_of(text)
        return Sample(
            problem.problem_id,
            number,
            text,
            program,
            len(completion.tokens),
            completion.passes,
            completion.ended,
            cut_off=not completion.ended and not self.is_over(completion.tokens),
        )


class SampleFiles:
    """Samples on the disk while a run draws them: a journal for each of the processes that do.

    Args:
        folder: of the evaluation.
        made_from: all that decides the samples, plain JSON; journals of something else begin anew.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any]):
        self._folder = folder
        self._made_from = made_from

    def journal(self, process: int) -> Journal:
        """That of one process, by number."""
        return Journal(self._folder / f"{SAMPLES}-{process}", self._made_from, _is_sample)

    def known(self) -> dict[tuple[str, int], Sample]:
        """All samples that there are, by problem and number.

        Raises:
            UserError: another process writes them.
        """
        found: dict[tuple[str, int], Sample] = {}
        for path in sorted(self._folder.glob(f".partial-{SAMPLES}-*.journal")):
            number = path.name.removeprefix(f".partial-{SAMPLES}-").removesuffix(".journal")
            if number.isdecimal():
                with self.journal(int(number)) as journal:
                    for sample in map(Sample.of, journal):
                        found[sample.problem_id, sample.number] = sample
        return found

    def remove(self) -> None:
        """The evaluation is done."""
        for path in self._folder.glob(f".partial-{SAMPLES}-*.journal"):
            path.unlink(missing_ok=True)


def _is_sample(entry: Mapping[str, Any]) -> bool:
    kinds = {"problem_id": str, "number": int, "text": str, "program": str, "tokens": int, "passes": int}
    kinds |= {"ended": bool, "cut_off": bool}
    return entry.keys() == kinds.keys() and all(type(entry[name]) is kind for name, kind in kinds.items())


def draw_samples(
    model: Model,
    prompter: Prompter,
    wanted: Sequence[tuple[Problem, int]],
    options: SampleOptions,
    journal: Journal,
    on_done: Callable[[int], None] = lambda count: None,
) -> None:
    """Draw samples, and enter each in a journal as soon as it is done.

    Args:
        model: of `wmtp_ds.evaluate.model.load_model`.
        prompter: of its tokenizer.
        wanted: problems, and the number of the sample.
        options: how.
        journal: entered.
        on_done: called with how many are done since the last call.

    Raises:
        UserError: the model has no positions for so many tokens.
    """
    prompts: dict[str, list[int]] = {}
    for problem, _ in wanted:
        if problem.problem_id not in prompts:
            prompts[problem.problem_id] = prompter.tokens(problem)
    _check_positions(model, prompts, options.max_new_tokens)

    def enter(place: int, completion: Completion) -> None:
        journal.append(asdict(prompter.sample(*wanted[place], completion)))
        on_done(1)

    complete = partial(generate_by_transformers, model)
    if isinstance(model, MTPLlamaForCausalLM):
        complete = partial(generate, model, speculative=options.speculative)
    complete(
        [prompts[problem.problem_id] for problem, _ in wanted],
        Limits(options.max_new_tokens, prompter.end_ids, prompter.is_over if options.prompt == COMPLETION else None),
        options.sampling,
        streams=[stream_of(problem.problem_id, number) for problem, number in wanted],
        batch_size=options.batch_size,
        on_done=enter,
    )


def _check_positions(model: Model, prompts: Mapping[str, Sequence[int]], max_new_tokens: int) -> None:
    most = learned_positions(model)
    if most is None or not prompts:
        return
    longest = max(prompts, key=lambda problem_id: len(prompts[problem_id]))
    tokens = len(prompts[longest])
    if tokens + max_new_tokens > most:
        mend = f"--max-new-tokens {most - tokens}" if tokens < most else "another model, or leave that problem out"
        raise UserError(
            f"the model has {most} positions, and the prompt of {longest} has {tokens} tokens, to which "
            f"--max-new-tokens adds {max_new_tokens}: take {mend}"
        )
