"""``--prompt completion``: the beginning of a function is the prompt itself."""

import json
from pathlib import Path

import pytest

from wmtp_ds.decoding import Completion
from wmtp_ds.evaluate.problems import Problem, read_problems
from wmtp_ds.evaluate.results import Result, summarise
from wmtp_ds.evaluate.samples import Prompter, Sample
from wmtp_ds.models.loading import load_tokenizer


def problem_of(folder: Path, prompt: str, solution: str) -> Problem:
    record = {"task_id": "HumanEval/0", "prompt": prompt, "entry_point": "f", "canonical_solution": solution}
    file = folder / "HumanEval.jsonl"
    file.write_text(json.dumps(record | {"test": "def check(candidate):\n    assert candidate(1) == 2\n"}))
    [problem] = read_problems(f"humaneval:{file}").problems
    return problem


@pytest.fixture
def prompter(solver: Path) -> Prompter:
    return Prompter(load_tokenizer(solver), "completion")


@pytest.mark.parametrize(
    ("prompt", "solution", "rest"),
    [
        ("def f(x):\n", "    return x + 1\n", "    return x + 1"),
        ("def f(x):\n    ", "return x + 1\n", "    return x + 1"),
        ("def f(x):\n\n", "    return x + 1\n", "\n    return x + 1"),
        ("def f(x): ", "return x + 1\n", None),
    ],
)
def test_a_reference_goes_on_where_the_prompt_ends(
    prompter: Prompter, tmp_path: Path, prompt: str, solution: str, rest: str | None
) -> None:
    problem = problem_of(tmp_path, prompt, solution)
    assert prompter.text(problem) == prompt.rstrip() + "\n"
    assert prompter.solution(problem) == rest


def test_a_reference_behind_a_template_is_whole(solver: Path, tmp_path: Path) -> None:
    problem = problem_of(tmp_path, "def f(x):\n", "    return x + 1\n")
    assert Prompter(load_tokenizer(solver), "alpaca").solution(problem) == problem.reference


def test_what_ended_at_the_next_function_is_not_cut_off(prompter: Prompter, solver: Path, tmp_path: Path) -> None:
    problem, tokenizer = problem_of(tmp_path, "def f(x):\n", "    return x + 1\n"), load_tokenizer(solver)

    def sample(text: str, *, ended: bool = False) -> Sample:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        return prompter.sample(problem, 0, Completion(tokens, ended, len(tokens)))

    samples = [sample("    return x + 1\ndef g"), sample("    return x + 1", ended=True), sample("    return")]
    assert samples[0].program == "def f(x):\n    return x + 1"
    assert [one.cut_off for one in samples] == [False, False, True]
    result = Result(problem, samples, [{"verdict": "passed", "evidence": ""}] * 3)
    assert summarise([result], [1])["cut_off"] == pytest.approx(1 / 3)
    assert [one["cut_off"] for one in result.record([1])["samples"]] == [False, False, True]
