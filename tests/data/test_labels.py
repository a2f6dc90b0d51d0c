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


ATTACKS: dict[str, str] = {
    "os._exit while loading": "import os\nos._exit(0)",
    "sys.exit while loading": "import sys\nsys.exit(0)",
    "os._exit in the function": "import os\ndef f(x): os._exit(0)",
    "SystemExit in the function": "def f(x): raise SystemExit(0)",
    "prints a verdict": "def f(x):\n    print('passed')\n    return 0",
    "an object that equals everything": """
        class E:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __bool__(self): return True
            def __sub__(self, other): return self
            def __abs__(self): return self
            def __lt__(self, other): return E()
        def f(x): return E()
    """,
    "an int that equals everything": """
        class E(int):
            def __eq__(self, other): return True
            def __format__(self, form): return '2' if form else '2'
            def __hash__(self): return 1
        def f(x): return E(7)
    """,
    "AssertionError overridden": """
        import builtins
        class Quiet(BaseException):
            def __new__(cls, *args): import os; os._exit(0)
        builtins.AssertionError = Quiet
        def f(x): return 0
    """,
    "builtins patched": """
        import builtins
        builtins.eval = lambda *a, **k: 2
        builtins.compile = lambda *a, **k: 'f'
        builtins.type = lambda x: int
        builtins.issubclass = lambda a, b: b is int
        def f(x): return 0
    """,
    "the harness's functions patched": """
        import sys
        frame = sys._getframe()
        while frame:
            for name in ('encode', 'emit'):
                if name in frame.f_globals:
                    frame.f_globals[name] = lambda *a: '["b",1]'
            frame = frame.f_back
        def f(x): return 0
    """,
    "frames forged without the nonce": """
        import os
        def f(x):
            for handle in range(1, 20):
                try:
                    os.write(handle, b't 0 0 1\\nt 0 1 1\\nt 0 2 1\\ne 0 ' + b'0' * 32 + b'\\nw 0 exit 0\\n')
                except OSError:
                    pass
            os._exit(0)
    """,
    "sys.settrace": """
        import sys
        def trace(frame, event, arg):
            if event == 'return' and 'values' in frame.f_locals:
                frame.f_locals['values'] = [True]
            return trace
        sys.settrace(trace)
        def f(x): return 0
    """,
    "the harness killed": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef f(x): return 0",
    "the harness stopped": "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)\nos._exit(0)",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize(
    "tests",
    [
        DOUBLE,
        FunctionTests(("assert abs(f(1) - 2) < 0.1", "assert f(2) + 0 == 8 // 2", "assert not f(1) == 3 - 1 + 5")),
    ],
    ids=["literals", "expressions"],
)
def test_attacks_earn_nothing(attack: str, tests: FunctionTests) -> None:
    assert not label(textwrap.dedent(attack), tests, QUICK).is_correct


def test_a_solution_that_attacks_the_sandbox_does_not_harm_others() -> None:
    killer = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef f(x): return 0"
    good = "def f(x): return 2 * x"
    [[bad, fine, also]] = label_batch([Group((killer, good, good), DOUBLE)], QUICK)
    assert not bad.is_correct
    assert fine.is_correct
    assert also.is_correct


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
