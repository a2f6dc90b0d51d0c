"""Small wrong turns in right programs: one edit of the syntax tree each, as programmers make them.

Every source text that leaves this module has gone through ``ast.unparse``, and so must the correct solutions
beside it (``normalise``): nothing but the edit itself tells the two apart, not quotes, spaces or comments. For
the same reason no edit leaves a ``pass`` where a statement was.
"""

import ast
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
_ARITHMETIC: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add,),
    ast.Div: (ast.FloorDiv,),
    ast.FloorDiv: (ast.Mod,),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitXor: (ast.BitOr,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
}
_NAMES = {  # functions and methods that are taken for one another
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "sum": "max",
    "upper": "lower",
    "lower": "upper",
    "startswith": "endswith",
    "endswith": "startswith",
    "isalpha": "isalnum",
    "isupper": "islower",
    "islower": "isupper",
    "find": "rfind",
    "keys": "values",
    "values": "keys",
    "lstrip": "rstrip",
    "rstrip": "lstrip",
}
_REMOVABLE_CALLS = frozenset(("abs", "sorted", "set", "reversed", "round", "int"))
_SIMPLE = (ast.Assign, ast.AugAssign, ast.Expr)


@dataclass(frozen=True)
class Mutant:
    """A changed program and the name of the edit that made it."""

    source: str
    operator: str


@dataclass(frozen=True)
class _Edit:
    """Put ``new`` where ``holder``'s ``field`` (or its item ``index``) is."""

    operator: str
    holder: Any
    field: str
    index: int | None
    new: Any


def normalise(source: str) -> str:
    """The program as ``ast.unparse`` writes it: without comments, in one style, ``\\n`` at line ends.

    Raises:
        ValueError: the source is not Python.
    """
    try:
        return ast.unparse(ast.parse(source.replace("\r\n", "\n").replace("\r", "\n")))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not Python: {error}") from None


def mutants(source: str, limit: int, rng: random.Random, *, exclude: Collection[str] = ()) -> list[Mutant]:
    """Up to ``limit`` different programs, each one edit away from ``source``.

    Args:
        source: a Python program.
        limit: how many; fewer come back where the program offers fewer edits.
        rng: decides which. Operators take turns, so that no kind of edit dominates.
        exclude: normalised sources that must not come back (other correct solutions).

    Raises:
        ValueError: the source is not Python.
    """
    original = normalise(source)
    tree = ast.parse(original)
    by_operator: dict[str, list[_Edit]] = {}
    for edit in _edits(tree):
        by_operator.setdefault(edit.operator, []).append(edit)
    for edits in by_operator.values():
        rng.shuffle(edits)
    seen = {original, *exclude}
    found: list[Mutant] = []
    while by_operator and len(found) < limit:
        for operator in rng.sample(sorted(by_operator), len(by_operator)):
            edits = by_operator[operator]
            text = _apply(tree, edits.pop())
            if not edits:
                del by_operator[operator]
            if text is not None and text not in seen:
                seen.add(text)
                found.append(Mutant(text, operator))
                if len(found) == limit:
                    break
    return found


def _apply(tree: ast.Module, edit: _Edit) -> str | None:
    """The program with the edit, None where it would be none; the tree is as before afterwards."""
    value = getattr(edit.holder, edit.field)
    if edit.index is None:
        setattr(edit.holder, edit.field, edit.new)
    else:
        changed = list(value)
        changed[edit.index : edit.index + 1] = edit.new if isinstance(edit.new, list) else [edit.new]
        setattr(edit.holder, edit.field, changed)
    try:
        text = ast.unparse(tree)
        compile(text, "<mutant>", "exec", dont_inherit=True)
        # What unparse writes must be what it reads, or formatting would tell mutants apart.
        return ast.unparse(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError):
        return None
    finally:
        setattr(edit.holder, edit.field, value)


def _edits(tree: ast.Module) -> Iterator[_Edit]:
    """Every edit of the program, in the order of its text."""
    yield from _visit(tree, ())


def _visit(node: ast.AST, names: tuple[str, ...]) -> Iterator[_Edit]:
    """Edits below ``node``; ``names`` are the variables of the function around it."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        names = _variables(node)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases"):
            continue
        if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
            yield from _edit_body(node, field, value)
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _is_untouchable(child):
                continue
            for operator, new in _replacements(child, names):
                if not _is_unnatural(node, new):
                    yield _Edit(operator, node, field, index, new)
            yield from _visit(child, names)


def _is_unnatural(parent: ast.AST, new: Any) -> bool:
    """Whether nobody would write this: ``x + 0``, ``x % 0``; such a thing would give a mutant away."""
    arithmetic = isinstance(parent, (ast.BinOp, ast.AugAssign))
    return arithmetic and isinstance(new, ast.Constant) and type(new.value) is int and new.value == 0


def _is_untouchable(node: ast.AST) -> bool:
    """Imports, docstrings, and the ``__main__`` guard: edits there say nothing about the solution."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    guard = isinstance(node, ast.If) and "__name__" in {
        part.id for part in ast.walk(node.test) if isinstance(part, ast.Name)
    }
    return guard or isinstance(node, (ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal))


def _variables(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> tuple[str, ...]:
    arguments = function.args
    found = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append(node.id)
    return tuple(dict.fromkeys(found))


def _replacements(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """What may stand in a node's place: (operator's name, new node or list of nodes)."""
    for kind, make in _RULES.items():
        if isinstance(node, kind):
            yield from make(node)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
        for other in names:
            if other != node.id:
                yield "swap_variable", ast.Name(other, ast.Load())


def _compare(node: ast.Compare) -> Iterator[tuple[str, Any]]:
    for index, operator in enumerate(node.ops):
        for new in _COMPARISONS[type(operator)]:
            operators = [*node.ops[:index], new(), *node.ops[index + 1 :]]
            yield "comparison", ast.Compare(node.left, operators, node.comparators)


def _binary(node: ast.BinOp) -> Iterator[tuple[str, Any]]:
    for new in _ARITHMETIC.get(type(node.op), ()):
        yield "arithmetic", ast.BinOp(node.left, new(), node.right)
    if isinstance(node.op, (ast.Sub, ast.FloorDiv, ast.Mod, ast.Pow, ast.Div)):
        yield "swap_operands", ast.BinOp(node.right, node.op, node.left)
    if isinstance(node.right, ast.Constant) and type(node.right.value) is int:
        yield "drop_operand", node.left


def _augmented(node: ast.AugAssign) -> Iterator[tuple[str, Any]]:
    for new in _ARITHMETIC.get(type(node.op), ()):
        yield "arithmetic", ast.AugAssign(node.target, new(), node.value)
    target = ast.parse(ast.unparse(node.target), mode="eval").body
    if isinstance(target, ast.Name):
        yield "assign_only", ast.Assign([ast.Name(target.id, ast.Store())], node.value, lineno=0)


def _constant(node: ast.Constant) -> Iterator[tuple[str, Any]]:
    value = node.value
    if isinstance(value, bool):
        yield "flip_bool", ast.Constant(not value)
    elif isinstance(value, (int, float)):
        yield "off_by_one", ast.Constant(value + 1)
        if value > 0:
            yield "off_by_one", ast.Constant(value - 1)
    elif isinstance(value, str) and value:
        yield "string", ast.Constant(value[:-1])


def _unary(node: ast.UnaryOp) -> Iterator[tuple[str, Any]]:
    if isinstance(node.op, (ast.USub, ast.Not)):
        yield "drop_sign" if isinstance(node.op, ast.USub) else "negate", node.operand


def _boolean(node: ast.BoolOp) -> Iterator[tuple[str, Any]]:
    yield "and_or", ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    for index in range(len(node.values)):
        rest = [value for other, value in enumerate(node.values) if other != index]
        yield "drop_condition", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)


def _negated(condition: ast.expr) -> ast.expr:
    if isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
        return condition.operand
    if isinstance(condition, ast.Compare) and len(condition.ops) == 1:
        opposite = {
            ast.Lt: ast.GtE,
            ast.LtE: ast.Gt,
            ast.Gt: ast.LtE,
            ast.GtE: ast.Lt,
            ast.Eq: ast.NotEq,
            ast.NotEq: ast.Eq,
            ast.In: ast.NotIn,
            ast.NotIn: ast.In,
            ast.Is: ast.IsNot,
            ast.IsNot: ast.Is,
        }
        return ast.Compare(condition.left, [opposite[type(condition.ops[0])]()], condition.comparators)
    return ast.UnaryOp(ast.Not(), condition)


def _if(node: ast.If) -> Iterator[tuple[str, Any]]:
    yield "negate", ast.If(_negated(node.test), node.body, node.orelse)


def _if_expression(node: ast.IfExp) -> Iterator[tuple[str, Any]]:
    yield "negate", ast.IfExp(_negated(node.test), node.body, node.orelse)


def _comprehension(node: ast.comprehension) -> Iterator[tuple[str, Any]]:
    for index, condition in enumerate(node.ifs):
        others = [*node.ifs[:index], *node.ifs[index + 1 :]]
        negated = [*node.ifs[:index], _negated(condition), *node.ifs[index + 1 :]]
        yield "negate", ast.comprehension(node.target, node.iter, negated, node.is_async)
        yield "drop_condition", ast.comprehension(node.target, node.iter, others, node.is_async)


def _call(node: ast.Call) -> Iterator[tuple[str, Any]]:
    function = node.func
    if isinstance(function, ast.Name) and function.id in _NAMES:
        yield "function", ast.Call(ast.Name(_NAMES[function.id], ast.Load()), node.args, node.keywords)
    if isinstance(function, ast.Attribute) and function.attr in _NAMES:
        attribute = ast.Attribute(function.value, _NAMES[function.attr], ast.Load())
        yield "function", ast.Call(attribute, node.args, node.keywords)
    if isinstance(function, ast.Name) and function.id in _REMOVABLE_CALLS and len(node.args) == 1:
        yield "drop_call", node.args[0]
    if len(node.args) == 2 and not (isinstance(function, ast.Name) and function.id in ("min", "max")):
        yield "swap_operands", ast.Call(function, node.args[::-1], node.keywords)
    if isinstance(function, ast.Name) and function.id == "range" and node.args:
        stop = 0 if len(node.args) == 1 else 1
        for operator in (ast.Add(), ast.Sub()):
            moved = list(node.args)
            moved[stop] = _shifted(moved[stop], operator)
            yield "range_bound", ast.Call(function, moved, node.keywords)


def _shifted(expression: ast.expr, operator: ast.operator) -> ast.expr:
    """The expression plus or minus 1, written as a person would: ``i + 1`` becomes ``i + 2`` or ``i``."""
    change = 1 if isinstance(operator, ast.Add) else -1
    if isinstance(expression, ast.Constant) and type(expression.value) is int:
        return ast.Constant(expression.value + change)
    if isinstance(expression, ast.BinOp) and isinstance(expression.op, (ast.Add, ast.Sub)):
        right = expression.right
        if isinstance(right, ast.Constant) and type(right.value) is int:
            moved = right.value + (change if isinstance(expression.op, ast.Add) else -change)
            return ast.BinOp(expression.left, expression.op, ast.Constant(moved)) if moved else expression.left
    return ast.BinOp(expression, operator, ast.Constant(1))


def _subscript(node: ast.Subscript) -> Iterator[tuple[str, Any]]:
    bounds = node.slice
    if isinstance(bounds, ast.Slice):
        for field in ("lower", "upper"):
            bound = getattr(bounds, field)
            if bound is None:
                continue
            parts = {name: getattr(bounds, name) for name in ("lower", "upper", "step")}
            yield "slice_bound", ast.Subscript(node.value, ast.Slice(**{**parts, field: None}), node.ctx)
            if not isinstance(bound, (ast.Constant, ast.UnaryOp)):
                for operator in (ast.Add(), ast.Sub()):
                    moved = ast.Slice(**{**parts, field: _shifted(bound, operator)})
                    yield "slice_bound", ast.Subscript(node.value, moved, node.ctx)
    elif isinstance(bounds, (ast.Name, ast.BinOp)):
        for operator in (ast.Add(), ast.Sub()):
            yield "index", ast.Subscript(node.value, _shifted(bounds, operator), node.ctx)


def _jump(node: ast.Break | ast.Continue) -> Iterator[tuple[str, Any]]:
    yield "break_continue", ast.Continue() if isinstance(node, ast.Break) else ast.Break()


def _while(node: ast.While) -> Iterator[tuple[str, Any]]:
    yield "while_once", ast.If(node.test, node.body, node.orelse)


_RULES: dict[type[ast.AST], Callable[[Any], Iterator[tuple[str, Any]]]] = {
    ast.Compare: _compare,
    ast.BinOp: _binary,
    ast.AugAssign: _augmented,
    ast.Constant: _constant,
    ast.UnaryOp: _unary,
    ast.BoolOp: _boolean,
    ast.If: _if,
    ast.IfExp: _if_expression,
    ast.comprehension: _comprehension,
    ast.Call: _call,
    ast.Subscript: _subscript,
    ast.Break: _jump,
    ast.Continue: _jump,
    ast.While: _while,
}


def _edit_body(holder: ast.AST, field: str, body: list[ast.stmt]) -> Iterator[_Edit]:
    """Edits of a list of statements: one dropped, one lifted out of its ``if``, a return moved into the loop."""
    for index, statement in enumerate(body):
        if isinstance(statement, _SIMPLE) and len(body) > 1 and not _is_untouchable(statement):
            yield _Edit("drop_statement", holder, field, index, [])
        if isinstance(statement, ast.If) and not statement.orelse and not _is_untouchable(statement):
            if len(body) > 1:
                yield _Edit("drop_statement", holder, field, index, [])
            yield _Edit("drop_condition", holder, field, index, statement.body)
        follows = body[index + 1] if index + 1 < len(body) else None
        if isinstance(statement, ast.For) and isinstance(follows, ast.Return):
            loop = ast.For(statement.target, statement.iter, [*statement.body, follows], statement.orelse, lineno=0)
            yield _Edit("early_return", holder, field, index, loop)
