"""The sample data set: generated problems with correct solutions and mutants, every label earned by running."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from wmtp_ds.data.dataset_files import MANIFEST, code_version, finished
from wmtp_ds.data.import_folder import ImportFolder, finished_import
from wmtp_ds.data.labelled_rows import Source, labelled_rows, prompt_input
from wmtp_ds.data.labels import FunctionTests
from wmtp_ds.data.problems import DIFFICULTIES, TESTS, Problem, generate_problems
from wmtp_ds.data.sandbox import Limits
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.files import read_json

DEFAULT_PROBLEMS = 220  # more correct rows than an epoch of stage_configs/local reads
MIN_PROBLEMS = 2 * len(DIFFICULTIES)  # so that each difficulty occurs in training and in validation
SOLUTIONS = 3  # correct ones a problem, and as many incorrect ones
VALIDATION_FRACTION = 0.1
# Solutions here take milliseconds; only an endless loop takes this long.
LIMITS = Limits(cpu_seconds=0.25)
_PROBLEMS_PER_SANDBOX = 10  # the generator wrote them all


def _source(problem: Problem) -> Source:
    tests = FunctionTests(problem.tests)
    return Source(
        problem_id=problem.problem_id,
        instruction=problem.instruction,
        input=prompt_input(tests),
        references=problem.solutions,
        tests=tests,
        difficulty=problem.difficulty,
        metadata={"source": "sample", "family": problem.family, "entry_point": problem.entry_point},
    )


def _validation_ids(problems: list[Problem], seed: int) -> set[str]:
    """Problems held out, of each difficulty its share, at least one."""
    rng = Random(f"split-{seed}")
    held: set[str] = set()
    for difficulty in DIFFICULTIES:
        ids = [problem.problem_id for problem in problems if problem.difficulty == difficulty]
        held.update(rng.sample(ids, max(1, round(VALIDATION_FRACTION * len(ids)))))
    return held


def _is_sample(output: Path) -> bool:
    """Whether the folder holds sample data, which is made again where other options or other code ask for it."""
    try:
        manifest = read_json(output / MANIFEST)
        return bool(manifest["made_from"]["command"] == "data sample")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def make_sample(
    output: Path,
    *,
    problems: int = DEFAULT_PROBLEMS,
    seed: int = 0,
    on_start: Callable[[int], None] = lambda total: None,
    on_done: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Write ``train.jsonl`` and ``validation.jsonl`` into ``output``, or leave them if they are there already.

    The same arguments give the same bytes. Problems are split, not rows; no two problems share an instruction.

    Args:
        output: a folder.
        problems: how many problems, at least ``MIN_PROBLEMS``.
        seed: decides everything.
        on_start: called with the number of problems before they run.
        on_done: called with how many problems have run since the last call.

    Returns:
        The summary: counts of rows and runs, and ``reused``, whether the files were there.

    Raises:
        UserError: too few problems, other data in the folder, or it cannot be written.
        RunError: no sandbox works here, writing failed, or a generated solution failed its tests.
    """
    if problems < MIN_PROBLEMS:
        raise UserError(f"--problems {problems}: at least {MIN_PROBLEMS} are needed, two of each difficulty")
    made_from = {"command": "data sample", "problems": problems, "seed": seed, "code": code_version()}
    manifest = finished(output, made_from)
    if manifest is not None:
        return {**manifest["summary"], "reused": True}
    finished_import(output, made_from, force=_is_sample(output))
    with ImportFolder(output, made_from) as folder:
        generated = generate_problems(problems, seed, solutions=SOLUTIONS)
        on_start(len(generated))
        rows, report = labelled_rows(
            [_source(problem) for problem in generated],
            mutants_per_problem=SOLUTIONS,
            seed=seed,
            limits=LIMITS,
            groups_per_sandbox=_PROBLEMS_PER_SANDBOX,
            on_done=on_done,
        )
        if report.references_failed:
            raise RunError(
                "a generated solution failed its own tests, which is an error of the generator, or a machine too busy "
                f"to give a solution a quarter of a second: {report.references_failed[0]}"
            )
        held = _validation_ids(generated, seed)
        for problem, of_problem in zip(generated, rows, strict=True):
            split = "validation" if problem.problem_id in held else "train"
            folder.add_problem(split, None)
            for row in of_problem:
                folder.add_row(split, row)
        return folder.publish({"tests_per_problem": TESTS, **report.as_dict()})
