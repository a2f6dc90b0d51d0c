"""Tests of functions, and the steps that the sandbox takes them in."""

import ast
import builtins
import sys
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class FunctionTests:
    """Asserts on a function, run in the solution's namespace after ``setup``."""

    asserts: tuple[str, ...]
    setup: str = ""


@dataclass(frozen=True)
class Check:
    """One step of a test suite and how its report is judged.

    ``step`` is as in ``sandbox.FunctionRun``. ``rule``: "runs" (it must not raise), "equals" or "is" (its value
    against ``expected``), "same" (its two values against each other), "true" (it must be a true value). ``test`` is
    the test's index, -1 the setup.
    """

    step: tuple[str, ...]
    test: int
    rule: str
    expected: Any = None

    def accepts(self, values: tuple[Any, ...]) -> bool:
        """Whether the step's values are as they should be."""
        if self.rule == "runs":
            return True
        if self.rule == "is":
            return values[0] is self.expected
        if self.rule == "true":
            return values[0] is True
        try:
            return bool(values[0] == (self.expected if self.rule == "equals" else values[1]))
        except RecursionError:
            return False


def _literal(node: ast.expr) -> tuple[bool, Any]:
    try:
        return True, ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False, None


def _check_of_assert(condition: ast.expr, test: int) -> Check:
    """The step that evaluates an assert's condition, and the judgement of what comes back."""
    if isinstance(condition, ast.Compare) and len(condition.ops) == 1:
        left, right, operator = condition.left, condition.comparators[0], condition.ops[0]
        if isinstance(operator, ast.Eq):
            for side, computed in ((right, left), (left, right)):
                is_literal, expected = _literal(side)
                if is_literal:
                    return Check(("value", ast.unparse(computed)), test, "equals", expected)
            return Check(("pair", ast.unparse(left), ast.unparse(right), *_names(condition)), test, "same")
        if isinstance(operator, ast.Is) and isinstance(right, ast.Constant) and right.value in (None, True, False):
            return Check(("value", ast.unparse(left)), test, "is", right.value)
    # Any truthy value will do, as in an assert.
    return Check(("truth", f"True if ({ast.unparse(condition)}) else False", *_names(condition)), test, "true")


def _names(condition: ast.expr) -> tuple[str, str]:
    """The standard modules that a test names, and the built-in names that can only mean the solution's functions.

    Those are all of them where a test has no other name that a solution could have defined.
    """
    read = {node.id for node in ast.walk(condition) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in ast.walk(condition) if isinstance(node, ast.Name)} - read
    bound |= {node.arg for node in ast.walk(condition) if isinstance(node, ast.arg)}
    dotted = {
        node.value.id
        for node in ast.walk(condition)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    modules = dotted & sys.stdlib_module_names
    free = read - bound - modules
    lent = free if all(hasattr(builtins, name) for name in free) else set()
    return " ".join(sorted(modules)), " ".join(sorted(lent))


def plan_checks(tests: FunctionTests) -> list[Check]:
    """The steps that a test suite consists of.

    Raises:
        ValueError: a test or the setup is not Python, a test asserts nothing, or there are none.
    """
    if not tests.asserts:
        raise ValueError("there are no tests")
    checks = []
    if tests.setup.strip():
        checks.append(Check(("exec", ast.unparse(_parse(tests.setup, "the setup code"))), -1, "runs"))
    for number, text in enumerate(tests.asserts):
        name = f"test {number + 1}"
        body = _parse(text.strip(), name).body
        if not any(isinstance(statement, ast.Assert) for statement in body):
            raise ValueError(f"{name} asserts nothing")
        for statement in body:
            if isinstance(statement, ast.Assert):
                checks.append(_check_of_assert(statement.test, number))
            else:
                checks.append(Check(("exec", ast.unparse(statement)), number, "runs"))
    kinds = {check.step[0] for check in checks}
    # The solution's process is shown no more of the tests than it needs.
    where = "both" if {"value"} < kinds - {"exec"} else "solution" if "value" in kinds else "tests"
    return [replace(check, step=(*check.step, where)) if check.step[0] == "exec" else check for check in checks]


def _parse(text: str, name: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name} is not Python: {error}") from None
