"""Writes solutions of a problem: each step in one of its forms, put together in different ways, with other names.

Steps follow one another as statements, are nested into one expression, share one loop, become a recursion, or
move into a helper function. Everything is put together as syntax trees, and comes out through ``ast.unparse``.
"""

import ast
import builtins
import keyword
from collections.abc import Sequence
from random import Random

from wmtp_ds.data.problem_steps import Step

_OUTPUT_NAMES = ("result", "values", "kept", "items", "out", "answer", "res", "found", "parts", "data", "ys", "new")
_SYNONYMS = {
    "x": ("x", "v", "n", "e", "a", "item", "y"),
    "y": ("y", "z", "w", "b", "other"),
    "i": ("i", "j", "k", "idx"),
    "j": ("j", "k", "m", "pos"),
    "c": ("c", "d", "ch", "digit"),
    "a": ("a", "p", "u"),
    "b": ("b", "q", "v"),
    "n": ("n", "m", "num"),
    "total": ("total", "acc", "s", "running"),
    "rest": ("rest", "left", "remaining"),
    "run": ("run", "length", "streak", "count"),
    "best": ("best", "top", "record"),
    "found": ("found", "seen", "known", "hits"),
    "seen": ("seen", "visited", "used"),
    "stack": ("stack", "pending", "todo"),
    "row": ("row", "line", "r"),
    "number": ("number", "num", "current"),
    "count": ("count", "ways_from", "search"),
    "ways": ("ways", "counts", "table"),
    "steps": ("steps", "moves", "dist"),
    "left": ("left", "lo"),
    "right": ("right", "hi"),
}
_NEST_LENGTH = 60  # characters; longer expressions get a line of their own


class _Rename(ast.NodeTransformer):
    """Gives names other names, wherever they stand."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.arg = self.names.get(node.arg, node.arg)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name = self.names.get(node.name, node.name)
        return self.generic_visit(node)


class _Nest(ast.NodeTransformer):
    """Puts an expression where a name is read."""

    def __init__(self, name: str, expression: ast.expr) -> None:
        self.name = name
        self.expression = expression

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.expression if node.id == self.name and isinstance(node.ctx, ast.Load) else node


def _parse(form: str, names: dict[str, str]) -> list[ast.stmt]:
    tree = _Rename(names).visit(ast.parse(form))
    assert isinstance(tree, ast.Module)
    return tree.body


def _places(names: Sequence[str], out: str) -> dict[str, str]:
    return {**dict(zip(("IN", "IN2", "IN3"), names, strict=False)), "OUT": out}


def _indent(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def _element_lines(elements: Sequence[Step], rng: Random, skip: str, last: str) -> str:
    """The body of a loop: the steps on its element ``x``, then ``last``; ``skip`` leaves the element out."""
    if not elements:
        return last + "\n"
    step, rest = elements[0], elements[1:]
    assert step.element is not None
    way = rng.choice(step.element.ways)
    if not step.element.keeps:
        return f"x = {way}\n" + _element_lines(rest, rng, skip, last)
    if skip != "continue" or rng.random() < 0.4:
        return f"if not ({way}):\n    {skip}\n" + _element_lines(rest, rng, skip, last)
    return f"if {way}:\n" + _indent(_element_lines(rest, rng, skip, last))


def _one_loop(steps: Sequence[Step], rng: Random) -> str:
    """A form that does several steps in one loop; the last may be one that a loop adds up."""
    last = steps[-1]
    if last.fold is not None:
        start, update, elements = last.fold.start, last.fold.update, steps[:-1]
    elif last.takes == ("text",):
        start, update, elements = "''", "OUT += x", steps
    else:
        start, update, elements = "[]", "OUT.append(x)", steps
    return f"OUT = {start}\nfor x in IN:\n" + _indent(_element_lines(elements, rng, "continue", update))


def _recursion(steps: Sequence[Step], name: str, parameter: str, rng: Random) -> ast.Module:
    """The whole function as a recursion over the first element."""
    fold = steps[-1].fold
    assert fold is not None
    again = f"{name}({parameter}[1:])"
    lines = f"if not {parameter}:\n    return {fold.start}\nx = {parameter}[0]\n"
    last = f"return {fold.rest.replace('REST', again)}"
    lines += _element_lines(steps[:-1], rng, f"return {again}", last)
    return ast.parse(f"def {name}({parameter}):\n" + _indent(lines))


def _loop_end(steps: Sequence[Step], start: int) -> int:
    """How far one loop can go that begins with step ``start`` (exclusive)."""
    end = start
    while end < len(steps) and steps[end].element is not None and steps[end].takes == steps[start].takes:
        end += 1
    if end > start and end < len(steps) and steps[end].fold is not None and steps[end].takes == steps[start].takes:
        end += 1
    return end


def _single_expression(statements: list[ast.stmt]) -> ast.expr | None:
    """What the only statement assigns, or None."""
    if len(statements) == 1 and isinstance(statements[0], ast.Assign):
        return statements[0].value
    return None


def _reads(statements: list[ast.stmt], name: str) -> int:
    return sum(
        isinstance(node, ast.Name) and node.id == name for statement in statements for node in ast.walk(statement)
    )


def _body(steps: Sequence[Step], parameters: Sequence[str], rng: Random) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """The function's statements, and helper functions to stand before it."""
    body: list[ast.stmt] = []
    helpers: list[ast.stmt] = []
    inputs: Sequence[str] = parameters
    index = 0
    while index < len(steps):
        end = _loop_end(steps, index)
        if end - index > 1 and rng.random() < 0.5:
            form = _one_loop(steps[index:end], rng)
        else:
            form, end = rng.choice(steps[index].forms), index + 1
        out = f"OUT{index}"
        statements = _parse(form, _places(inputs, out))
        if _single_expression(statements) is None and index and not helpers and rng.random() < 0.25:
            helper = f"{steps[end - 1].name}_of"
            inner = _parse(form, _places([f"IN{index}_"], out))
            definition = ast.parse(f"def {helper}(IN{index}_):\n    return {out}").body[0]
            assert isinstance(definition, ast.FunctionDef)
            definition.body = [*inner, *definition.body]
            helpers.append(definition)
            statements = ast.parse(f"{out} = {helper}({inputs[0]})").body
        before = _single_expression(body[-1:]) if index else None
        if (
            before is not None
            and _single_expression(statements) is not None
            and _reads(statements, inputs[0]) == 1
            and len(ast.unparse(before)) < _NEST_LENGTH
            and rng.random() < 0.6
        ):
            body.pop()
            statements = [_Nest(inputs[0], before).visit(statement) for statement in statements]
        body += statements
        inputs = [out]
        index = end
    last = _single_expression(body[-1:])
    if last is not None and rng.random() < 0.8:
        body[-1] = ast.Return(last)
    else:
        body.append(ast.Return(ast.Name(inputs[0], ast.Load())))
    return body, helpers


def _new_names(tree: ast.AST, fixed: set[str], reserved: Sequence[str], rng: Random) -> dict[str, str]:
    """New names for the variables and helpers but the ``fixed``: readable, different, none of them ``reserved``."""
    bound = []
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            used.add(node.id)
            if isinstance(node.ctx, ast.Store):
                bound.append(node.id)
        elif isinstance(node, ast.arg):
            bound.append(node.arg)
        elif isinstance(node, ast.FunctionDef):
            bound.append(node.name)
    taken = fixed | {*reserved} | used - set(bound) | set(dir(builtins)) | set(keyword.kwlist)
    names: dict[str, str] = {}
    for name in dict.fromkeys(bound):
        if name in fixed:
            continue
        pool = _OUTPUT_NAMES if name.startswith(("OUT", "IN")) else _SYNONYMS.get(name, (name,))
        free = [other for other in pool if other not in taken] or [
            f"{pool[0]}{number}" for number in range(2, 99) if f"{pool[0]}{number}" not in taken
        ]
        names[name] = rng.choice(free)
        taken.add(names[name])
    return names


def render(steps: Sequence[Step], name: str, parameters: Sequence[str], rng: Random) -> tuple[str, str]:
    """Write one solution.

    Args:
        steps: what the function does, in order.
        name: the function's name.
        parameters: the names of its parameters, one for each input of the first step.
        rng: decides forms, arrangement and names.

    Returns:
        The source text, and the text before variables were renamed: solutions that share it differ in names alone.
    """
    fold = steps[-1].fold
    loopable = len(parameters) == 1 and _loop_end(steps, 0) == len(steps)
    # Placeholders until the end: a variable of a form may be called as a parameter is.
    arguments = [f"ARGUMENT{number}" for number in range(len(parameters))]
    if loopable and len(steps) > 1 and fold is not None and fold.rest and rng.random() < 0.3:
        tree = _recursion(steps, name, arguments[0], rng)
    else:
        body, helpers = _body(steps, arguments, rng)
        tree = ast.parse(f"def {name}({', '.join(arguments)}):\n    pass")
        assert isinstance(tree.body[0], ast.FunctionDef)
        tree.body[0].body = body
        tree.body[:0] = helpers
    # Nesting puts one expression object into several trees; a fresh parse separates them.
    plain = ast.unparse(ast.fix_missing_locations(tree))
    tree = ast.parse(plain)
    names = _new_names(tree, {name, *arguments}, parameters, rng)
    names.update(zip(arguments, parameters, strict=True))
    return ast.unparse(_Rename(names).visit(tree)), plain
