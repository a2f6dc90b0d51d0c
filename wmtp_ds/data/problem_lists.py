"""Steps on lists of integers: rearrangements, and what is computed of a list in a line or two."""

import itertools
import math
from random import Random

from wmtp_ds.data.problem_steps import Fold, Step, clause, noun


def _sorting() -> list[Step]:
    return [
        clause(
            sorted,
            """sorted | ints | 1 | sorts the numbers in ascending order

            OUT = sorted(IN)
            ---
            OUT = []
            for x in IN:
                i = 0
                while i < len(OUT) and OUT[i] <= x:
                    i += 1
                OUT.insert(i, x)
            ---
            OUT = list(IN)
            for i in range(len(OUT)):
                for j in range(i + 1, len(OUT)):
                    if OUT[j] < OUT[i]:
                        OUT[i], OUT[j] = OUT[j], OUT[i]
            """,
        ),
        clause(
            lambda v: [-y for y in sorted(-x for x in v)],
            """descending | ints | 1 | sorts the numbers in descending order

            OUT = sorted(IN, reverse=True)
            ---
            OUT = sorted(IN)[::-1]
            ---
            OUT = sorted(IN, key=lambda x: -x)
            """,
        ),
        clause(
            lambda v: list(reversed(v)),
            """reversed | ints | 1 | reverses the order of the numbers

            OUT = IN[::-1]
            ---
            OUT = list(reversed(IN))
            ---
            OUT = []
            for x in IN:
                OUT.insert(0, x)
            ---
            OUT = [IN[len(IN) - 1 - i] for i in range(len(IN))]
            """,
        ),
    ]


def _selections(k: int) -> list[Step]:
    return [
        clause(
            lambda v: list(itertools.islice(v, k)),
            f"""first | ints | 1 | keeps only the first {k} of the numbers

            OUT = IN[:{k}]
            ---
            OUT = [x for i, x in enumerate(IN) if i < {k}]
            ---
            OUT = []
            for x in IN:
                if len(OUT) < {k}:
                    OUT.append(x)
            """,
        ),
        clause(
            lambda v: list(itertools.islice(v, k, None)),
            f"""later | ints | 1 | drops the first {k} of the numbers

            OUT = IN[{k}:]
            ---
            OUT = [x for i, x in enumerate(IN) if i >= {k}]
            """,
        ),
        clause(
            lambda v: list(itertools.compress(v, itertools.cycle((1, 0)))),
            """alternate | ints | 1 | keeps every second number, beginning with the first

            OUT = IN[::2]
            ---
            OUT = [IN[i] for i in range(0, len(IN), 2)]
            ---
            OUT = [x for i, x in enumerate(IN) if i % 2 == 0]
            """,
        ),
        clause(
            lambda v: [x for i, x in enumerate(v) if v.index(x) == i],
            """unique | ints | 2 | removes duplicates, keeping the first of each

            OUT = list(dict.fromkeys(IN))
            ---
            OUT = []
            for x in IN:
                if x not in OUT:
                    OUT.append(x)
            ---
            OUT = [x for i, x in enumerate(IN) if x not in IN[:i]]
            """,
        ),
        clause(
            lambda v: [x for x in v if any(y > x for y in v)],
            """lower | ints | 2 | removes every occurrence of the largest number

            OUT = [x for x in IN if x != max(IN)]
            ---
            OUT = []
            for x in IN:
                if x < max(IN):
                    OUT.append(x)
            """,
        ),
    ]


def _neighbours(turn: int) -> list[Step]:
    return [
        clause(
            lambda v: [b - a for a, b in itertools.pairwise(v)],
            """difference | ints | 2 | takes the difference between each number and the one before it

            OUT = [IN[i] - IN[i - 1] for i in range(1, len(IN))]
            ---
            OUT = [x - y for y, x in zip(IN, IN[1:])]
            ---
            OUT = []
            for i in range(len(IN) - 1):
                OUT.append(IN[i + 1] - IN[i])
            """,
        ),
        clause(
            lambda v: [sum(pair) for pair in itertools.pairwise(v)],
            """neighbour | ints | 2 | takes the sum of each two neighbours

            OUT = [IN[i] + IN[i + 1] for i in range(len(IN) - 1)]
            ---
            OUT = [x + y for x, y in zip(IN, IN[1:])]
            """,
        ),
        clause(
            lambda v: list(itertools.accumulate(v)),
            """running | ints | 2 | replaces each number by the sum of all numbers up to it

            OUT = [sum(IN[:i + 1]) for i in range(len(IN))]
            ---
            OUT = []
            total = 0
            for x in IN:
                total += x
                OUT.append(total)
            ---
            OUT = []
            for x in IN:
                OUT.append(x + OUT[-1] if OUT else x)
            """,
        ),
        clause(
            lambda v: list(itertools.accumulate(v, max)),
            """record | ints | 2 | replaces each number by the largest number up to it

            OUT = [max(IN[:i + 1]) for i in range(len(IN))]
            ---
            OUT = []
            for x in IN:
                if OUT and OUT[-1] > x:
                    x = OUT[-1]
                OUT.append(x)
            """,
        ),
        clause(
            lambda v: [v[i] * i for i in range(len(v))],
            """weighted | ints | 2 | multiplies each number by its index (counted from 0)

            OUT = [i * x for i, x in enumerate(IN)]
            ---
            OUT = []
            for i in range(len(IN)):
                OUT.append(IN[i] * i)
            """,
        ),
        clause(
            lambda v: [v[(i + turn) % len(v)] for i in range(len(v))],
            f"""rotated | ints | 3 | rotates the list to the left by {turn} places

            OUT = list(IN)
            for i in range({turn}):
                if OUT:
                    OUT.append(OUT.pop(0))
            ---
            OUT = []
            if IN:
                i = {turn} % len(IN)
                OUT = IN[i:] + IN[:i]
            """,
        ),
    ]


def rearrangements(rng: Random) -> list[Step]:
    """Steps from a list to a list that look at positions or at several numbers."""
    return [*_sorting(), *_selections(rng.randint(1, 4)), *_neighbours(rng.randint(2, 5))]


def results(rng: Random) -> list[Step]:
    """What is computed of a list of numbers, in a line or two."""
    k = rng.randint(1, 9)
    return [
        noun(
            lambda v: math.floor(math.fsum(v)),
            """sum | ints -> int | 1 | the sum of the numbers

            OUT = sum(IN)
            ---
            OUT = 0
            for x in IN:
                OUT += x
            """,
            fold=Fold("0", "OUT += x", "x + REST"),
        ),
        noun(
            lambda v: len(list(v)),
            """count | ints -> int | 1 | how many numbers there are

            OUT = len(IN)
            ---
            OUT = sum(1 for x in IN)
            """,
            fold=Fold("0", "OUT += 1", "1 + REST"),
        ),
        noun(
            lambda v: sorted(v)[-1] if v else 0,
            """max | ints -> int | 1 | the largest number (0 if there is none)

            OUT = max(IN) if IN else 0
            ---
            OUT = max(IN, default=0)
            ---
            OUT = sorted(IN)[-1] if IN else 0
            """,
        ),
        noun(
            lambda v: sorted(v)[0] if v else 0,
            """min | ints -> int | 1 | the smallest number (0 if there is none)

            OUT = min(IN) if IN else 0
            ---
            OUT = min(IN, default=0)
            ---
            OUT = sorted(IN)[0] if IN else 0
            """,
        ),
        noun(
            lambda v: [0, *v][-1],
            """last | ints -> int | 1 | the last number (0 if there is none)

            OUT = IN[-1] if IN else 0
            ---
            OUT = 0
            for x in IN:
                OUT = x
            """,
            fold=Fold("0", "OUT = x"),
        ),
        noun(
            math.prod,
            """product | ints -> int | 2 | the product of the numbers (1 if there is none)

            OUT = 1
            for x in IN:
                OUT *= x
            ---
            OUT = 1
            for i in range(len(IN)):
                OUT = OUT * IN[i]
            """,
            fold=Fold("1", "OUT *= x", "x * REST"),
        ),
        noun(
            lambda v: sum(x * (-1) ** i for i, x in enumerate(v)),
            """alternating_sum | ints -> int | 2 | the sum of the numbers at even indices minus the sum of
            the others

            OUT = sum(IN[::2]) - sum(IN[1::2])
            ---
            OUT = sum(x if i % 2 == 0 else -x for i, x in enumerate(IN))
            ---
            OUT = 0
            for i, x in enumerate(IN):
                if i % 2 == 0:
                    OUT += x
                else:
                    OUT -= x
            """,
        ),
        noun(
            lambda v: sum(v.index(x) == i for i, x in enumerate(v)),
            """distinct | ints -> int | 1 | how many different numbers there are

            OUT = len(set(IN))
            ---
            OUT = len([x for i, x in enumerate(IN) if x not in IN[:i]])
            """,
        ),
        noun(
            lambda v: max((a - b for a in v for b in v), default=0),
            """spread | ints -> int | 2 | the largest number minus the smallest (0 if there is none)

            OUT = max(IN) - min(IN) if IN else 0
            ---
            OUT = sorted(IN)[-1] - sorted(IN)[0] if IN else 0
            """,
        ),
        noun(
            lambda v: "-".join(f"{x}" for x in v),
            """joined | ints -> text | 1 | the numbers joined by dashes

            OUT = '-'.join([str(x) for x in IN])
            ---
            OUT = '-'.join(map(str, IN))
            ---
            OUT = ''
            for x in IN:
                if OUT:
                    OUT += '-'
                OUT += str(x)
            """,
        ),
        noun(
            lambda v: all(a <= b for a, b in itertools.combinations(v, 2)),
            """is_sorted | ints -> flag | 2 | whether the numbers are in ascending order

            OUT = IN == sorted(IN)
            ---
            OUT = all(IN[i] <= IN[i + 1] for i in range(len(IN) - 1))
            ---
            OUT = all(x <= y for x, y in zip(IN, IN[1:]))
            """,
        ),
        noun(
            lambda v: any(x == k for x in v),
            f"""has | ints -> flag | 1 | whether one of the numbers is {k}

            OUT = {k} in IN
            ---
            OUT = any(x == {k} for x in IN)
            ---
            OUT = IN.count({k}) > 0
            """,
        ),
        noun(
            lambda v: max(sorted(v), key=v.count) if v else 0,
            """mode | ints -> int | 3 | the most frequent number (the smallest of those if there are
            several, 0 if there is none)

            OUT = 0
            best = 0
            for x in sorted(IN):
                if IN.count(x) > best:
                    best = IN.count(x)
                    OUT = x
            ---
            OUT = min(IN, key=lambda x: (-IN.count(x), x)) if IN else 0
            """,
        ),
        noun(
            lambda v: max((x for x in v if any(y > x for y in v)), default=0),
            """second | ints -> int | 3 | the second largest of the different numbers (0 if there is none)

            OUT = 0
            if len(set(IN)) > 1:
                OUT = sorted(set(IN))[-2]
            ---
            OUT = max([x for x in IN if x != max(IN)], default=0)
            """,
        ),
        noun(
            lambda v: sum(1 for a, b in itertools.pairwise(v) if b > a),
            """rise | ints -> int | 3 | how many numbers are larger than the number before them

            OUT = sum(1 for i in range(1, len(IN)) if IN[i] > IN[i - 1])
            ---
            OUT = 0
            for x, y in zip(IN, IN[1:]):
                if y > x:
                    OUT += 1
            ---
            OUT = len([i for i in range(len(IN) - 1) if IN[i] < IN[i + 1]])
            """,
        ),
        noun(
            lambda v: sorted(v)[(len(v) - 1) // 2] if v else 0,
            """median | ints -> int | 3 | the median (the lower of the two in the middle, 0 if there is
            none)

            OUT = sorted(IN)[(len(IN) - 1) // 2] if IN else 0
            ---
            OUT = 0
            for x in IN:
                smaller = sum(1 for y in IN if y < x)
                equal = IN.count(x)
                if smaller <= (len(IN) - 1) // 2 < smaller + equal:
                    OUT = x
            """,
        ),
    ]
