"""Labels: verdict and evidence of function tests and programs, and attempts to get a better one than deserved."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from wmtp_ds.data.frames import RunReport
from wmtp_ds.data.labels import (
    FunctionTests,
    Group,
    Label,
    StdioTests,
    label,
    label_batch,
    label_groups,
    plan_checks,
    show,
)
from wmtp_ds.data.labels_output import Comparison
from wmtp_ds.data.sandbox import FunctionRun, Limits, Verdict, run_job

QUICK = Limits(cpu_seconds=0.5, wall_seconds=3.0, memory_bytes=256 << 20)
DOUBLE = FunctionTests(("assert f(1) == 2", "assert f(2) == 4", "assert f(0) == 0"))


def _label(solution: str, *asserts: str, setup: str = "") -> Label:
    return label(textwrap.dedent(solution), FunctionTests(asserts, setup), QUICK)


def test_a_right_solution_passes() -> None:
    assert label("def f(x):\n    return 2 * x", DOUBLE) == Label(Verdict.PASSED, 3, 3)


def test_a_wrong_one_fails_with_the_first_test_as_evidence() -> None:
    found = label("def f(x):\n    return x * x", DOUBLE)
    assert found == Label(Verdict.WRONG, 2, 3, "test 1 of 3: f(1) gave 1, not 2")
    assert not found.is_correct


@pytest.mark.parametrize(
    ("solution", "verdict", "evidence"),
    [
        ("def f(x): return 1 / x", Verdict.WRONG, "test 1 of 3: f(1) gave 1.0, not 2"),
        ("def f(x): return [][x]", Verdict.ERROR, "test 1 of 3: IndexError: list index out of range"),
        ("def f(x) return x", Verdict.ERROR, "loading the solution: SyntaxError: "),
        ("import numpy_is_not_here", Verdict.ERROR, "loading the solution: ModuleNotFoundError: "),
        ("def g(x): return x", Verdict.ERROR, "test 1 of 3: NameError: name 'f' is not defined"),
        ("def f(x): return f(x)", Verdict.ERROR, "test 1 of 3: RecursionError: "),
        ("def f(x):\n    while True: pass", Verdict.TIMEOUT, "test 1 of 3: over the time limit"),
        ("while True: pass", Verdict.TIMEOUT, "test 1 of 3: over the time limit"),
        ("def f(x): return bytearray(10**9)", Verdict.MEMORY, "test 1 of 3: out of memory"),
        ("x = [0] * 10**9", Verdict.MEMORY, "loading the solution: out of memory"),
        ("def f(x): return object()", Verdict.WRONG, "test 1 of 3: f(1) gave <object>, not 2"),
        ("def f(x): raise ValueError(object())", Verdict.ERROR, "test 1 of 3: ValueError: <object object at 0x...>"),
        ("import os\nos.kill(os.getpid(), 11)", Verdict.ERROR, "test 1 of 3: killed by signal 11"),
    ],
)
def test_verdicts_and_evidence(solution: str, verdict: Verdict, evidence: str) -> None:
    found = label(solution, DOUBLE, QUICK)
    assert found.verdict is verdict
    assert found.evidence.startswith(evidence)
    assert found == label(solution, DOUBLE, QUICK)


@pytest.mark.parametrize(
    ("solution", "test", "passes"),
    [
        ("def f(): return {3, 1}", "assert f() == {1, 3}", True),
        ("def f(): return (1, [2.5, 'x'], {1: None})", "assert f() == (1, [2.5, 'x'], {1: None})", True),
        ("def f(): return [1, 2]", "assert f() == (1, 2)", False),
        ("def f(): return -1", "assert -1 == f()", True),
        ("def f(): return 1", "assert f() is True", False),
        ("def f(): return True", "assert f() is True", True),
        ("def f(): return None", "assert f() is None, 'message'", True),
        ("def f(): return None", "assert not f()", True),
        ("def f(): return [0]", "assert f()", True),
        ("def f(): return []", "assert f()", False),
        ("def f(): return 0.1 + 0.2", "assert abs(f() - 0.3) < 1e-9", True),
        ("def f(): return 0.1 + 0.2", "assert f() == 0.3", False),
        ("import sys\ndef f(): return sys.getsizeof(1)", "assert f() == sys.getsizeof(1)", True),
        ("def f(): return 1", "assert f() != 2", True),
        ("def f(): return 1", "assert 0 < f() < 1", False),
        ("def f(): return [3, 1]", "assert sorted(f()) == [1, 3]", True),
        ("def f(): return 4", "x = f()\ny = x + 1\nassert y == 5\nassert x == 4", True),
        ("def f(): return 4", "x = f()\nassert x == 4\nassert x == 5", False),
        ("def f(): return float('nan')", "assert f() == float('nan')", False),
        ("from collections import Counter\ndef f(): return Counter('a')", "assert f() == {'a': 1}", True),
    ],
)
def test_forms_of_tests(solution: str, test: str, passes: bool) -> None:
    found = _label(solution, test)
    assert found.is_correct is passes, found.evidence
    assert found.verdict is (Verdict.PASSED if passes else Verdict.WRONG)


def test_setup_runs_after_the_solution_and_before_the_tests() -> None:
    solution = "class Node:\n    def __init__(self, x): self.x = x\ndef f(n): return n.x"
    assert _label(solution, "assert f(a) == 3", setup="a = Node(3)").is_correct
    broken = _label(solution, "assert f(a) == 3", "assert f(a) == 3", setup="a = Leaf(3)")
    assert (broken.verdict, broken.passed) == (Verdict.ERROR, 0)
    assert broken.evidence.startswith("setup: NameError")


NODE = "class Node:\n    def __init__(self, x): self.x = x\n    def more(self): return Node(self.x + 1)\n"


@pytest.mark.parametrize(
    ("solution", "test", "passes"),
    [
        # Judged in a process of their own: what is data comes over, what is not stays and is called.
        ("def f(x): return 2 * x", "assert f(2) == 8 // 2", True),
        ("def f(x): return 2 * x", "assert f(2) == f(f(1))", True),
        ("def f(x): return 2 * x", "assert f(2) == f(1)", False),
        ("def f(x): x.append(3)", "a = [1]\nf(a)\nassert a == [1] + [3]", True),
        ("def f(x): x.clear()", "a, b, c = [1], {1: 1}, {1}\nf(a)\nf(b)\nf(c)\nassert not (a or b or c)", True),
        ("def f(x, *, y=1): return x * y", "assert f(2, y=3) == 5 + 1", True),
        ("def f(g, x): return g(x)", "assert f(lambda x: x + 1, 2) == 2 + 1", True),
        ("def f(g): return g()", "def g(): raise KeyError('k')\nassert f(g) == 1 + 0", False),
        (
            "def f(x): raise ValueError('no')",
            "try: f(1)\nexcept ValueError as e: a = str(e)\nassert a == 'n' + 'o'",
            True,
        ),
        ("def f(x):\n    yield from range(x)", "assert [*f(3)] == [*range(3)]", True),
        ("def f(x):\n    yield x", "assert next(f(3)) == 1 + 2 and sum(f(3)) > 2", True),
        ("from collections import deque\ndef f(*x): return deque(x)", "assert not f() and len(f(1)) == 0 + 1", True),
        ("from collections import deque\ndef f(*x): return deque(x)", "assert f(1)[0] + 0 == 2 - 1", True),
        (NODE, "assert Node(1).more().x == 1 + 1", True),
        (NODE, "a = Node(1)\nassert isinstance(a, Node) and not isinstance(1, Node) and a is not None", True),
        (NODE + "def f(n): return n.x", "assert f(Node(3)) == 2 + 1", True),
        (NODE + "def f(n): return n", "a = Node(1)\nassert f(a) is a and (f(a) == a) is True", True),
        ("LIMIT = [1, 2]", "assert sum(LIMIT) == 2 + 1 and LIMIT is not LIMIT", True),
        ("def f(x): return x", "import math\nassert math.isclose(f(0.1) + f(0.2), 0.3)", True),
        ("import math\nmath.isclose = lambda *a: True\ndef f(x): return x", "assert math.isclose(f(1), 2)", False),
        ("def sum(x, y): return x + y", "assert not sum(1, 2) != 3", True),
        ("def f(x): return x", "assert abs(f(-1)) == 2 - 1", True),
        ("def f(x): return x + y", "assert f(1) == 1 + 1", False),
        ("def g(x): return x", "assert f(1) == 1 + 1", False),
        ("def f(x): return 1 / 0", "assert f(1) == 1 + 1", False),
        ("import fractions\ndef f(x): return fractions.Fraction(x, 2)", "assert f(1) + f(1) == 2 - 1", True),
        ("def f(x): return (x, {x: [x, None, True, 1.5, 'a', b'b', 1j, {x}]})", "assert [*f(1)[1]] == [2 - 1]", True),
    ],
)
def test_tests_that_judge_by_themselves(solution: str, test: str, passes: bool) -> None:
    found = _label(solution, test)
    assert found.is_correct is passes, found
    if not passes:
        assert found.verdict in (Verdict.WRONG, Verdict.ERROR)


def test_objects_of_the_tests_themselves_go_where_the_solution_is() -> None:
    """Such tests cannot be judged apart from the solution."""
    setup = "class Own:\n    def __init__(self, x): self.x = x"
    assert _label("def f(own): return own.x", "assert f(Own(3)) == 1 + 2", setup=setup).is_correct
    assert not _label("def f(own): return own.x", "assert f(Own(3)) == 2 + 2", setup=setup).is_correct
    held = "own = Own(3)\nfound = f(own)\nassert found == 1 + 2"
    assert _label("def f(own): return own.x", held, setup=setup).is_correct
    assert not _label("def f(own): return 0", held, setup=setup).is_correct


def test_an_assertion_in_a_test_is_a_wrong_answer() -> None:
    check = "def check(f):\n    for n in range(3):\n        assert f(n) == 2 * n, f'at {n}'"
    test = "check(f)\nassert True"
    assert _label("def f(x): return 2 * x", test, setup=check).is_correct
    found = _label("def f(x): return x", test, setup=check)
    assert (found.verdict, found.passed) == (Verdict.WRONG, 0)
    assert found.evidence == "test 1 of 1: an assertion failed: at 1"


def test_the_solution_is_shown_no_tests_that_it_need_not_see() -> None:
    """Setup with expected results runs with the solution only where a test is evaluated there."""
    setup = "expected = [2, 4]"
    peeking = "def f(x): return globals()['expected'][x - 1]"
    assert not _label(peeking, "assert f(1) == expected[0]", setup=setup).is_correct
    assert _label("def f(x): return 2 * x", "assert f(1) == expected[0]", setup=setup).is_correct


def test_a_programs_cases_end_with_the_first_that_fails() -> None:
    cases = (("1", "1"), ("2", "3"), ("3", "3"), ("x", "x"))
    asked = []

    def counting(runs: Sequence[Any], *args: Any, go_on: Callable[[RunReport], bool], **options: Any) -> Any:
        def asking(report: RunReport) -> bool:
            asked.append(report.stdout)
            return go_on(report)

        return run_job(runs, *args, go_on=asking, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wmtp_ds.data.labels.run_job", counting)
        found = label("print(input())", StdioTests(cases), QUICK)
    assert found == Label(Verdict.WRONG, 1, 4, "test 2 of 4: wrote '2\\n', not '3'")
    assert asked == [b"1\n", b"2\n"]


@pytest.mark.parametrize(
    ("wanted", "written", "comparison", "same"),
    [
        ("1 2\n3", b"1 2 \r\n3\n\n", Comparison(), True),
        ("1 2\n3", b" 1 2\n3", Comparison(), False),
        ("1 2\n3", b"1  2\n3", Comparison(), False),
        ("1 2\n3", b"1  2 3", Comparison("tokens"), True),
        ("1 2", b"12", Comparison("tokens"), False),
        ("0.5", b"0.500", Comparison(), False),
        ("0.5 a", b"0.500001 a", Comparison(tolerance=1e-4), True),
        ("0.5 a", b"0.501 a", Comparison(tolerance=1e-4), False),
        ("0.5 a", b"0.5 b", Comparison(tolerance=1e-4), False),
        ("1e9", b"1000000001.0", Comparison(tolerance=1e-4), True),
        ("1000000000", b"1000000001", Comparison(tolerance=1e-4), False),
        ("0.5", b"nan", Comparison(tolerance=1e-4), False),
        ("0.5\n0.5", b"0.5", Comparison(tolerance=1e-4), False),
        ("0.5 0.5", b"0.5", Comparison("tokens", 1e-4), False),
        ("a.b", b"a.c", Comparison("tokens", 1e-4), False),
        ("\ufffd", b"\xff", Comparison(), False),
    ],
)
def test_outputs_are_compared(wanted: str, written: bytes, comparison: Comparison, same: bool) -> None:
    assert comparison.same(wanted, written) is same


def test_what_a_broken_sandbox_left_untold_runs_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = []

    def breaking(runs: Sequence[FunctionRun], *args: Any, **options: Any) -> list[RunReport]:
        reports = run_job(runs, *args, **options)
        if len(runs) == 1:
            alone.append(runs[0].source)
            return reports
        return [RunReport(damaged=True, ended="exit"), *(RunReport() for _ in reports[1:])]

    monkeypatch.setattr("wmtp_ds.data.labels.run_job", breaking)
    sources = ("def f(x): return 2 * x", "def f(x): return x", "def f(x): return x + x")
    [labels] = label_batch([Group(sources, DOUBLE)], QUICK)
    assert [one.is_correct for one in labels] == [True, False, True]
    assert alone == [*sources]


DOUBLE_LINES = StdioTests((("3\n", "6\n"), ("4\n", "8")))


@pytest.mark.parametrize(
    ("program", "verdict", "passed", "evidence"),
    [
        ("print(2 * int(input()))", Verdict.PASSED, 2, ""),
        ("import sys\nfor line in sys.stdin:\n    print(int(line) * 2, '  ')\n    print()", Verdict.PASSED, 2, ""),
        ("import os\nx = int(os.read(0, 9))\nos.write(1, b'%d' % (2 * x))\nos._exit(0)", Verdict.PASSED, 2, ""),
        ("print(6)", Verdict.WRONG, 1, "test 2 of 2: wrote '6\\n', not '8'"),
        ("print('passed')", Verdict.WRONG, 0, "test 1 of 2: wrote 'passed\\n', not '6\\n'"),
        ("print(2 * int(input()))\nexit(1)", Verdict.ERROR, 0, "test 1 of 2: exit code 1"),
        ("print(int(input()) // 0)", Verdict.ERROR, 0, "test 1 of 2: ZeroDivisionError: "),
        ("while True: pass", Verdict.TIMEOUT, 0, "test 1 of 2: over the time limit"),
        ("import time\ntime.sleep(9)", Verdict.TIMEOUT, 0, "test 1 of 2: over the time limit"),
        ("x = bytearray(10**10)", Verdict.MEMORY, 0, "test 1 of 2: out of memory"),
        ("print('x' * 2 * 10**6)", Verdict.ERROR, 0, "test 1 of 2: wrote more than the output limit"),
        ("import sys\nsys.stdout.write('6')\nif input() == '4': sys.exit('no')", Verdict.ERROR, 1, "test 2 of 2: exit"),
        ("def f(:", Verdict.ERROR, 0, "test 1 of 2: SyntaxError: "),
    ],
)
def test_programs(program: str, verdict: Verdict, passed: int, evidence: str) -> None:
    found = label(program, DOUBLE_LINES, Limits(cpu_seconds=0.5, wall_seconds=1.0))
    assert (found.verdict, found.passed, found.total) == (verdict, passed, 2)
    assert found.evidence.startswith(evidence)


def test_many_groups_keep_their_order_and_tell_of_progress() -> None:
    def group(k: int) -> Group:
        return Group((f"def f(x): return x + {k}", "def f(x): return x"), FunctionTests((f"assert f(1) == {1 + k}",)))

    counted: list[int] = []
    groups = [*(group(k) for k in range(1, 8)), Group(("print(1)",), StdioTests((("", "1"),)))]
    labels = label_groups(groups, QUICK, groups_per_sandbox=3, workers=2, on_done=counted.append)
    assert [[one.is_correct for one in of_group] for of_group in labels] == [*([[True, False]] * 7), [True]]
    assert sum(counted) == len(groups)
    assert label_groups([]) == []


def test_the_first_error_ends_a_parallel_run() -> None:
    groups = [Group(("x = 1",), FunctionTests(()))] * 5
    with pytest.raises(ValueError, match="there are no tests"):
        label_groups(groups)


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (FunctionTests(()), "there are no tests"),
        (FunctionTests(("assert f(",)), "test 1 is not Python"),
        (FunctionTests(("assert f() == 1", "f() == 1")), "test 2 asserts nothing"),
        (FunctionTests(("assert f()",), "x = "), "the setup code is not Python"),
    ],
)
def test_tests_that_cannot_be_run(tests: FunctionTests, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_checks(tests)


def test_programs_need_cases() -> None:
    with pytest.raises(ValueError, match="there are no tests"):
        label("print(1)", StdioTests(()))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b", "a"}, "{'a', 'b'}"),
        (frozenset(), "frozenset()"),
        ({1: [(2,)], "x": {3}}, "{1: [(2,)], 'x': {3}}"),
        ((1, "a"), "(1, 'a')"),
    ],
)
def test_values_are_shown_alike_everywhere(value: object, text: str) -> None:
    assert show(value) == text


def test_large_integers_are_shown_in_part() -> None:
    assert show([10**5000]) == f"[{hex(10**5000)[:40]}...]"


def test_deep_values_are_shown_in_part() -> None:
    deep: Callable[[int], object] = lambda n: [] if n == 0 else [deep(n - 1)]  # noqa: E731
    assert "..." in show(deep(50))


@pytest.mark.parametrize(
    ("asserts", "where"),
    [
        (("assert f(1) == 2",), "solution"),
        (("assert f(1) == g(2)",), "tests"),
        (("assert f(1) == 2", "assert f(1) == g(2)"), "both"),
    ],
)
def test_setup_runs_where_it_is_needed(asserts: tuple[str, ...], where: str) -> None:
    assert plan_checks(FunctionTests(asserts, "x = 1"))[0].step == ("exec", "x = 1", where)
