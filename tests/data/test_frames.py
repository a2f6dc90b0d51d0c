"""What crosses from the sandbox: values arrive as they were, and forged frames are noticed."""

import collections
import decimal
import enum
import fractions
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp_ds.data.frames import FrameReader, Opaque, RunReport, decode
from wmtp_ds.data.harness_values import encode

_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**5000, max_value=10**5001)
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters())
    | st.binary(max_size=8)
)
_HASHABLE = st.recursive(
    _LEAVES, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=5
)
_VALUES = st.recursive(
    _LEAVES | st.sets(_HASHABLE, max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner) | st.dictionaries(_HASHABLE, inner, max_size=3),
    max_leaves=12,
)


@given(_VALUES)
def test_values_come_back_equal_and_of_the_same_type(value: Any) -> None:
    back = decode(encode(value))
    assert back == value
    assert type(back) is type(value)


class _AlwaysEqual:
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


class _LyingInt(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1

    def __format__(self, form: str) -> str:
        return "5"


class _LyingList(list[int]):
    def __eq__(self, other: object) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter([1, 2, 3])


class _Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.OrderedDict(x=1), {"x": 1}),
        (collections.namedtuple("P", "x y")(1, 2), (1, 2)),
        (_Colour.RED, 1),
        ({"a": 1}.keys(), {"a"}),
        ({"a": 1}.items(), {("a", 1)}),
        (fractions.Fraction(1, 2), 0.5),
        (decimal.Decimal("2.5"), 2.5),
        (True, 1),
        (_LyingInt(4), 4),
        (_LyingList([7]), [7]),
        (math.inf, math.inf),
    ],
)
def test_subclasses_compare_as_their_base(value: Any, expected: Any) -> None:
    assert decode(encode(value)) == expected


@pytest.mark.parametrize("value", [_AlwaysEqual(), object(), lambda: 1, iter([]), int, {}.values()])
def test_other_objects_are_equal_to_nothing(value: Any) -> None:
    back = decode(encode(value))
    assert isinstance(back, Opaque)
    assert back != 1
    assert back != decode(encode(value))
    assert back in [back]


def test_a_lie_about_equality_does_not_come_through() -> None:
    assert decode(encode(_LyingInt(4))) != 5
    assert decode(encode([_AlwaysEqual()])) != [1]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "5", "[" * 100_000),
        *('["x"]', '["i"]', '["i","zz"]', '["i",5]', '["s","f"]', '["n",1]', '["q","1","0"]'),
        *('["d",["n"]]', '["e",["l"]]', '["f",["n"]]'),
    ],
)
def test_what_is_no_value_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an encoded value"):
        decode(text)


def _frames(*lines: str) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def parse_frames(data: bytes, nonces: list[str]) -> list[RunReport]:
    """Whole, and a byte at a time, which must not make a difference."""
    whole, bit_by_bit = FrameReader(nonces), FrameReader(nonces)
    whole.feed(b"r 1\n" + data)
    for byte in b"r 1\n" + data:
        bit_by_bit.feed(bytes([byte]))
    assert whole.ready == bit_by_bit.ready == ["r", "1"]
    assert repr(whole.reports) == repr(bit_by_bit.reports)
    return whole.reports


def test_frames_are_entered_run_by_run() -> None:
    data = _frames(
        'v 0 0 ["i","5"]',
        "e 0 n0",
        "w 0 exit 0",
        "x 1 -1 416263 6869",
        "w 1 signal 9",
        "t 2 0 1",
        f"x 2 1 {b'MemoryError'.hex()} -",
    )
    first, second, third = parse_frames(data, ["n0", "n1", "n2"])
    assert (first.steps[0].values, first.complete, first.ended) == ((5,), True, "exit")
    assert (second.steps[-1].error, second.steps[-1].message) == ("Abc", "hi")
    assert (second.ended, second.code, second.complete) == ("signal", 9, False)
    assert (third.steps[0].values, third.steps[1].error, third.ended) == ((True,), "MemoryError", "")
    assert not any(report.damaged for report in (first, second, third))


@pytest.mark.parametrize(
    "lines",
    [
        ["e 0 wrong"],
        ['v 0 0 ["i","5"]', 'v 0 0 ["i","6"]'],
        ["v 1 0 [1]"],
        ["passed"],
        ["v 0"],
        ["\N{BLACK HEART SUIT}"],
        ["z 0 0"],
        ["w 0 exit 0", "w 1 exit 0", "w 0 exit 0"],
    ],
)
def test_frames_that_the_harness_would_not_write_are_noticed(lines: list[str]) -> None:
    reports = parse_frames("".join(f"{line}\n" for line in lines).encode(), ["n0", "n1"])
    assert any(report.damaged for report in reports)
    assert not any(report.complete for report in reports)


def test_a_line_that_was_cut_off_is_ignored() -> None:
    assert parse_frames(b'v 0 0 ["i","5', ["n"]) == [RunReport()]
