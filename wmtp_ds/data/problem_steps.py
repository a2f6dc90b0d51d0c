"""What generated problems are made of: steps, each with its meaning, its wording and several ways to write it.

A step's ``spec`` says what it means, as plain Python that the generator evaluates to get a test's expected
value; ``forms`` are the ways in which solutions write it. The two are written apart, for hard steps in
different ways altogether (the spec tries everything, the form is dynamic programming), so that an error in
either shows as a solution that fails its tests.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

# The kinds of values that flow between steps, and what instructions call them.
KINDS = {
    "ints": "a list of integers",
    "int": "an integer",
    "text": "a string",
    "words": "a list of words",
    "flag": "a boolean",
    "pairs": "a list of pairs of integers",
    "grid": "a matrix (a list of rows of integers)",
}


@dataclass(frozen=True)
class Element:
    """A step that treats each element alone: keeps it or not, or replaces it. The element is ``x`` in ``ways``."""

    keeps: bool
    ways: tuple[str, ...]


@dataclass(frozen=True)
class Fold:
    """A step that a loop can do element by element: ``start``, and ``update`` of ``OUT`` with ``x``.

    ``rest`` is the same as a recursion: the answer from ``x`` and ``REST``, the answer for the elements after
    it; "" where there is none.
    """

    start: str
    update: str
    rest: str = ""


Inputs = Callable[[Random], tuple[Any, ...]]


@dataclass(frozen=True)
class Step:
    """One step of a problem.

    ``takes`` are the kinds of its inputs (several only for a problem's first step), ``gives`` that of its
    result. ``text`` is a noun phrase ("the sum of the numbers") where ``is_noun``, else a clause ("keeps only
    the even numbers"). Forms read ``IN`` (``IN2``, ``IN3``) and set ``OUT``. A step with ``inputs`` expects
    arguments of a certain shape, which it makes itself: it can only come first.
    """

    name: str
    text: str
    takes: tuple[str, ...]
    gives: str
    cost: int
    spec: Callable[..., Any]
    forms: tuple[str, ...]
    is_noun: bool = True
    element: Element | None = None
    fold: Fold | None = None
    inputs: Inputs | None = None


def noun(spec: Callable[..., Any], definition: str, *, fold: Fold | None = None, inputs: Inputs | None = None) -> Step:
    """A step whose text names its result.

    Args:
        spec: its meaning, a function of as many arguments as the step takes.
        definition: a header ``name | kinds -> kind | cost | text``, an empty line, then the forms, with lines ``---``
            between them.
        fold: how a loop does it, where that is so.
        inputs: makes the arguments of a test, where not any of their kinds will do.
    """
    header, forms = _read(definition)
    name, kinds, cost, text = header
    takes, _, gives = kinds.partition(" -> ")
    return Step(name, text, tuple(takes.split()), gives, int(cost), spec, forms, True, None, fold, inputs)


def clause(spec: Callable[[Any], Any], definition: str) -> Step:
    """A step whose text says what is done; it gives the kind that it takes: header ``name | kind | cost | text``."""
    header, forms = _read(definition)
    name, kind, cost, text = header
    return Step(name, text, (kind,), kind, int(cost), spec, forms, False)


def keep(spec: Callable[[Any], Any], header: str, *ways: str) -> Step:
    """A step that keeps the elements for which ``spec`` holds; ``ways`` are conditions on ``x``."""

    def evaluate(value: Any) -> Any:
        kept = [item for item in value if spec(item)]
        return "".join(kept) if isinstance(value, str) else kept

    name, kind, cost, text = _read(header)[0]
    forms = []
    for way in ways:
        if kind == "text":
            forms += [f"OUT = ''.join([x for x in IN if {way}])", f"OUT = ''.join((x for x in IN if {way}))"]
            forms += [f"OUT = ''\nfor x in IN:\n    if {way}:\n        OUT += x"]
        else:
            forms += [f"OUT = [x for x in IN if {way}]", f"OUT = list(filter(lambda x: {way}, IN))"]
            forms += [f"OUT = []\nfor x in IN:\n    if {way}:\n        OUT.append(x)"]
    return Step(name, text, (kind,), kind, int(cost), evaluate, tuple(forms), False, Element(True, ways))


def each(spec: Callable[[Any], Any], header: str, *ways: str) -> Step:
    """A step that replaces each element by what ``spec`` gives; ``ways`` are expressions of ``x``."""

    def evaluate(value: Any) -> Any:
        changed = [spec(item) for item in value]
        return "".join(changed) if isinstance(value, str) else changed

    name, kind, cost, text = _read(header)[0]
    forms = []
    for way in ways:
        if kind == "text":
            forms += [f"OUT = ''.join([{way} for x in IN])", f"OUT = ''\nfor x in IN:\n    OUT += {way}"]
        else:
            forms += [f"OUT = [{way} for x in IN]", f"OUT = list(map(lambda x: {way}, IN))"]
            forms += [f"OUT = []\nfor x in IN:\n    OUT.append({way})"]
    return Step(name, text, (kind,), kind, int(cost), evaluate, tuple(forms), False, Element(False, ways))


def _read(definition: str) -> tuple[list[str], tuple[str, ...]]:
    """Fields of the header (all lines up to an empty one) and the forms of a definition."""
    header, _, body = inspect.cleandoc(definition).partition("\n\n")
    forms = tuple(form.strip("\n") for form in body.split("\n---\n")) if body else ()
    return [part.strip() for part in " ".join(header.split()).split("|", 3)], forms
