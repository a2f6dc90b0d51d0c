"""HumanEval's test code as function tests that the sandbox runs and that are judged outside of it.

HumanEval gives ``def check(candidate): ...`` with asserts. Run as it is, the verdict would be formed inside, where
the solution lives. So each assert becomes a test of its own that computes both sides, to be compared outside; where
asserts depend on other statements (a loop, a local name), the whole function collects both sides and returns them.
"""

import ast

from wmtp_ds.data.labels import FunctionTests

_COLLECT = "_sides_of_check"
_SIDES = "_sides"


def function_tests(code: str, entry_point: str) -> FunctionTests:
    """Rewrite ``check(candidate)`` for the function of that name.

    Args:
        code: Python that defines ``check``.
        entry_point: the name of the function under test.

    Raises:
        ValueError: it is not Python, or defines no ``check`` of one parameter that asserts something.
    """
    try:
        module = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"is not Python: {error}") from None
    check = next((node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
    if check is None or len(check.args.args) != 1:
        raise ValueError("defines no function check(candidate)")
    if not any(isinstance(node, ast.Assert) for node in ast.walk(check)):
        raise ValueError("check(candidate) asserts nothing")
    around = [node for node in module.body if node is not check and not _is_metadata(node)]
    if all(isinstance(node, ast.Assert) for node in check.body):
        named = _Renamed(check.args.args[0].arg, entry_point)
        asserts = [node for node in check.body if isinstance(node, ast.Assert)]
        telling = [node for node in asserts if not isinstance(node.test, ast.Constant)] or asserts
        tests = tuple(ast.unparse(ast.Assert(named.visit(node.test))) for node in telling)
        return FunctionTests(tests, _text(around))
    test = (
        f"{_SIDES} = {_COLLECT}({entry_point})\n"
        f"assert [left for left, _ in {_SIDES}] == [right for _, right in {_SIDES}]"
    )
    return FunctionTests((test,), _text([*around, _collecting(check)]))


def _is_metadata(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METADATA"


def _text(statements: list[ast.stmt]) -> str:
    return ast.unparse(ast.fix_missing_locations(ast.Module(statements, [])))


class _Renamed(ast.NodeTransformer):
    def __init__(self, before: str, after: str):
        self._names = {before: after}

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self._names.get(node.id, node.id), node.ctx)


class _Collecting(ast.NodeTransformer):
    """Puts in an assert's place a statement that keeps its two sides."""

    def visit_Assert(self, node: ast.Assert) -> ast.Expr:
        test = node.test
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
            left, right = ast.unparse(test.left), ast.unparse(test.comparators[0])
        else:
            left, right = f"True if ({ast.unparse(test)}) else False", "True"
        return ast.Expr(ast.parse(f"{_SIDES}.append(({left}, {right}))", mode="eval").body)


def _collecting(check: ast.FunctionDef) -> ast.FunctionDef:
    [collecting] = ast.parse(f"def {_COLLECT}({check.args.args[0].arg}):\n    {_SIDES} = []\n    return {_SIDES}").body
    assert isinstance(collecting, ast.FunctionDef)
    collecting.body[1:1] = [_Collecting().visit(node) for node in check.body]
    return collecting
