"""Steps on single integers: arithmetic, digits, divisors, counting and recursion."""

import functools
import itertools
import math
from fractions import Fraction
from random import Random
from typing import Any

from wmtp_ds.data.problem_steps import Step, noun

_ROMAN = (
    ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX"),
    ("", "X", "XX", "XXX", "XL", "L", "LX", "LXX", "LXXX", "XC"),
)


def _number(low: int, high: int) -> Any:
    def make(rng: Random) -> tuple[int]:
        return (rng.randint(low, high),)

    return make


def _positive_pair(rng: Random) -> tuple[Any, ...]:
    return rng.randint(1, 40), rng.randint(1, 40)


def _number_and_base(rng: Random) -> tuple[Any, ...]:
    return rng.randint(0, 200), rng.randint(2, 9)


def _power_and_modulus(rng: Random) -> tuple[Any, ...]:
    return rng.randint(0, 12), rng.randint(0, 9), rng.randint(2, 30)


def _circle(rng: Random) -> tuple[Any, ...]:
    return rng.randint(1, 12), rng.randint(1, 5)


def _queens(size: int) -> int:
    return sum(
        len({c + r for r, c in enumerate(p)}) == size == len({c - r for r, c in enumerate(p)})
        for p in itertools.permutations(range(size))
    )


def _josephus(n: int, k: int) -> int:
    circle = list(range(n))
    at = 0
    while len(circle) > 1:
        at = (at + k - 1) % len(circle)
        circle.pop(at)
    return circle[0]


def _partitions(n: int, largest: int) -> int:
    return 1 if n == 0 else sum(_partitions(n - part, part) for part in range(1, min(n, largest) + 1))


def _collatz(n: int) -> int:
    steps = 0
    while n != 1:
        n, steps = (n >> 1 if not n & 1 else n * 3 + 1), steps + 1
    return steps


def changes(rng: Random) -> list[Step]:
    """What is computed of any integer, in a line or two; these follow other steps, too."""
    k, m = rng.randint(2, 9), rng.randint(5, 13)
    return [
        noun(
            lambda v: int(Fraction(v) - m * math.floor(Fraction(v, m))),
            f"""mod | int -> int | 1 | its remainder modulo {m}

            OUT = IN % {m}
            ---
            OUT = IN - IN // {m} * {m}
            """,
        ),
        noun(
            lambda v: sum((v, k)),
            f"""plus | int -> int | 1 | it plus {k}

            OUT = IN + {k}
            ---
            OUT = {k} + IN
            """,
        ),
        noun(
            lambda v: sum([v] * k),
            f"""times | int -> int | 1 | {k} times it

            OUT = IN * {k}
            ---
            OUT = {k} * IN
            """,
        ),
        noun(
            lambda v: abs(v) ** 2,
            """squared | int -> int | 1 | its square

            OUT = IN ** 2
            ---
            OUT = IN * IN
            """,
        ),
        noun(
            lambda v: max(v, -v),
            """absolute | int -> int | 1 | its absolute value

            OUT = abs(IN)
            ---
            OUT = IN if IN >= 0 else -IN
            """,
        ),
        noun(
            lambda v: sum(int(c) for c in str(v) if c.isdigit()),
            """digit_sum | int -> int | 2 | the sum of its decimal digits

            OUT = sum(int(c) for c in str(abs(IN)))
            ---
            OUT = 0
            rest = abs(IN)
            while rest > 0:
                OUT += rest % 10
                rest //= 10
            """,
        ),
        noun(
            lambda v: int("".join(reversed(str(abs(v))))),
            """reversed | int -> int | 2 | its decimal digits in reverse order as a number, without its
            sign

            OUT = int(str(abs(IN))[::-1])
            ---
            OUT = 0
            rest = abs(IN)
            while rest > 0:
                OUT = OUT * 10 + rest % 10
                rest //= 10
            """,
        ),
        noun(
            lambda v: abs(v).bit_count(),
            """bits | int -> int | 2 | how many ones its absolute value has in binary

            OUT = bin(abs(IN)).count('1')
            ---
            OUT = 0
            rest = abs(IN)
            while rest:
                OUT += rest % 2
                rest //= 2
            """,
        ),
        noun(
            lambda v: not v & 1,
            """is_even | int -> flag | 1 | whether it is even

            OUT = IN % 2 == 0
            ---
            OUT = not IN % 2
            """,
        ),
        noun(
            lambda v: f"{v:b}" if v >= 0 else f"-{-v:b}",
            """binary | int -> text | 3 | its binary digits as a string, with a minus sign if it is
            negative

            OUT = bin(IN).replace('0b', '')
            ---
            OUT = ''
            rest = abs(IN)
            while rest > 1:
                OUT = str(rest % 2) + OUT
                rest //= 2
            OUT = str(rest) + OUT
            if IN < 0:
                OUT = '-' + OUT
            """,
        ),
        noun(
            lambda v: [int(c) for c in str(v) if c.isdigit()],
            """digits | int -> ints | 2 | the list of its decimal digits

            OUT = [int(c) for c in str(abs(IN))]
            ---
            OUT = []
            for c in str(abs(IN)):
                OUT.append(int(c))
            """,
        ),
    ]


def divisors() -> list[Step]:
    """Questions about divisors, primes and digits of a small natural number."""
    return [
        noun(
            lambda n: sum(k for k in range(n + 1)),
            """triangular | int -> int | 1 | the sum of the integers from 1 to it

            OUT = IN * (IN + 1) // 2
            ---
            OUT = sum(range(1, IN + 1))
            ---
            OUT = 0
            for i in range(1, IN + 1):
                OUT += i
            """,
            inputs=_number(0, 30),
        ),
        noun(
            math.factorial,
            """factorial | int -> int | 2 | its factorial

            OUT = 1
            for i in range(2, IN + 1):
                OUT *= i
            ---
            def product(n):
                return 1 if n < 2 else n * product(n - 1)
            OUT = product(IN)
            """,
            inputs=_number(0, 9),
        ),
        noun(
            lambda n: len({d for d in range(1, n + 1) if n % d == 0}),
            """divisors | int -> int | 2 | how many divisors it has

            OUT = sum(1 for i in range(1, IN + 1) if IN % i == 0)
            ---
            OUT = 0
            for i in range(1, IN + 1):
                if IN % i == 0:
                    OUT += 1
            """,
            inputs=_number(1, 60),
        ),
        noun(
            lambda n: [d for d in range(1, n + 1) if (n // d) * d == n],
            """divisor_list | int -> ints | 2 | the list of its divisors in ascending order

            OUT = [i for i in range(1, IN + 1) if IN % i == 0]
            ---
            OUT = []
            for i in range(1, IN + 1):
                if not IN % i:
                    OUT.append(i)
            """,
            inputs=_number(1, 60),
        ),
        noun(
            lambda n: sum(1 for p in range(2, n + 1) if all(p % q for q in range(2, math.isqrt(p) + 1))),
            """primes | int -> int | 4 | how many prime numbers there are up to it

            OUT = 0
            for i in range(2, IN + 1):
                if all(i % j for j in range(2, i)):
                    OUT += 1
            ---
            sieve = [True] * (IN + 1)
            OUT = 0
            for i in range(2, IN + 1):
                if sieve[i]:
                    OUT += 1
                    for j in range(i, IN + 1, i):
                        sieve[j] = False
            """,
            inputs=_number(0, 50),
        ),
        noun(
            lambda n: max(p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, p))),
            """largest_prime | int -> int | 5 | its largest prime factor

            OUT = 1
            rest = IN
            i = 2
            while rest > 1:
                if rest % i == 0:
                    OUT = i
                    rest //= i
                else:
                    i += 1
            ---
            OUT = 1
            for i in range(2, IN + 1):
                if IN % i == 0 and all(i % j != 0 for j in range(2, i)):
                    OUT = i
            """,
            inputs=_number(2, 99),
        ),
        noun(
            lambda n: [p for p in range(2, n + 1) for e in range(1, 8) if n % p**e == 0 and _is_prime(p)],
            """factors | int -> ints | 6 | the list of its prime factors in ascending order, each as often
            as it divides it

            OUT = []
            rest = IN
            for i in range(2, IN + 1):
                while rest % i == 0:
                    OUT.append(i)
                    rest //= i
            ---
            OUT = []
            rest = IN
            i = 2
            while rest > 1:
                if rest % i:
                    i += 1
                else:
                    OUT.append(i)
                    rest = rest // i
            """,
            inputs=_number(2, 99),
        ),
        noun(
            lambda n: sum(d for d in range(1, n) if n % d == 0) == n,
            """is_perfect | int -> flag | 4 | whether it equals the sum of its divisors other than itself

            OUT = sum(i for i in range(1, IN) if IN % i == 0) == IN
            ---
            total = 0
            for i in range(1, IN):
                if IN % i == 0:
                    total += i
            OUT = total == IN
            """,
            inputs=lambda rng: (rng.choice([6, 28, rng.randint(2, 40)]),),
        ),
        noun(
            _collatz,
            """collatz | int -> int | 4 | how many steps it takes to get to 1, where a step halves an even
            number and takes an odd one to 3 times it plus 1

            OUT = 0
            n = IN
            while n != 1:
                if n % 2 == 0:
                    n //= 2
                else:
                    n = 3 * n + 1
                OUT += 1
            ---
            def steps(n):
                if n == 1:
                    return 0
                return 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)
            OUT = steps(IN)
            """,
            inputs=_number(1, 20),
        ),
        noun(
            lambda n: 1 + (n - 1) % 9 if n else 0,
            """digital_root | int -> int | 3 | what is left when its decimal digits are added up, again and
            again, until one digit is left

            OUT = IN
            while OUT > 9:
                OUT = sum(int(c) for c in str(OUT))
            ---
            def root(n):
                return n if n < 10 else root(n // 10 + n % 10)
            OUT = root(IN)
            """,
            inputs=_number(0, 999),
        ),
        noun(
            lambda n: "".join(
                _ROMAN[place][int(digit)] for place, digit in reversed(list(enumerate(reversed(str(n)))))
            ),
            """roman | int -> text | 6 | it in Roman numerals

            OUT = ''
            rest = IN
            for value, sign in [(90, 'XC'), (50, 'L'), (40, 'XL'), (10, 'X'), (9, 'IX'), (5, 'V'), (4, 'IV'), (1, 'I')]:
                while rest >= value:
                    OUT += sign
                    rest -= value
            ---
            tens = ['', 'X', 'XX', 'XXX', 'XL', 'L', 'LX', 'LXX', 'LXXX', 'XC']
            ones = ['', 'I', 'II', 'III', 'IV', 'V', 'VI', 'VII', 'VIII', 'IX']
            OUT = tens[IN // 10] + ones[IN % 10]
            """,
            inputs=_number(1, 99),
        ),
    ]


def _is_prime(p: int) -> bool:
    return all(p % q for q in range(2, p))


def counting() -> list[Step]:
    """Counting and recursion."""
    return [
        noun(
            lambda n: round(((1 + math.sqrt(5)) / 2) ** n / math.sqrt(5)),
            """fibonacci | int -> int | 3 | the Fibonacci number of that index, beginning with 0 and 1

            a, b = 0, 1
            for i in range(IN):
                a, b = b, a + b
            OUT = a
            ---
            def fib(n):
                return n if n < 2 else fib(n - 1) + fib(n - 2)
            OUT = fib(IN)
            ---
            known = [0, 1]
            while len(known) <= IN:
                known.append(known[-1] + known[-2])
            OUT = known[IN]
            """,
            inputs=_number(0, 14),
        ),
        noun(
            lambda n: sum(1 for size in range(n + 1) for s in itertools.product((1, 2, 3), repeat=size) if sum(s) == n),
            """stairs | int -> int | 6 | how many ways there are to climb that many stairs in steps of 1, 2
            or 3

            ways = [1]
            for i in range(1, IN + 1):
                ways.append(sum(ways[max(0, i - 3):i]))
            OUT = ways[IN]
            ---
            def climb(n):
                if n < 0:
                    return 0
                if n == 0:
                    return 1
                return climb(n - 1) + climb(n - 2) + climb(n - 3)
            OUT = climb(IN)
            """,
            inputs=_number(0, 9),
        ),
        noun(
            lambda n: math.comb(2 * n, n) // (n + 1),
            """catalan | int -> int | 8 | how many ways there are to write that many pairs of brackets so
            that they match

            ways = [1]
            for i in range(IN):
                ways.append(sum(ways[j] * ways[i - j] for j in range(i + 1)))
            OUT = ways[IN]
            ---
            def count(opened, left):
                if left == 0:
                    return 1 if opened == 0 else 0
                if opened < 0:
                    return 0
                return count(opened + 1, left - 1) + count(opened - 1, left - 1)
            OUT = count(0, 2 * IN)
            """,
            inputs=_number(0, 6),
        ),
        noun(
            lambda n: _partitions(n, n),
            """partitions | int -> int | 9 | how many ways there are to write it as a sum of positive
            integers, whatever their order

            ways = [1] + [0] * IN
            for part in range(1, IN + 1):
                for i in range(part, IN + 1):
                    ways[i] += ways[i - part]
            OUT = ways[IN]
            ---
            def count(left, part):
                if left == 0:
                    return 1
                if left < 0 or part == 0:
                    return 0
                return count(left - part, part) + count(left, part - 1)
            OUT = count(IN, IN)
            """,
            inputs=_number(0, 12),
        ),
        noun(
            _queens,
            """queens | int -> int | 11 | how many ways there are to place that many queens on a board of
            that size so that none attacks another

            def place(row, columns):
                if row == IN:
                    return 1
                total = 0
                for x in range(IN):
                    if all(x != y and abs(x - y) != row - i for i, y in enumerate(columns)):
                        total += place(row + 1, columns + [x])
                return total
            OUT = place(0, [])
            ---
            boards = [[]]
            for row in range(IN):
                longer = []
                for board in boards:
                    for x in range(IN):
                        if all(x != y and abs(x - y) != row - i for i, y in enumerate(board)):
                            longer.append(board + [x])
                boards = longer
            OUT = len(boards)
            """,
            inputs=_number(0, 6),
        ),
        noun(
            lambda n: [math.comb(n, k) for k in range(n + 1)],
            """pascal | int -> ints | 5 | the row of that index (counted from 0) of Pascal's triangle as a
            list

            OUT = [1]
            for i in range(IN):
                OUT = [1] + [OUT[j] + OUT[j + 1] for j in range(len(OUT) - 1)] + [1]
            ---
            OUT = [1]
            for i in range(IN):
                OUT.append(OUT[-1] * (IN - i) // (i + 1))
            """,
            inputs=_number(0, 8),
        ),
        noun(
            lambda a, b: max(d for d in range(1, a + 1) if a % d == b % d == 0),
            """gcd | int int -> int | 4 | the greatest common divisor of the two integers

            a, b = IN, IN2
            while b:
                a, b = b, a % b
            OUT = a
            ---
            OUT = 1
            for i in range(1, min(IN, IN2) + 1):
                if IN % i == 0 and IN2 % i == 0:
                    OUT = i
            """,
            inputs=_positive_pair,
        ),
        noun(
            lambda a, b: min(m for m in range(1, a * b + 1) if m % a == m % b == 0),
            """lcm | int int -> int | 4 | the least common multiple of the two integers

            OUT = IN
            while OUT % IN2 != 0:
                OUT += IN
            ---
            a, b = IN, IN2
            while b:
                a, b = b, a % b
            OUT = IN * IN2 // a
            """,
            inputs=_positive_pair,
        ),
        noun(
            lambda n, b: (
                functools.reduce(lambda text, e: text + str(n // b**e % b), range(8, -1, -1), "").lstrip("0") or "0"
            ),
            """base | int int -> text | 5 | the first integer written in the base that the second one gives

            OUT = ''
            rest = IN
            while rest > 0:
                OUT = str(rest % IN2) + OUT
                rest //= IN2
            if OUT == '':
                OUT = '0'
            ---
            def write(n):
                return str(n) if n < IN2 else write(n // IN2) + str(n % IN2)
            OUT = write(IN)
            """,
            inputs=_number_and_base,
        ),
        noun(
            lambda b, e, m: b**e % m,
            """power | int int int -> int | 4 | the first integer to the power of the second, modulo the
            third

            OUT = 1
            for i in range(IN2):
                OUT = OUT * IN % IN3
            ---
            OUT = pow(IN, IN2, IN3)
            ---
            OUT = 1
            a, e = IN, IN2
            while e > 0:
                if e % 2 == 1:
                    OUT = OUT * a % IN3
                a = a * a % IN3
                e //= 2
            """,
            inputs=_power_and_modulus,
        ),
        noun(
            _josephus,
            """survivor | int int -> int | 6 | which one (counted from 0) is left of that many people in a
            circle when, counting around from the first, each time the one at the count that the second
            integer gives leaves, until one is left

            OUT = 0
            for i in range(2, IN + 1):
                OUT = (OUT + IN2) % i
            ---
            circle = list(range(IN))
            i = 0
            while len(circle) > 1:
                i = (i + IN2 - 1) % len(circle)
                del circle[i]
            OUT = circle[0]
            """,
            inputs=_circle,
        ),
    ]
