"""Samples of a model on problems, written down one by one, so that a run that was cut short goes on."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wmtp_ds.data.label_file_journal import Journal
from wmtp_ds.data.templates import get_template
from wmtp_ds.data.text_encoder import TextEncoder
from wmtp_ds.decoding import Completion, Limits, Sampling, generate
from wmtp_ds.evaluate.answers import completed, cut_completion, is_over, program_of
from wmtp_ds.evaluate.problems import Problem
from wmtp_ds.models.mtp import MTPLlamaForCausalLM

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
        ended: by the model itself; else it was cut off.
    """

    problem_id: str
    number: int
    text: str
    program: str
    tokens: int
    passes: int
    ended: bool

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Sample":
        """As a line of the file has it."""
        return cls(**{name: entry[name] for name in cls.__dataclass_fields__})


def stream_of(problem_id: str, number: int) -> int:
    """The random numbers of a sample, whatever it is drawn together with."""
    return int.from_bytes(hashlib.sha256(f"{number}\0{problem_id}".encode()).digest()[:6], "big")


class Prompter:
    """Problems to token ids, and token ids to samples."""

    def __init__(self, tokenizer: Any, prompt: str):
        self._tokenizer = tokenizer
        self._encoder = TextEncoder(tokenizer)
        self._template = None if prompt == COMPLETION else get_template(prompt)

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a sample."""
        return frozenset([self._encoder.eos_id])

    def text(self, problem: Problem) -> str:
        """The prompt of a problem."""
        if self._template is not None:
            return self._template(problem.row)
        return (problem.beginning or problem.row.instruction).rstrip() + "\n"

    def tokens(self, problem: Problem) -> list[int]:
        """The prompt's token ids, BOS first."""
        return [self._encoder.bos_id, *self._encoder([self.text(problem)])[0]]

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
        if self._template is not None:
            program = program_of(text)
        elif problem.beginning is not None:
            program = completed(self.text(problem), text)
        else:
            program = cut_completion(text)
        return Sample(
            problem.problem_id, number, text, program, len(completion.tokens), completion.passes, completion.ended
        )


def draw_samples(
    policy: MTPLlamaForCausalLM,
    prompter: Prompter,
    problems: Sequence[Problem],
    options: SampleOptions,
    file: Path,
    made_from: Mapping[str, Any],
    *,
    shard: tuple[int, int] = (0, 1),
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Sample]:
    """Draw the samples that a file lacks, and return all.

    Args:
        policy: see `wmtp_ds.decoding.generate`.
        prompter: of its tokenizer.
        problems: what to answer.
        options: how.
        file: samples are written there as they come; with another ``made_from`` it begins anew.
        made_from: all that decides the samples; plain JSON.
        shard: of all samples those with a number of this remainder: (remainder, divisor).
        on_done: called with how many are done since the last call, those in the file included.

    Raises:
        UserError: another process writes the file, or it cannot be written.
    """
    remainder, divisor = shard
    wanted = [(problem, number) for problem in problems for number in range(options.n_samples)][remainder::divisor]
    with Journal(file, made_from) as journal:
        found = {(sample.problem_id, sample.number): sample for sample in map(Sample.of, journal)}
        on_done(len(found))
        missing = [pair for pair in wanted if (pair[0].problem_id, pair[1]) not in found]

        def enter(place: int, completion: Completion) -> None:
            sample = prompter.sample(*missing[place], completion)
            journal.append(asdict(sample))
            found[sample.problem_id, sample.number] = sample
            on_done(1)

        prompts = {id(problem): prompter.tokens(problem) for problem, _ in missing}
        generate(
            policy,
            [prompts[id(problem)] for problem, _ in missing],
            Limits(
                options.max_new_tokens, prompter.end_ids, prompter.is_over if options.prompt == COMPLETION else None
            ),
            options.sampling,
            streams=[stream_of(problem.problem_id, number) for problem, number in missing],
            speculative=options.speculative,
            batch_size=options.batch_size,
            on_done=enter,
        )
    return [found[problem.problem_id, number] for problem, number in wanted]


def write_lines(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    from wmtp_ds.files import write_atomically

    write_atomically(file, "".join(json.dumps(record) + "\n" for record in records))
