"""Harder questions about lists of integers: runs, pairs, windows, subsequences."""

import functools
import itertools
import math
from random import Random
from typing import Any

from wmtp_ds.data.problem_steps import Step, noun


def _list_and_window(rng: Random) -> tuple[Any, ...]:
    numbers = [rng.randint(-9, 20) for _ in range(rng.randint(3, 8))]
    return numbers, rng.randint(1, len(numbers))


def _list_and_target(rng: Random) -> tuple[Any, ...]:
    numbers = [rng.randint(1, 9) for _ in range(rng.randint(0, 8))]
    return numbers, rng.randint(2, 16)


def _coins_and_amount(rng: Random) -> tuple[Any, ...]:
    return rng.sample(range(1, 8), rng.randint(0, 4)), rng.randint(0, 14)


def _two_sorted(rng: Random) -> tuple[Any, ...]:
    return tuple(sorted(rng.randint(-5, 15) for _ in range(rng.randint(0, 6))) for _ in range(2))


def _two_equally_long(rng: Random) -> tuple[Any, ...]:
    size = rng.randint(0, 5)
    return tuple([rng.randint(-5, 9) for _ in range(size)] for _ in range(2))


def _heights(rng: Random) -> tuple[Any, ...]:
    return ([rng.randint(0, 6) for _ in range(rng.randint(0, 9))],)


def _slices(v: list[int]) -> list[list[int]]:
    return [v[i:j] for i in range(len(v)) for j in range(i + 1, len(v) + 1)]


def _subsequences(v: list[int]) -> list[tuple[int, ...]]:
    return [kept for size in range(len(v) + 1) for kept in itertools.combinations(v, size)]


def _water(v: list[int]) -> int:
    return sum(max(0, min(max(v[:i], default=0), max(v[i + 1 :], default=0)) - v[i]) for i in range(len(v)))


def _fewest_coins(values: list[int], target: int) -> int:
    @functools.cache
    def fewest(left: int) -> float:
        return min((1 + fewest(left - value) for value in values if value <= left), default=math.inf) if left else 0

    return -1 if math.isinf(fewest(target)) else int(fewest(target))


def _ways_to_pay(values: list[int], target: int) -> int:
    kinds = sorted(set(values))
    amounts = itertools.product(*(range(0, target + 1, value) for value in kinds))
    return sum(1 for chosen in amounts if sum(chosen) == target)


def runs_and_pairs() -> list[Step]:
    """Questions that a loop or two answers."""
    return [
        noun(
            lambda v: max((len(s) for s in _slices(v) if len(set(s)) == 1), default=0),
            """longest_run | ints -> int | 4 | the length of the longest run of equal neighbours

            OUT = 0
            run = 0
            for i in range(len(IN)):
                if i > 0 and IN[i] == IN[i - 1]:
                    run += 1
                else:
                    run = 1
                OUT = max(OUT, run)
            ---
            OUT = 0
            for i in range(len(IN)):
                j = i
                while j < len(IN) and IN[j] == IN[i]:
                    j += 1
                if j - i > OUT:
                    OUT = j - i
            """,
        ),
        noun(
            lambda v: max((len(s) for s in _slices(v) if s == sorted(set(s))), default=0),
            """longest_climb | ints -> int | 4 | the length of the longest stretch in which each number is
            larger than the one before

            OUT = 0
            run = 0
            for i, x in enumerate(IN):
                if i > 0 and x > IN[i - 1]:
                    run += 1
                else:
                    run = 1
                OUT = max(OUT, run)
            ---
            OUT = 1 if IN else 0
            run = 1
            for x, y in zip(IN, IN[1:]):
                run = run + 1 if x < y else 1
                if run > OUT:
                    OUT = run
            """,
        ),
        noun(
            lambda v: sum(1 for a, b in itertools.combinations(v, 2) if a > b),
            """inversions | ints -> int | 5 | how many pairs of positions hold a larger number before a
            smaller one

            OUT = 0
            for i in range(len(IN)):
                for j in range(i + 1, len(IN)):
                    if IN[i] > IN[j]:
                        OUT += 1
            ---
            OUT = 0
            for i, x in enumerate(IN):
                OUT += sum(1 for y in IN[i + 1:] if y < x)
            """,
        ),
        noun(
            lambda v: max((sum(s) for s in _slices(v)), default=0),
            """best_stretch | ints -> int | 5 | the largest sum of neighbouring numbers (at least one of
            them, 0 for an empty list)

            OUT = 0
            if IN:
                OUT = IN[0]
                total = IN[0]
                for x in IN[1:]:
                    total = max(x, total + x)
                    OUT = max(OUT, total)
            ---
            OUT = max(IN, default=0)
            for i in range(len(IN)):
                total = 0
                for j in range(i, len(IN)):
                    total += IN[j]
                    if total > OUT:
                        OUT = total
            """,
        ),
        noun(
            lambda v: max([0, *(b - a for a, b in itertools.combinations(v, 2))]),
            """best_profit | ints -> int | 5 | the most that a later number exceeds an earlier one (0 if
            none does)

            OUT = 0
            for i in range(len(IN)):
                for j in range(i + 1, len(IN)):
                    OUT = max(OUT, IN[j] - IN[i])
            ---
            OUT = 0
            low = IN[0] if IN else 0
            for x in IN:
                if x - low > OUT:
                    OUT = x - low
                low = min(low, x)
            """,
        ),
        noun(
            lambda v: next((i for i in range(len(v)) if sum(v[:i]) * 2 + v[i] == sum(v)), -1),
            """balance | ints -> int | 5 | the first index at which the numbers before it and the numbers
            after it have the same sum (-1 if there is none)

            OUT = -1
            for i in range(len(IN)):
                if OUT == -1 and sum(IN[:i]) == sum(IN[i + 1:]):
                    OUT = i
            ---
            OUT = -1
            left = 0
            for i, x in enumerate(IN):
                if left == sum(IN) - left - x:
                    OUT = i
                    break
                left += x
            """,
        ),
        noun(
            lambda v: max(n for n in range(len(v) + 1) for a in [*v, 0] if set(range(a, a + n)) <= set(v)),
            """consecutive | ints -> int | 6 | the length of the longest series of consecutive integers
            that all occur, in any order

            OUT = 0
            for x in IN:
                size = 0
                while x + size in IN:
                    size += 1
                OUT = max(OUT, size)
            ---
            OUT = 0
            size = 0
            known = sorted(set(IN))
            for i in range(len(known)):
                if i > 0 and known[i] == known[i - 1] + 1:
                    size += 1
                else:
                    size = 1
                if size > OUT:
                    OUT = size
            """,
        ),
        noun(
            lambda v: [next((y for y in v[i + 1 :] if y > x), -1) for i, x in enumerate(v)],
            """next_larger | ints -> ints | 6 | a list with, for each number, the first larger number after
            it (-1 if there is none)

            OUT = []
            for i in range(len(IN)):
                found = -1
                for j in range(i + 1, len(IN)):
                    if IN[j] > IN[i]:
                        found = IN[j]
                        break
                OUT.append(found)
            ---
            OUT = [-1] * len(IN)
            stack = []
            for i in range(len(IN)):
                while stack and IN[stack[-1]] < IN[i]:
                    OUT[stack.pop()] = IN[i]
                stack.append(i)
            """,
        ),
        noun(
            lambda v: math.gcd(*v),
            """divisor | ints -> int | 4 | the greatest common divisor of the numbers (0 if there is none)

            OUT = 0
            for x in IN:
                y = abs(x)
                while y:
                    OUT, y = y, OUT % y
            ---
            OUT = 0
            for x in range(1, max([abs(y) for y in IN], default=0) + 1):
                if all(y % x == 0 for y in IN):
                    OUT = x
            """,
        ),
    ]


def two_arguments() -> list[Step]:
    """Questions about a list and something else; they come first in a problem."""
    return [
        noun(
            lambda v, t: sum(1 for a, b in itertools.combinations(v, 2) if a + b == t),
            """pairs | ints int -> int | 5 | how many pairs of positions of the list hold numbers that add
            up to the integer

            OUT = 0
            for i in range(len(IN)):
                for j in range(i + 1, len(IN)):
                    if IN[i] + IN[j] == IN2:
                        OUT += 1
            ---
            OUT = 0
            for i, x in enumerate(IN):
                OUT += IN[i + 1:].count(IN2 - x)
            """,
            inputs=_list_and_target,
        ),
        noun(
            lambda v, k: [sorted(v[i : i + k])[-1] for i in range(len(v) - k + 1)],
            """window_max | ints int -> ints | 5 | a list of the largest numbers of all stretches of that
            many neighbours

            OUT = []
            for i in range(len(IN) - IN2 + 1):
                OUT.append(max(IN[i:i + IN2]))
            ---
            OUT = [max(IN[i - IN2:i]) for i in range(IN2, len(IN) + 1)]
            """,
            inputs=_list_and_window,
        ),
        noun(
            lambda v, k: max(int(math.fsum(v[i : i + k])) for i in range(len(v) - k + 1)),
            """window_sum | ints int -> int | 4 | the largest sum of that many neighbours in the list

            OUT = max(sum(IN[i:i + IN2]) for i in range(len(IN) - IN2 + 1))
            ---
            total = sum(IN[:IN2])
            OUT = total
            for i in range(IN2, len(IN)):
                total += IN[i] - IN[i - IN2]
                if total > OUT:
                    OUT = total
            """,
            inputs=_list_and_window,
        ),
        noun(
            lambda v, k: next(x for x in v if sum(y < x for y in v) < k <= sum(y <= x for y in v)),
            """smallest | ints int -> int | 3 | the number at that place (counted from 1) when the list is
            sorted in ascending order

            OUT = sorted(IN)[IN2 - 1]
            ---
            left = list(IN)
            for i in range(IN2 - 1):
                left.remove(min(left))
            OUT = min(left)
            """,
            inputs=_list_and_window,
        ),
        noun(
            lambda v, w: sorted([*v, *w]),
            """merged | ints ints -> ints | 4 | the sorted list of all numbers of both sorted lists

            OUT = sorted(IN + IN2)
            ---
            OUT = []
            i = 0
            j = 0
            while i < len(IN) or j < len(IN2):
                if j == len(IN2) or (i < len(IN) and IN[i] <= IN2[j]):
                    OUT.append(IN[i])
                    i += 1
                else:
                    OUT.append(IN2[j])
                    j += 1
            """,
            inputs=_two_sorted,
        ),
        noun(
            lambda v, w: sorted(set(v).intersection(w)),
            """common | ints ints -> ints | 3 | the numbers that occur in both lists, each once, in
            ascending order

            OUT = sorted(set(IN) & set(IN2))
            ---
            OUT = []
            for x in sorted(IN):
                if x in IN2 and x not in OUT:
                    OUT.append(x)
            """,
            inputs=_two_sorted,
        ),
        noun(
            lambda v, w: sum(map(math.prod, zip(v, w, strict=True))),
            """dot | ints ints -> int | 2 | the sum of the products of the numbers at the same places of
            the two lists

            OUT = sum(x * y for x, y in zip(IN, IN2))
            ---
            OUT = 0
            for i in range(len(IN)):
                OUT += IN[i] * IN2[i]
            """,
            inputs=_two_equally_long,
        ),
    ]


def subsequences() -> list[Step]:
    """Questions whose plain answer tries everything; the forms are quicker."""
    return [
        noun(
            lambda v: max(len(s) for s in _subsequences(v) if list(s) == sorted(set(s))),
            """increasing | ints -> int | 8 | the length of the longest strictly increasing subsequence

            best = [1] * len(IN)
            for i in range(len(IN)):
                for j in range(i):
                    if IN[j] < IN[i]:
                        best[i] = max(best[i], best[j] + 1)
            OUT = max(best, default=0)
            ---
            tails = []
            for x in IN:
                i = 0
                while i < len(tails) and tails[i] < x:
                    i += 1
                if i == len(tails):
                    tails.append(x)
                else:
                    tails[i] = x
            OUT = len(tails)
            """,
        ),
        noun(
            lambda v: max(
                sum(v[i] for i in s)
                for n in range(len(v) + 1)
                for s in itertools.combinations(range(len(v)), n)
                if all(b - a > 1 for a, b in itertools.pairwise(s))
            ),
            """robber | ints -> int | 7 | the largest sum of some of the numbers (or none) of which no two
            are neighbours

            taken = 0
            skipped = 0
            for x in IN:
                taken, skipped = skipped + x, max(taken, skipped)
            OUT = max(taken, skipped)
            ---
            best = [0, 0]
            for x in IN:
                best.append(max(best[-1], best[-2] + x))
            OUT = best[-1]
            """,
        ),
        noun(
            lambda v: max((math.prod(s) for s in _slices(v)), default=0),
            """best_product | ints -> int | 8 | the largest product of neighbouring numbers (at least one
            of them, 0 for an empty list)

            OUT = max(IN, default=0)
            high = 1
            low = 1
            for x in IN:
                high, low = max(x, high * x, low * x), min(x, high * x, low * x)
                OUT = max(OUT, high)
            ---
            OUT = max(IN, default=0)
            for i in range(len(IN)):
                product = 1
                for x in IN[i:]:
                    product *= x
                    if product > OUT:
                        OUT = product
            """,
        ),
        noun(
            lambda v: len({sum(s) for s in _subsequences(v)}),
            """subset_sums | ints -> int | 8 | how many different sums the subsets of the numbers have (the
            empty one has 0)

            found = {0}
            for x in IN:
                found = found | {x + y for y in found}
            OUT = len(found)
            ---
            found = [0]
            for x in IN:
                for y in list(found):
                    if x + y not in found:
                        found.append(x + y)
            OUT = len(found)
            """,
        ),
        noun(
            lambda v: any(sum(s) * 2 == sum(v) for s in _subsequences(v)),
            """divisible | ints -> flag | 9 | whether the numbers can be divided into two groups with equal
            sums

            found = {0}
            for x in IN:
                found = {y + x for y in found} | {y - x for y in found}
            OUT = 0 in found
            ---
            found = {0}
            for x in IN:
                found |= {x + y for y in found}
            OUT = any(2 * y == sum(IN) for y in found)
            """,
        ),
        noun(
            _water,
            """water | ints -> int | 8 | how many units of water stay between bars of these heights when it
            rains

            OUT = 0
            for i in range(len(IN)):
                left = max(IN[:i + 1])
                right = max(IN[i:])
                OUT += min(left, right) - IN[i]
            ---
            OUT = 0
            i = 0
            j = len(IN) - 1
            left = 0
            right = 0
            while i <= j:
                left = max(left, IN[i])
                right = max(right, IN[j])
                if left < right:
                    OUT += left - IN[i]
                    i += 1
                else:
                    OUT += right - IN[j]
                    j -= 1
            """,
            inputs=_heights,
        ),
        noun(
            lambda v, t: sum(1 for s in _subsequences(v) if sum(s) == t),
            """subsets | ints int -> int | 9 | how many ways there are to choose places of the list whose
            numbers add up to the integer

            ways = [1] + [0] * IN2
            for x in IN:
                for i in range(IN2, x - 1, -1):
                    ways[i] += ways[i - x]
            OUT = ways[IN2]
            ---
            def count(i, left):
                if i == len(IN):
                    return 1 if left == 0 else 0
                return count(i + 1, left) + count(i + 1, left - IN[i])
            OUT = count(0, IN2)
            """,
            inputs=_list_and_target,
        ),
        noun(
            _fewest_coins,
            """coins | ints int -> int | 9 | how few coins with these values, each used as often as needed,
            add up to the integer (-1 if none do)

            best = [0] + [-1] * IN2
            for i in range(1, IN2 + 1):
                for x in IN:
                    if x <= i and best[i - x] >= 0 and (best[i] < 0 or best[i - x] + 1 < best[i]):
                        best[i] = best[i - x] + 1
            OUT = best[IN2]
            ---
            reached = {0}
            steps = 0
            while IN2 not in reached and steps <= IN2:
                reached = {x + y for x in IN for y in reached if x + y <= IN2}
                steps += 1
            OUT = steps if IN2 in reached else -1
            """,
            inputs=_list_and_target,
        ),
        noun(
            _ways_to_pay,
            """change | ints int -> int | 10 | how many ways there are to pay the integer with coins of the
            different values in the list

            ways = [1] + [0] * IN2
            for x in set(IN):
                for i in range(x, IN2 + 1):
                    ways[i] += ways[i - x]
            OUT = ways[IN2]
            ---
            def count(values, left):
                if left == 0:
                    return 1
                if left < 0 or not values:
                    return 0
                return count(values, left - values[0]) + count(values[1:], left)
            OUT = count(sorted(set(IN)), IN2)
            """,
            inputs=_coins_and_amount,
        ),
    ]
