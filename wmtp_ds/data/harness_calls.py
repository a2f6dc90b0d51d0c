"""The solution's process and the tests' process, and what they say to each other: data, and calls.

Tests that judge by themselves (``assert abs(f(1) - 2) < 0.1``) must not run beside the solution, which could change
what they run on. So they run in a process of their own, in which the solution's functions are stand-ins
(``Remote``): a call sends its arguments over as data and gets the result back as data. What is no data stays
where it is and is known on the other side by a number; it equals nothing there.

A message is a line of ASCII: ``? VERB VALUE`` asks, ``= VALUE`` answers, ``! NAME MESSAGE`` is an exception. Either
side may ask while the other waits for its answer (a solution may call a function that a test has given it).

Part of the program that runs in the sandbox (see ``harness``), so it imports the standard library alone.
"""

from __future__ import annotations

import builtins
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

    from wmtp_ds.data.harness_values import Unsendable, decode, encode

_MOST_ITEMS = 1_000_000  # of an iterator that is sent as a list
_MESSAGE_CHARACTERS = 300
_SLACK = 1 << 16
_OUT_OF_MEMORY = (b"MemoryError".hex(), "-")  # made before there is no memory left to make it
_TOO_LARGE = f"! {b'OverflowError'.hex()} {b'the value is larger than the limit on output'.hex()}"


class Gone(BaseException):
    """The other process has ended, or says what it never would."""


def describe(error: BaseException) -> tuple[str, str]:
    """An exception's name and message, in hexadecimal; both belong to the checked code: asking may raise."""
    if isinstance(error, MemoryError):
        return _OUT_OF_MEMORY
    try:
        message = str(error)[:_MESSAGE_CHARACTERS].encode("utf-8", "replace").hex()
    except BaseException:
        message = ""
    return type.__dict__["__name__"].__get__(type(error)).encode("utf-8", "replace").hex(), message or "-"


class Line:
    """One end of the line between the two processes.

    Args:
        reader, writer: pipes.
        answer: what answers the other side's questions: (verb, value) -> value.
        most: characters of an answer; a longer one is an error.
    """

    def __init__(self, reader: int, writer: int, answer: Callable[[str, Any], Any], most: int):
        self.reader, self.writer, self.answer, self.most = reader, writer, answer, most
        self.kept: dict[int, Any] = {}  # what the other side knows by number; kept, so that numbers stay unique
        self.known: dict[int, Remote] = {}
        self.sends_all = False  # the solution's end: whatever is no data is sent as a number; it trusts the other
        self._buffer = b""

    def keep(self, value: Any) -> str:
        """What stands for a value that is no data."""
        if type(value) is Remote:
            return f'["o","","{object.__getattribute__(value, "_number")}","back"]'
        if not self.sends_all and not callable(value):
            raise Unsendable(f"a test gives the solution a {type(value).__name__}")
        self.kept[id(value)] = value
        name = type.__dict__["__name__"].__get__(type(value)).encode("utf-8", "replace").hex()
        return f'["o","{name}","{id(value)}"]'

    def _opaque(self, name: str, number: str = "0", back: str = "") -> Any:
        if back:
            return self.kept[int(number)]
        return self.known.setdefault(int(number), Remote(self, int(number), name))

    def _send(self, text: str) -> None:
        data = text.encode("ascii") + b"\n"
        try:
            while data:
                data = data[os.write(self.writer, data) :]
        except OSError:
            raise Gone from None

    def _receive(self) -> str:
        """The next message."""
        while b"\n" not in self._buffer:
            chunk = os.read(self.reader, 1 << 16)
            if not chunk or (len(self._buffer) > self.most + _SLACK and not self.sends_all):
                raise Gone
            self._buffer = self._buffer + chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            return line.decode("ascii")
        except UnicodeDecodeError:
            raise Gone from None

    def ask_text(self, verb: str, value: Any) -> str:
        """Ask, and give the answer as it came: ``= VALUE`` or ``! NAME MESSAGE``."""
        self._send(f"? {verb} {encode(value, self.keep)}")
        while (message := self._receive())[:2] == "? ":
            self._reply(message)
        return message

    def ask(self, verb: str, value: Any) -> Any:
        """Ask, and give the answer's value, or raise what it was that the other side raised."""
        message = self.ask_text(verb, value)
        try:
            if message[:2] == "= ":
                return decode(message[2:], self._opaque)
            name, text = message[2:].split(" ")
            kind = getattr(builtins, bytes.fromhex(name).decode("utf-8"), None)
            told = bytes.fromhex(text.replace("-", "")).decode("utf-8", "replace")
        except ValueError:
            raise Gone from None
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
            raise kind(told)
        raise RuntimeError(f"{bytes.fromhex(name).decode('utf-8', 'replace')}: {told}")

    def _reply(self, message: str) -> None:
        try:
            verb, text = message[2:].split(" ", 1)
            answer = encode(self.answer(verb, decode(text, self._opaque)), self.keep)
        except Gone:
            raise
        except BaseException as error:
            name, told = describe(error)
            self._send(f"! {name} {told}")
        else:
            # What is too long for the other side is said to be so, in place of a line that it would not read.
            self._send(f"= {answer}" if len(answer) < self.most else _TOO_LARGE)

    def serve(self) -> NoReturn:
        """Answer until the other side is gone."""
        try:
            while True:
                self._reply(self._receive())
        finally:
            os._exit(0)


class Remote:
    """Something of the other process that is no data: to be called, asked for attributes and items, gone through.

    It does not compare, reckon or show itself, which would leave a test's judgement to the solution.
    """

    __slots__ = ("_line", "_name", "_number")

    def __init__(self, line: Line, number: int, name: str):
        self._line, self._number, self._name = line, number, name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call it there; lists, dicts and sets that it has changed are changed here, too."""
        value, *changed = self._line.ask("call", (self, arguments, named))
        for argument, now in zip(arguments, *changed, strict=True):
            if type(argument) is list and type(now) is list:
                argument[:] = now
            elif type(argument) in (dict, set) and type(now) is type(argument):
                argument.clear()
                argument.update(now)
        return value

    def __getattr__(self, name: str) -> Any:
        if name[:2] == "__":
            raise AttributeError(name)
        return self._line.ask("attribute", (self, name))

    def __getitem__(self, key: Any) -> Any:
        return self._line.ask("item", (self, key))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._line.ask("items", self))

    def __next__(self) -> Any:
        return self._line.ask("next", self)

    def __len__(self) -> int:
        return self._line.ask("length", self)

    def __bool__(self) -> bool:
        return self._line.ask("truth", self) is True

    def __instancecheck__(self, value: Any) -> bool:
        return type(value) is Remote and self._line.ask("instance", (value, self)) is True

    def __repr__(self) -> str:
        return f"<{self._name}>"


def answer_call(verb: str, value: Any) -> Any:
    """What either side does for the other: call what it has been given."""
    if verb != "call":
        raise Gone
    function, arguments, named = value
    result = function(*arguments, **named)
    # A function may change lists and the like that it is given; they go back with the result.
    return (result, [argument if type(argument) in (list, dict, set) else None for argument in arguments])


def answer_for(namespace: dict[str, Any]) -> Callable[[str, Any], Any]:
    """What answers for a solution with that namespace."""

    def answer(verb: str, value: Any) -> Any:
        if verb == "exec":
            exec(compile(value, "<test>", "exec", dont_inherit=True), namespace)
            return None
        if verb == "value":
            return eval(compile(value, "<test>", "eval", dont_inherit=True), namespace)
        if verb == "name":
            return namespace[value]
        if verb == "attribute":
            return getattr(*value)
        if verb == "item":
            return value[0][value[1]]
        if verb == "items":
            return [item for item, _ in zip(value, range(_MOST_ITEMS))]  # noqa: B905
        if verb == "next":
            return next(value)
        if verb == "length":
            return len(value)
        if verb == "truth":
            return bool(value)
        if verb == "instance":
            return isinstance(*value)
        return answer_call(verb, value)

    return answer


class TestNames(dict):
    """The names that tests see: their own, Python's, and the solution's where neither has them.

    Python's come first, so that a solution cannot lend the tests an ``abs`` of its own, except those in ``lent``.
    """

    def __init__(self, line: Line):
        super().__init__(__name__="tests")
        self.line = line
        self.lent: frozenset[str] = frozenset()
        self.lacking = False  # code was to define names here, and could only run where the solution is
        self.untold: list[str] = []  # code that has run here alone

    def at_the_solution(self, verb: str, text: str) -> Any:
        """Run a test's code where the solution is, with all that came before it."""
        while self.untold:
            self.line.ask("exec", self.untold.pop(0))
        return self.line.ask(verb, text)

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) and name not in self.lent:
            raise KeyError(name)
        try:
            return self.line.ask("name", name)
        except KeyError:
            if hasattr(builtins, name):
                raise
            raise NameError(f"name '{name}' is not defined") from None
