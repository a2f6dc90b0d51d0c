"""Values as text, inside and outside the sandbox: JSON of tagged lists, which carries data and never code.

Part of the program that runs in the sandbox (see ``harness``), so it imports the standard library alone.
"""

from __future__ import annotations

import _json  # the scanner of `json`, whose own import is slow, and this is imported thousands of times

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_INTEGER_DIGITS = 100_000  # hexadecimal; larger integers are compared with nothing


class Unsendable(TypeError):  # noqa: N818
    """A value that is no data, where only data may pass."""


def encode_opaque(value: Any) -> str:
    """What stands for a value that is no data: the name of its type."""
    return f'["o","{type(value).__name__.encode("utf-8", "replace").hex()}"]'


def encode(value: Any, opaque: Callable[[Any], str] = encode_opaque) -> str:
    """A value as JSON of tagged lists, by its base class: no method of the checked code decides its equality.

    Args:
        value: data; numbers, text, bytes, lists, tuples, sets, dicts, and subclasses of these.
        opaque: makes the text that stands for anything else.
    """
    kind = type(value)
    if value is None:
        return '["n"]'
    if kind is bool:
        return f'["b",{int(value)}]'
    if issubclass(kind, int):
        return f'["i","{int.__format__(value, "x")}"]'
    if issubclass(kind, float):
        return f'["f","{float.hex(value)}"]'
    if kind is complex:
        return f'["c","{value.real.hex()}","{value.imag.hex()}"]'
    if issubclass(kind, str):
        return f'["s","{str.encode(value, "utf-8", "surrogatepass").hex()}"]'
    if kind in (bytes, bytearray):
        return f'["y","{value.hex()}"]'
    for tag, base in (("l", list), ("t", tuple), ("e", set), ("z", frozenset)):
        if issubclass(kind, base):
            return f'["{tag}"{"".join("," + encode(item, opaque) for item in base.__iter__(value))}]'
    if issubclass(kind, dict):
        pairs = (f",{encode(key, opaque)},{encode(item, opaque)}" for key, item in dict.items(value))
        return f'["d"{"".join(pairs)}]'
    if kind in (type({}.keys()), type({}.items())):  # these equal sets
        return f'["e"{"".join("," + encode(item, opaque) for item in value)}]'
    if kind.__module__ in ("fractions", "decimal") and hasattr(kind, "as_integer_ratio"):
        above, below = value.as_integer_ratio()
        return f'["q","{above:x}","{below:x}"]'
    return opaque(value)


def _text(hexadecimal: str) -> str:
    return bytes.fromhex(hexadecimal).decode("utf-8", "surrogatepass")


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise ValueError("the integer is too large")
    return int(digits, 16)


def _fraction(above: str, below: str) -> Any:
    from fractions import Fraction

    return Fraction(_integer(above), _integer(below))


_LEAVES: dict[str, Callable[..., Any]] = {
    "n": lambda: None,
    "b": bool,
    "i": _integer,
    "f": float.fromhex,
    "c": lambda real, imaginary: complex(float.fromhex(real), float.fromhex(imaginary)),
    "s": _text,
    "y": bytes.fromhex,
    "q": _fraction,
}
_CONTAINERS: dict[str, Callable[..., Any]] = {"l": list, "t": tuple, "e": set, "z": frozenset}


class _Context:
    """What the scanner asks for its settings."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int = float, int
    memo: dict[str, str] = {}  # noqa: RUF012

    @staticmethod
    def parse_constant(name: str) -> Any:
        """NaN and the infinities are written another way."""
        raise ValueError(name)


_scan = _json.make_scanner(_Context)  # type: ignore[arg-type]


def _build(node: list[Any], opaque: Callable[..., Any]) -> Any:
    tag, *parts = node
    if tag in _LEAVES:
        return _LEAVES[tag](*parts)
    if tag == "o":
        return opaque(_text(parts[0])[:80], *parts[1:])
    items = [_build(part, opaque) for part in parts]
    if tag == "d":
        return dict(zip(items[::2], items[1::2], strict=True))
    return _CONTAINERS[tag](items)


def decode(encoded: str, opaque: Callable[..., Any]) -> Any:
    """The Python value of an encoded one.

    Args:
        encoded: what ``encode`` gave, or what somebody wants to be taken for it.
        opaque: makes what stands for a value that is no data, of its type's name and what else was written.

    Raises:
        ValueError: this is no encoded value.
    """
    try:
        node, end = _scan(encoded, 0)
        if end != len(encoded):
            raise ValueError("more than one value")
        return _build(node, opaque)
    except (
        TypeError,
        KeyError,
        ValueError,
        IndexError,
        OverflowError,
        ZeroDivisionError,
        RecursionError,
        StopIteration,
    ) as error:
        raise ValueError(f"not an encoded value: {type(error).__name__}") from None
