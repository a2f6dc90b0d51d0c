"""Generated problems: every form of every step against its meaning, and what makes a set of problems usable."""

import ast
import collections
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_ds.data import problems as module
from wmtp_ds.data.problem_elements import filters, replacements
from wmtp_ds.data.problem_lists import results
from wmtp_ds.data.problem_render import render
from wmtp_ds.data.problem_steps import KINDS, Step
from wmtp_ds.data.problems import DIFFICULTIES, TESTS, Problem, generate_problems

CATALOGUES = [module._catalogue(Random(seed)) for seed in range(3)]
PLACES = [(takes, place) for takes, steps in CATALOGUES[0].items() for place in range(len(steps))]


def _arguments(step: Step, rng: Random) -> tuple[Any, ...]:
    return step.inputs(rng) if step.inputs else tuple(module._argument(kind, rng) for kind in step.takes)


@pytest.mark.parametrize(
    ("takes", "place"), PLACES, ids=[f"{'-'.join(takes)}-{CATALOGUES[0][takes][place].name}" for takes, place in PLACES]
)
def test_every_form_computes_what_the_step_means(takes: tuple[str, ...], place: int) -> None:
    """With the constants of several catalogues."""
    rng = Random(1)
    for step in {id(catalogue[takes][place]): catalogue[takes][place] for catalogue in CATALOGUES}.values():
        programs = [compile(form, step.name, "exec") for form in step.forms]
        assert len(programs) >= 2
        for _ in range(15):
            arguments = _arguments(step, rng)
            expected = step.spec(*arguments)
            for program, form in zip(programs, step.forms, strict=True):
                namespace: dict[str, Any] = dict(zip(("IN", "IN2", "IN3"), arguments, strict=False))
                exec(program, namespace)
                assert namespace["OUT"] == expected, (form, arguments)
                assert type(namespace["OUT"]) is type(expected) or step.gives == "flag", form


def test_steps_fit_together() -> None:
    for step in (step for steps in CATALOGUES[0].values() for step in steps):
        assert {*step.takes, step.gives} <= set(KINDS)
        assert step.cost >= 1
        first = step.text.split()[0]
        assert (
            not step.is_noun or first.isdigit() or first in ("the", "it", "its", "how", "whether", "what", "which", "a")
        )
        if len(step.takes) > 1:
            assert step.inputs or step.takes == ("int", "int")


def _solve(source: str, problem: Problem) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(compile(source, problem.problem_id, "exec"), namespace)
    return namespace


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=4)
def test_solutions_pass_their_tests_and_differ(seed: int) -> None:
    problems = generate_problems(22, seed)
    for problem in problems:
        assert len(set(problem.solutions)) == len(problem.solutions) >= 2, problem
        for source in problem.solutions:
            assert ast.unparse(ast.parse(source)) == source
            namespace = _solve(source, problem)
            for test in problem.tests:
                exec(test, namespace)


def test_a_set_of_problems() -> None:
    problems = generate_problems(110, seed=3)
    assert len({problem.instruction for problem in problems}) == 110
    assert len({problem.problem_id for problem in problems}) == 110
    assert collections.Counter(problem.difficulty for problem in problems) == dict.fromkeys(DIFFICULTIES, 10)
    for problem in problems:
        call = problem.instruction.split("`")[1]
        assert call.startswith(f"{problem.entry_point}(")
        assert all(f"def {call}:" in source for source in problem.solutions)
        assert len(set(problem.tests)) == TESTS
        assert all(test.startswith(f"assert {problem.entry_point}(") for test in problem.tests)
        # A function that always gives the same answer must fail.
        assert len({test.rpartition(" == ")[2] for test in problem.tests}) > 1


def test_difficulty_is_the_cost_of_the_steps_and_harder_problems_are_longer() -> None:
    lengths = collections.defaultdict(list)
    for problem in generate_problems(132, seed=5, solutions=2):
        lengths[problem.difficulty].append(sum(map(len, problem.solutions)) / len(problem.solutions))
    mean = {difficulty: sum(found) / len(found) for difficulty, found in lengths.items()}
    assert mean[1] < mean[4] < mean[8] < mean[11]


def test_the_same_seed_gives_the_same_problems_and_more_only_adds() -> None:
    problems = generate_problems(40, seed=7)
    assert generate_problems(22, seed=7) == problems[:22]
    assert generate_problems(22, seed=8) != problems[:22]


def test_arrangements_of_the_same_steps_agree() -> None:
    """One loop, nested expressions, a recursion, a helper function: all occur, all compute the same."""
    found = {step.name: step for step in (*filters(Random(0)), *replacements(Random(0)), *results(Random(0)))}
    steps = [found["even"], found["squared"], found["positive"], found["sum"]]
    seen = set()
    for seed in range(60):
        source, plain = render(steps, "f", ["xs"], Random(seed))
        namespace: dict[str, Any] = {}
        exec(source, namespace)
        assert [namespace["f"](xs) for xs in ([], [3], [1, -2, 4, 0, 5, 6])] == [0, 0, 56], source
        seen.add(plain)
    assert len(seen) > 30
    for mark in ("continue", "f(ARGUMENT0[1:])", "_of(", "lambda", "sum("):
        assert any(mark in plain for plain in seen), mark
