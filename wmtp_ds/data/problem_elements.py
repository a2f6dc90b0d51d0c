"""Steps that treat each number of a list by itself: filters and replacements."""

import math
from random import Random

from wmtp_ds.data.problem_steps import Step, each, keep


def _digit_sum(number: int) -> int:
    total, rest = 0, abs(number)
    while rest:
        total, rest = total + rest % 10, rest // 10
    return total


def filters(rng: Random) -> list[Step]:
    """Steps that keep some of the numbers."""
    k, d, low = rng.randint(1, 9), rng.randint(3, 5), rng.randint(-3, 3)
    high, digit = low + rng.randint(4, 9), rng.randint(0, 9)
    return [
        keep(lambda v: v % 2 == 0, "even | ints | 1 | keeps only the even numbers", "x % 2 == 0", "not x % 2"),
        keep(lambda v: v % 2, "odd | ints | 1 | keeps only the odd numbers", "x % 2 == 1", "x % 2 != 0"),
        keep(lambda v: v > 0, "positive | ints | 1 | keeps only the positive numbers", "x > 0", "0 < x"),
        keep(lambda v: v < 0, "negative | ints | 1 | keeps only the negative numbers", "x < 0", "0 > x"),
        keep(
            lambda v: v not in range(-1000, k + 1) and v > 0,
            f"large | ints | 1 | keeps only the numbers greater than {k}",
            f"x > {k}",
            f"x >= {k + 1}",
        ),
        keep(
            lambda v: not v > k,
            f"small | ints | 1 | keeps only the numbers up to {k}",
            f"x <= {k}",
            f"x < {k + 1}",
        ),
        keep(
            lambda v: v // d * d == v,
            f"multiple | ints | 1 | keeps only the numbers divisible by {d}",
            f"x % {d} == 0",
            f"not x % {d}",
        ),
        keep(
            lambda v: v // d * d != v,
            f"indivisible | ints | 1 | removes the numbers divisible by {d}",
            f"x % {d} != 0",
            f"x % {d}",
        ),
        keep(
            lambda v: v in range(low, high + 1),
            f"between | ints | 1 | keeps only the numbers from {low} to {high}, both included",
            f"{low} <= x <= {high}",
            f"x >= {low} and x <= {high}",
        ),
        keep(
            lambda v: str(v).endswith(str(digit)),
            f"ending | ints | 2 | keeps only the numbers whose last decimal digit is {digit}",
            f"abs(x) % 10 == {digit}",
            f"str(x)[-1] == '{digit}'",
        ),
        keep(
            lambda v: v >= 0 and math.isqrt(v) ** 2 == v,
            "square | ints | 2 | keeps only the perfect squares",
            "x >= 0 and int(x ** 0.5) ** 2 == x",
            "any(y * y == x for y in range(x + 1))",
        ),
        keep(
            lambda v: v > 1 and all(v % q for q in range(2, math.isqrt(v) + 1)),
            "prime | ints | 3 | keeps only the prime numbers",
            "x > 1 and all(x % y != 0 for y in range(2, x))",
            "x > 1 and not any(x % y == 0 for y in range(2, x))",
            "len([y for y in range(1, x + 1) if x % y == 0]) == 2",
        ),
        keep(
            lambda v: _digit_sum(v) % 2 == 0,
            "balanced | ints | 3 | keeps only the numbers whose decimal digits have an even sum",
            "sum(map(int, str(abs(x)))) % 2 == 0",
            "sum(int(c) for c in str(abs(x))) % 2 == 0",
        ),
    ]


def replacements(rng: Random) -> list[Step]:
    """Steps that replace each number."""
    k, m, low = rng.randint(2, 9), rng.randint(3, 9), rng.randint(-2, 3)
    high = low + rng.randint(3, 9)
    return [
        each(lambda v: v**2, "squared | ints | 1 | squares each number", "x * x", "x ** 2"),
        each(lambda v: v**3, "cubed | ints | 1 | cubes each number", "x ** 3", "x * x * x"),
        each(lambda v: k * v, f"times | ints | 1 | multiplies each number by {k}", f"x * {k}", f"{k} * x"),
        each(lambda v: v + k, f"plus | ints | 1 | adds {k} to each number", f"x + {k}", f"{k} + x"),
        each(lambda v: v - k, f"minus | ints | 1 | subtracts {k} from each number", f"x - {k}", f"-{k} + x"),
        each(lambda v: 0 - v, "negated | ints | 1 | negates each number", "-x", "x * -1"),
        each(
            lambda v: max(v, -v),
            "absolute | ints | 1 | replaces each number by its absolute value",
            "abs(x)",
            "x if x >= 0 else -x",
            "-x if x < 0 else x",
        ),
        each(
            lambda v: v - v // m * m,
            f"remainder | ints | 1 | replaces each number by its remainder modulo {m}",
            f"x % {m}",
            f"divmod(x, {m})[1]",
        ),
        each(
            lambda v: math.floor(v / 2),
            "halved | ints | 1 | halves each number, rounding down",
            "x // 2",
            "x >> 1",
        ),
        each(
            lambda v: sorted((low, v, high))[1],
            f"clipped | ints | 2 | raises each number below {low} to {low} and lowers each number above {high} to "
            f"{high}",
            f"min(max(x, {low}), {high})",
            f"max({low}, min({high}, x))",
            f"{low} if x < {low} else {high} if x > {high} else x",
        ),
        each(
            _digit_sum,
            "digit | ints | 2 | replaces each number by the sum of its decimal digits",
            "sum(map(int, str(abs(x))))",
            "sum(int(c) for c in str(abs(x)))",
        ),
        each(
            lambda v: len(f"{abs(v):d}"),
            "length | ints | 2 | replaces each number by how many decimal digits it has",
            "len(str(abs(x)))",
            "len(str(x).lstrip('-'))",
        ),
        each(
            lambda v: v - k if v % 2 else v + k,
            f"shifted | ints | 2 | adds {k} to the even numbers and subtracts {k} from the odd ones",
            f"x + {k} if x % 2 == 0 else x - {k}",
            f"x - {k} if x % 2 else x + {k}",
        ),
    ]
