"""Mutants: valid, different, one edit away, and in the style of the original."""

import ast
import random
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_ds.data.mutate import mutants, normalise
from wmtp_ds.data.problems import generate_problems

PROGRAM = textwrap.dedent(
    '''
    import math
    from collections import Counter

    def best(xs: list[int], k=3, *, flag=True):
        """The best."""
        total = 0
        top = -1
        for i in range(len(xs) - 1):
            if xs[i] > k and not flag or i == 0:
                continue
            if xs[i + 1] in (1, 2):
                break
            total += xs[i] * 2
            top = max(top, abs(xs[i]))
        while total > 100:
            total -= k
        rest = [y for y in xs[1:k] if y % 2 == 0]
        return total - top if rest else math.gcd(total, k)

    if __name__ == '__main__':
        print(best([1]))
    '''
)
OPERATORS = {
    "and_or",
    "arithmetic",
    "assign_only",
    "break_continue",
    "comparison",
    "drop_call",
    "drop_condition",
    "drop_operand",
    "drop_sign",
    "drop_statement",
    "flip_bool",
    "function",
    "index",
    "negate",
    "off_by_one",
    "range_bound",
    "slice_bound",
    "swap_operands",
    "swap_variable",
    "while_once",
}


def test_all_operators_find_their_place() -> None:
    found = {mutant.operator for mutant in mutants(PROGRAM, 10_000, random.Random(0))}
    assert found == OPERATORS
    more = mutants("def f(xs):\n    for x in xs:\n        s = 'ab' + x\n    return s", 10_000, random.Random(0))
    assert {"early_return", "string"} <= {mutant.operator for mutant in more}


@given(st.integers(0, 2**32), st.integers(1, 60))
@settings(deadline=None, max_examples=8)
def test_mutants_are_programs_that_differ(seed: int, limit: int) -> None:
    found = mutants(PROGRAM, limit, random.Random(seed))
    sources = [mutant.source for mutant in found]
    assert len(sources) == limit
    assert len({normalise(PROGRAM), *sources}) == limit + 1
    for source in sources:
        compile(source, "mutant", "exec")
        assert normalise(source) == source
        assert "pass" not in source.split()
    assert found == mutants(PROGRAM, limit, random.Random(seed))


def test_only_one_place_changes() -> None:
    """But for a statement that is dropped or moves, a mutant has as many lines as the original, all but a few equal."""
    original = normalise(PROGRAM).splitlines()
    for mutant in mutants(PROGRAM, 10_000, random.Random(1)):
        lines = mutant.source.splitlines()
        if mutant.operator in ("drop_statement", "drop_condition", "early_return"):
            continue
        assert len(lines) == len(original)
        assert sum(a != b for a, b in zip(lines, original, strict=True)) == 1, mutant


def test_operators_take_turns() -> None:
    found = mutants(PROGRAM, len(OPERATORS), random.Random(2))
    assert len({mutant.operator for mutant in found}) > 0.8 * len(OPERATORS)


def test_imports_docstrings_and_the_main_guard_stay() -> None:
    for mutant in mutants(PROGRAM, 10_000, random.Random(3)):
        tree = ast.parse(mutant.source)
        assert ast.unparse(tree.body[:2]) == "import math\nfrom collections import Counter"
        assert ast.get_docstring(tree.body[2]) == "The best."  # type: ignore[arg-type]
        assert ast.unparse(tree.body[3]) == "if __name__ == '__main__':\n    print(best([1]))"


def test_excluded_programs_do_not_come_back() -> None:
    source = "def f(a, b):\n    return a - b"
    all_of_them = {mutant.source for mutant in mutants(source, 100, random.Random(0))}
    assert normalise("def f(a, b):\n    return b - a") in all_of_them
    left = mutants(source, 100, random.Random(0), exclude=all_of_them - {normalise("def f(a, b):\n    return a + b")})
    assert [mutant.source for mutant in left] == [normalise("def f(a, b):\n    return a + b")]


@pytest.mark.parametrize("source", ["", "x", "def f():\n    pass", "import os"])
def test_a_program_without_anything_to_change_has_no_mutants(source: str) -> None:
    assert mutants(source, 5, random.Random(0)) == []


def test_nothing_is_added_that_nobody_would_write() -> None:
    for problem in generate_problems(11, seed=4):
        for solution in problem.solutions:
            for mutant in mutants(solution, 100, random.Random(0)):
                for node in ast.walk(ast.parse(mutant.source)):
                    if isinstance(node, ast.BinOp) and isinstance(node.right, ast.Constant):
                        assert node.right.value != 0 or isinstance(node.right.value, bool), mutant


def test_normalising_takes_style_away() -> None:
    crlf = 'def f(a):\r\n\tif a==1 :  # one\r\n\t\treturn "x"\r\n\treturn (a)\r\n'
    plain = "def f(a):\n    if a == 1:\n        return 'x'\n    return a"
    assert normalise(crlf) == plain
    assert normalise(plain) == plain
    assert normalise("s = '''a\r\nb'''") == normalise("s = '''a\nb'''")


@pytest.mark.parametrize("source", ["def f(:", "print 'x'", "\0", "(" * 1000])
def test_what_is_no_python_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="not Python"):
        normalise(source)
