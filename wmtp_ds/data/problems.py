"""Generates small Python problems that can be verified: instruction, solutions, tests; difficulties 1 to 11.

A problem is a chain of steps (``problem_steps``); its difficulty is the sum of their costs, so that it grows with
the number of steps and with how much thought each takes. Expected values in tests come from the steps' specs,
never from a solution. Everything is a pure function of the seed.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from wmtp_ds.data import (
    problem_elements,
    problem_grids,
    problem_lists,
    problem_numbers,
    problem_parsing,
    problem_sequences,
    problem_texts,
)
from wmtp_ds.data.problem_render import render
from wmtp_ds.data.problem_steps import KINDS, Step

DIFFICULTIES = range(1, 12)
TESTS = 6
_MAX_STEPS = 5
_MAX_INTEGER = 10_000  # of values between steps: trial division and the like stay quick
_MAX_CHARACTERS = 70  # of a test's expected value
_ATTEMPTS = 2000
_START_WEIGHTS = {"ints": 8, "text": 5, "int": 4, "grid": 3, "pairs": 2, "words": 1}
_PARAMETERS = {
    "ints": ("xs", "nums", "numbers", "values", "arr"),
    "int": ("n", "k", "num"),
    "text": ("s", "text", "string"),
    "words": ("words", "names"),
    "pairs": ("pairs", "tuples"),
    "grid": ("grid", "matrix", "rows"),
}
_OPENINGS = (
    "Write a function `{call}` that takes {inputs}{clauses} and returns {result}.",
    "Write a Python function `{call}` that takes {inputs}{clauses} and returns {result}.",
    "Implement `{call}`, which takes {inputs}{clauses} and returns {result}.",
)


@dataclass(frozen=True)
class Problem:
    """A problem with its solutions and tests.

    ``solutions`` are correct by construction (running them shows it), differently written, each a text that
    ``ast.unparse`` wrote. ``tests`` are asserts on the function ``entry_point``; the first is a typical case.
    """

    problem_id: str
    difficulty: int
    family: str
    instruction: str
    entry_point: str
    solutions: tuple[str, ...]
    tests: tuple[str, ...]


@functools.cache
def _fixed_steps() -> tuple[Step, ...]:
    """The steps without constants of their own."""
    return (
        *problem_sequences.runs_and_pairs(),
        *problem_sequences.two_arguments(),
        *problem_sequences.subsequences(),
        *problem_numbers.divisors(),
        *problem_numbers.counting(),
        *problem_texts.answers(),
        *problem_texts.two_strings(),
        *problem_parsing.brackets_and_expressions(),
        *problem_parsing.patterns(),
        *problem_grids.matrices(),
        *problem_grids.regions(),
        *problem_grids.pairs_and_graphs(),
    )


def _catalogue(rng: Random) -> dict[tuple[str, ...], list[Step]]:
    """All steps by what they take, with fresh constants."""
    steps = [
        *problem_elements.filters(rng),
        *problem_elements.replacements(rng),
        *problem_lists.rearrangements(rng),
        *problem_lists.results(rng),
        *problem_numbers.changes(rng),
        *problem_texts.characters(rng),
        *problem_texts.strings(rng),
        *problem_texts.word_lists(rng),
        *_fixed_steps(),
    ]
    catalogue: dict[tuple[str, ...], list[Step]] = {}
    for step in steps:
        catalogue.setdefault(step.takes, []).append(step)
    return catalogue


def _chain(difficulty: int, rng: Random) -> list[Step] | None:
    """Steps whose costs add up to the difficulty, or None where the dice led nowhere."""
    catalogue = _catalogue(rng)
    kind = rng.choices(list(_START_WEIGHTS), list(_START_WEIGHTS.values()))[0]
    steps: list[Step] = []
    left = difficulty
    while left:
        if steps:
            choice = [step for step in catalogue.get((steps[-1].gives,), []) if step.inputs is None]
        else:
            choice = [step for takes, found in catalogue.items() if takes[0] == kind for step in found]
        names = {step.name for step in steps}
        choice = [step for step in choice if step.cost <= left and step.name not in names]
        if len(steps) == _MAX_STEPS - 1:
            choice = [step for step in choice if step.cost == left]
        if not choice:
            return None
        # Squared costs: a hard problem is rather one hard step than a long chain of easy ones.
        step = rng.choices(choice, [step.cost**2 for step in choice])[0]
        steps.append(step)
        left -= step.cost
    return steps


def _small(value: Any, most: int) -> bool:
    if isinstance(value, (list, tuple, str)):
        return len(value) <= 60 and (isinstance(value, str) or all(_small(item, most) for item in value))
    return not isinstance(value, int) or abs(value) <= most


def _evaluate(steps: Sequence[Step], arguments: tuple[Any, ...]) -> Any:
    """What the steps' specs give, or None where a value on the way is too large."""
    value = steps[0].spec(*arguments)
    for step in steps[1:]:
        if not _small(value, _MAX_INTEGER):
            return None
        value = step.spec(value)
    return value if _small(value, 10**9) and len(repr(value)) <= _MAX_CHARACTERS else None


def _argument(kind: str, rng: Random) -> Any:
    """An argument of that kind, sometimes an empty one."""
    size = rng.choice((0, 1, 3, 4, 5, 6, 7))
    if kind == "ints":
        top = rng.choice((9, 20, 40))
        return [rng.randint(-top // 2, top) for _ in range(size)]
    if kind == "int":
        return rng.choice((rng.randint(-20, 20), rng.randint(0, 999)))
    words = [rng.choice(problem_texts.WORDS) for _ in range(min(size, 4))]
    if kind == "words":
        return words
    text = " ".join(word.title() if rng.random() < 0.3 else word for word in words)
    return "".join(rng.choice("0123456789aee ") if rng.random() < 0.1 else c for c in text)


def _tests(steps: Sequence[Step], name: str, rng: Random) -> tuple[str, ...] | None:
    """Asserts with different answers, or None where the function says too little to be worth testing."""
    make = steps[0].inputs
    by_answer: dict[str, dict[str, None]] = {}
    for _ in range(40):
        arguments = make(rng) if make else tuple(_argument(kind, rng) for kind in steps[0].takes)
        value = _evaluate(steps, arguments)
        if value is None:
            return None
        call = f"{name}({', '.join(map(repr, arguments))})"
        by_answer.setdefault(repr(value), {})[call] = None
    if len(by_answer) < (2 if steps[-1].gives == "flag" else 4):
        return None
    chosen: list[str] = []
    while len(chosen) < TESTS:  # one of each answer in turn: a constant must not pass
        left = [answer for answer, calls in by_answer.items() if calls]
        if not left:
            break
        for answer in left[: TESTS - len(chosen)]:
            call = rng.choice(list(by_answer[answer]))
            del by_answer[answer][call]
            chosen.append(f"assert {call} == {answer}")
    if len(chosen) < TESTS:
        return None
    typical = sorted(chosen, key=len)[-2]
    return (typical, *(test for test in chosen if test != typical))


def _name(steps: Sequence[Step], rng: Random) -> str:
    words = [step.name for step in steps][-3:]
    while len("_".join(words)) > 28 and len(words) > 1:
        words.pop(0)
    # One word alone might be a builtin's name, or a variable's.
    if len(words) == 1 and "_" not in words[0]:
        words.insert(0, rng.choice(("get", "find", "compute")))
    return "_".join(words)


def _instruction(steps: Sequence[Step], name: str, parameters: Sequence[str], rng: Random) -> str:
    inputs = [f"{KINDS[kind]} `{parameter}`" for kind, parameter in zip(steps[0].takes, parameters, strict=True)]
    listed = inputs[0] if len(inputs) == 1 else f"{', '.join(inputs[:-1])} and {inputs[-1]}"
    *before, last = steps
    clauses = [f"computes {step.text}" if step.is_noun else step.text for step in before]
    if not last.is_noun:
        clauses.append(last.text)
    return rng.choice(_OPENINGS).format(
        call=f"{name}({', '.join(parameters)})",
        inputs=listed,
        clauses="".join(f", {text}" for text in clauses),
        result=last.text if last.is_noun else "the result",
    )


def _solutions(steps: Sequence[Step], name: str, parameters: Sequence[str], count: int, rng: Random) -> tuple[str, ...]:
    """Different solutions, preferably such as differ in more than names."""
    found: dict[str, str] = {}
    spare: list[str] = []
    for _ in range(8 * count):
        text, plain = render(steps, name, parameters, rng)
        if plain not in found:
            found[plain] = text
        elif text not in found.values() and text not in spare:
            spare.append(text)
        if len(found) == count:
            break
    return tuple([*found.values(), *spare][:count])


def _problem(number: int, difficulty: int, solutions: int, rng: Random) -> Problem | None:
    steps = _chain(difficulty, rng)
    if steps is None:
        return None
    name = _name(steps, rng)
    parameters: list[str] = []
    for kind in steps[0].takes:
        parameters.append(rng.choice([word for word in _PARAMETERS[kind] if word not in parameters]))
    tests = _tests(steps, name, rng)
    if tests is None:
        return None
    return Problem(
        problem_id=f"sample-{number:05d}",
        difficulty=difficulty,
        family="+".join(step.name for step in steps),
        instruction=_instruction(steps, name, parameters, rng),
        entry_point=name,
        solutions=_solutions(steps, name, parameters, solutions, rng),
        tests=tests,
    )


def generate_problems(count: int, seed: int = 0, *, solutions: int = 3) -> list[Problem]:
    """Generate problems; difficulties 1 to 11 take turns, and no two share an instruction.

    Args:
        count: how many.
        seed: the same seed gives the same problems; a larger count only adds some.
        solutions: at most so many solutions each.

    Raises:
        RuntimeError: the generator ran out of new problems of a difficulty (tens of thousands exist).
    """
    rng = Random(f"problems-{seed}")
    problems: list[Problem] = []
    seen: set[str] = set()
    for number in range(count):
        difficulty = DIFFICULTIES[number % len(DIFFICULTIES)]
        for _ in range(_ATTEMPTS):
            problem = _problem(number, difficulty, solutions, rng)
            if problem is not None and problem.instruction not in seen:
                break
        else:
            raise RuntimeError(f"no new problem of difficulty {difficulty} after {_ATTEMPTS} attempts")
        seen.add(problem.instruction)
        problems.append(problem)
    return problems
