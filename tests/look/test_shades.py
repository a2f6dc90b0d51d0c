"""What is green, what is orange, and what has no colour."""

import math

import pytest

from wmtp_ds.look.shades import LESS, MORE, Scale


@pytest.mark.parametrize("entries", [[0.4, 0.97], [0.4, 1.0], [1.0], [0.0, 0.4], [0.3, 2.5], [0.0, 1.0, 1.5]])
def test_weights_around_1(entries: list[float]) -> None:
    scale = Scale.of("weight", entries)
    assert (scale.kind, scale.ordinary) == ("ratio", 1.0)
    for entry in entries:
        *colour, opacity = scale.colour(entry)
        assert opacity == 0 if entry == 1 else tuple(colour) == (MORE if entry > 1 else LESS)
    farthest = max(entries, key=lambda entry: abs(math.log(entry)) if entry else math.inf)
    assert scale.colour(farthest)[3] == (0.75 if farthest != 1 else 0)


@pytest.mark.parametrize("entries", [[0.0, 1.0], [1.0, 0.0, 0.0], [0.0]])
def test_weights_that_select(entries: list[float]) -> None:
    scale = Scale.of("weight", entries)
    assert scale.ordinary == 0.0
    assert [scale.colour(entry)[3] for entry in (0.0, 1.0)] == [0.0, 0.75]
    assert scale.colour(1.0)[:3] == MORE


def test_values() -> None:
    scale = Scale.of("value", [0.2, 0.6])
    assert scale.ordinary == 0.5
    assert scale.colour(0.2) == (*LESS, 0.75)
    assert scale.colour(0.6) == (*MORE, 0.25)
