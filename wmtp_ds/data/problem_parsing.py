"""Harder questions about strings: brackets, expressions, patterns, edit distances."""

import fnmatch
import functools
import itertools
from random import Random
from typing import Any

from wmtp_ds.data.problem_steps import Step, noun


def _brackets(rng: Random) -> tuple[Any, ...]:
    text = ""
    for _ in range(rng.randint(0, 4)):
        inner = rng.choice(["", text])
        text = rng.choice([f"({inner})", f"[{inner}]", f"{text}()", f"({text}"])
    return ("".join(rng.sample(text, len(text))) if rng.random() < 0.2 else text,)


def _round_brackets(rng: Random) -> tuple[Any, ...]:
    text = ""
    for _ in range(rng.randint(0, 5)):
        text = rng.choice([f"({text})", f"{text}()", f"a{text}"])
    return (text,)


def _sum_text(rng: Random) -> tuple[Any, ...]:
    return (_join(rng, [str(rng.randint(0, 30)) for _ in range(rng.randint(1, 5))], "+-"),)


def _product_text(rng: Random) -> tuple[Any, ...]:
    return (_join(rng, [str(rng.randint(0, 12)) for _ in range(rng.randint(1, 5))], "+-*"),)


def _nested_sum_text(rng: Random) -> tuple[Any, ...]:
    def expression(depth: int) -> str:
        parts = [
            f"({expression(depth - 1)})" if depth and rng.random() < 0.5 else str(rng.randint(0, 9))
            for _ in range(rng.randint(1, 3))
        ]
        return _join(rng, parts, "+-*")

    return (expression(2),)


def _join(rng: Random, parts: list[str], signs: str) -> str:
    return "".join(part + rng.choice(signs) for part in parts)[:-1]


def _postfix(rng: Random) -> tuple[Any, ...]:
    def expression(depth: int) -> list[str]:
        if depth == 0 or rng.random() < 0.2:
            return [str(rng.randint(0, 9))]
        return [*expression(depth - 1), *expression(depth - 1), rng.choice("+-*")]

    return (" ".join(expression(rng.randint(0, 2))),)


def _evaluate_postfix(text: str) -> Any:
    """Read from the right, as nested prefix notation: unlike the forms, without a stack of values."""
    parts = text.split()

    def value() -> int:
        part = parts.pop()
        if part.isdigit():
            return int(part)
        right, left = value(), value()
        return left + right if part == "+" else left - right if part == "-" else left * right

    return value()


def _repeats(rng: Random) -> tuple[Any, ...]:
    return ("".join(f"{rng.randint(1, 4)}{rng.choice('abxy')}" for _ in range(rng.randint(0, 4))),)


def _nested_repeats(rng: Random) -> tuple[Any, ...]:
    def text(depth: int) -> str:
        parts = [
            f"{rng.randint(1, 3)}[{text(depth - 1)}]" if depth and rng.random() < 0.6 else rng.choice("abc")
            for _ in range(rng.randint(1, 2))
        ]
        return "".join(parts)

    return (text(2),)


def _unpack(text: str) -> str:
    """Expand the innermost brackets first, until there are none."""
    while "]" in text:
        end = text.index("]")
        start = text.rindex("[", 0, end)
        text = text[: start - 1] + text[start + 1 : end] * int(text[start - 1]) + text[end + 1 :]
    return text


def _letters(low: int, high: int, alphabet: str) -> Any:
    def make(rng: Random) -> tuple[Any, ...]:
        return ("".join(rng.choice(alphabet) for _ in range(rng.randint(low, high))),)

    return make


def _two_short(rng: Random) -> tuple[Any, ...]:
    return tuple("".join(rng.choice("abc") for _ in range(rng.randint(0, 5))) for _ in range(2))


def _text_and_words(rng: Random) -> tuple[Any, ...]:
    words = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(1, 3))]
    text = "".join(rng.choice(words) for _ in range(rng.randint(0, 4)))
    return (text if rng.random() < 0.6 else text + rng.choice("ab")), words


def _text_and_pattern(rng: Random) -> tuple[Any, ...]:
    text = "".join(rng.choice("ab") for _ in range(rng.randint(0, 5)))
    pattern = "".join(rng.choice([c, c, "?", "*"]) for c in text) + rng.choice(["", "", "*", "a"])
    return text, pattern


def _subsequences(text: str) -> set[str]:
    return {"".join(p) for size in range(len(text) + 1) for p in itertools.combinations(text, size)}


def _parts(text: str) -> list[str]:
    return [text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)]


@functools.cache
def _edits(s: str, t: str) -> int:
    if not s or not t:
        return len(s) + len(t)
    return min(_edits(s[1:], t) + 1, _edits(s, t[1:]) + 1, _edits(s[1:], t[1:]) + (s[0] != t[0]))


def _without_pairs(text: str) -> str:
    while (shorter := text.replace("()", "").replace("[]", "")) != text:
        text = shorter
    return text


def brackets_and_expressions() -> list[Step]:
    """Questions about texts with a grammar."""
    return [
        noun(
            lambda v: _without_pairs(v) == "",
            """is_balanced | text -> flag | 5 | whether its round and square brackets match (it has nothing
            else)

            stack = []
            OUT = True
            for x in IN:
                if x in '([':
                    stack.append(x)
                elif not stack or stack.pop() + x not in ('()', '[]'):
                    OUT = False
            if stack:
                OUT = False
            ---
            rest = IN
            while '()' in rest or '[]' in rest:
                rest = rest.replace('()', '').replace('[]', '')
            OUT = rest == ''
            """,
            inputs=_brackets,
        ),
        noun(
            lambda v: max((v[:i].count("(") - v[:i].count(")") for i in range(len(v) + 1)), default=0),
            """depth | text -> int | 4 | how deeply its round brackets are nested

            OUT = 0
            level = 0
            for x in IN:
                if x == '(':
                    level += 1
                elif x == ')':
                    level -= 1
                OUT = max(OUT, level)
            ---
            OUT = 0
            for i in range(len(IN)):
                level = IN[:i + 1].count('(') - IN[:i + 1].count(')')
                if level > OUT:
                    OUT = level
            """,
            inputs=_round_brackets,
        ),
        noun(
            lambda v: sum(int(part) for part in v.replace("-", "+-").split("+")),
            """evaluated | text -> int | 7 | the value of the sum that it holds (numbers with '+' and '-'
            between them)

            OUT = 0
            sign = 1
            number = 0
            for x in IN:
                if x.isdigit():
                    number = number * 10 + int(x)
                else:
                    OUT += sign * number
                    number = 0
                    sign = 1 if x == '+' else -1
            OUT += sign * number
            ---
            OUT = 0
            number = ''
            for x in IN + '+':
                if x in '+-' and number:
                    OUT += int(number)
                    number = ''
                if x != '+':
                    number += x
            """,
            inputs=_sum_text,
        ),
        noun(
            lambda v: eval(v),
            """computed | text -> int | 9 | the value of the expression that it holds (numbers with '+',
            '-' and '*' between them, where '*' comes first)

            OUT = 0
            for part in IN.replace('-', '+-').split('+'):
                value = 1
                for factor in part.split('*'):
                    value *= int(factor)
                OUT += value
            ---
            stack = []
            number = ''
            sign = '+'
            for x in IN + '+':
                if x.isdigit():
                    number += x
                else:
                    if sign == '*':
                        stack.append(stack.pop() * int(number))
                    elif sign == '-':
                        stack.append(-int(number))
                    else:
                        stack.append(int(number))
                    sign = x
                    number = ''
            OUT = sum(stack)
            """,
            inputs=_product_text,
        ),
        noun(
            lambda v: eval(v),
            """calculated | text -> int | 11 | the value of the expression that it holds (digits, '+', '-',
            '*' and round brackets, where '*' comes before '+' and '-')

            def total(i):
                value, i = product(i)
                while i < len(IN) and IN[i] in '+-':
                    sign = 1 if IN[i] == '+' else -1
                    term, i = product(i + 1)
                    value += sign * term
                return value, i
            def product(i):
                value, i = atom(i)
                while i < len(IN) and IN[i] == '*':
                    factor, i = atom(i + 1)
                    value *= factor
                return value, i
            def atom(i):
                if IN[i] == '(':
                    value, i = total(i + 1)
                    return value, i + 1
                return int(IN[i]), i + 1
            OUT = total(0)[0]
            ---
            order = {'+': 1, '-': 1, '*': 2}
            values = []
            signs = []
            def apply():
                y = values.pop()
                x = values.pop()
                sign = signs.pop()
                values.append(x + y if sign == '+' else x - y if sign == '-' else x * y)
            for x in IN:
                if x == '(':
                    signs.append(x)
                elif x == ')':
                    while signs[-1] != '(':
                        apply()
                    signs.pop()
                elif x in order:
                    while signs and signs[-1] != '(' and order[signs[-1]] >= order[x]:
                        apply()
                    signs.append(x)
                else:
                    values.append(int(x))
            while signs:
                apply()
            OUT = values[0]
            """,
            inputs=_nested_sum_text,
        ),
        noun(
            _evaluate_postfix,
            """postfix | text -> int | 7 | the value of the postfix expression that it holds ('+', '-' and
            '*', separated by spaces)

            stack = []
            for x in IN.split():
                if x.isdigit():
                    stack.append(int(x))
                else:
                    b = stack.pop()
                    a = stack.pop()
                    if x == '+':
                        stack.append(a + b)
                    elif x == '-':
                        stack.append(a - b)
                    else:
                        stack.append(a * b)
            OUT = stack[0]
            ---
            stack = []
            for x in IN.split():
                if x == '+':
                    stack[-2:] = [stack[-2] + stack[-1]]
                elif x == '-':
                    stack[-2:] = [stack[-2] - stack[-1]]
                elif x == '*':
                    stack[-2:] = [stack[-2] * stack[-1]]
                else:
                    stack.append(int(x))
            OUT = stack.pop()
            """,
            inputs=_postfix,
        ),
        noun(
            lambda v: "".join(c * int(n) for n, c in zip(v[::2], v[1::2], strict=True)),
            """decoded | text -> text | 5 | it with each digit and the letter after it replaced by the
            letter that many times

            OUT = ''
            for i in range(0, len(IN), 2):
                OUT += IN[i + 1] * int(IN[i])
            ---
            OUT = ''
            number = 0
            for x in IN:
                if x.isdigit():
                    number = int(x)
                else:
                    OUT += x * number
            """,
            inputs=_repeats,
        ),
        noun(
            _unpack,
            """unpacked | text -> text | 10 | it with each part of the form 'k[text]', where k is a digit,
            replaced by the text k times, from the inside out

            stack = []
            OUT = ''
            number = 0
            for x in IN:
                if x.isdigit():
                    number = int(x)
                elif x == '[':
                    stack.append((OUT, number))
                    OUT = ''
                elif x == ']':
                    before, times = stack.pop()
                    OUT = before + OUT * times
                else:
                    OUT += x
            ---
            def unpack(i):
                text = ''
                while i < len(IN) and IN[i] != ']':
                    if IN[i].isdigit():
                        inner, end = unpack(i + 2)
                        text += inner * int(IN[i])
                        i = end
                    else:
                        text += IN[i]
                    i += 1
                return text, i
            OUT = unpack(0)[0]
            """,
            inputs=_nested_repeats,
        ),
    ]


def patterns() -> list[Step]:
    """Questions about parts of texts, and about two texts."""
    return [
        noun(
            lambda v: max((len(p) for p in _parts(v) if len(set(p)) == len(p)), default=0),
            """longest_distinct | text -> int | 7 | the length of its longest stretch without a repeated
            character

            OUT = 0
            start = 0
            for i in range(len(IN)):
                while IN[i] in IN[start:i]:
                    start += 1
                OUT = max(OUT, i - start + 1)
            ---
            OUT = 0
            part = ''
            for x in IN:
                part = part[part.find(x) + 1:] + x
                if len(part) > OUT:
                    OUT = len(part)
            """,
            inputs=_letters(0, 9, "abcde"),
        ),
        noun(
            lambda v: max((len(p) for p in _parts(v) if p == p[::-1]), default=0),
            """longest_palindrome | text -> int | 8 | the length of its longest stretch that reads the same
            backwards

            OUT = 0
            for i in range(len(IN)):
                for left, right in [(i, i), (i, i + 1)]:
                    while left >= 0 and right < len(IN) and IN[left] == IN[right]:
                        OUT = max(OUT, right - left + 1)
                        left -= 1
                        right += 1
            ---
            OUT = 0
            for i in range(len(IN)):
                for j in range(i, len(IN)):
                    if IN[i:j + 1] == IN[i:j + 1][::-1] and j - i + 1 > OUT:
                        OUT = j - i + 1
            """,
            inputs=_letters(0, 8, "aab"),
        ),
        noun(
            lambda v: sum(p == p[::-1] for p in _parts(v)),
            """palindromes | text -> int | 7 | how many of its stretches (at least one character long) read
            the same backwards

            OUT = 0
            for i in range(len(IN)):
                for j in range(i + 1, len(IN) + 1):
                    if IN[i:j] == IN[i:j][::-1]:
                        OUT += 1
            ---
            OUT = 0
            for i in range(2 * len(IN) - 1):
                left = i // 2
                right = left + i % 2
                while left >= 0 and right < len(IN) and IN[left] == IN[right]:
                    OUT += 1
                    left -= 1
                    right += 1
            """,
            inputs=_letters(0, 7, "aab"),
        ),
        noun(
            lambda v: max(len(s) for s in _subsequences(v) if s == s[::-1]),
            """palindrome_inside | text -> int | 9 | the length of the longest palindrome that is left when
            some of its characters are removed

            def longest(i, j):
                if i > j:
                    return 0
                if i == j:
                    return 1
                if IN[i] == IN[j]:
                    return longest(i + 1, j - 1) + 2
                return max(longest(i + 1, j), longest(i, j - 1))
            OUT = longest(0, len(IN) - 1)
            ---
            row = [0] * (len(IN) + 1)
            for x in IN:
                before = row
                row = [0]
                for j, y in enumerate(reversed(IN)):
                    row.append(before[j] + 1 if x == y else max(before[j + 1], row[j]))
            OUT = row[len(IN)]
            """,
            inputs=_letters(0, 7, "abc"),
        ),
        noun(
            lambda v: len(_subsequences(v)),
            """subsequences | text -> int | 10 | how many different strings are left when some of its
            characters (or none, or all) are removed

            found = {''}
            for x in IN:
                found = found | {y + x for y in found}
            OUT = len(found)
            ---
            OUT = 1
            last = {}
            for x in IN:
                before = OUT
                OUT = 2 * OUT - last.get(x, 0)
                last[x] = before
            """,
            inputs=_letters(0, 7, "abc"),
        ),
        noun(
            lambda s, t: max(len(c) for c in _subsequences(s) & _subsequences(t)),
            """common | text text -> int | 9 | the length of the longest string that is left of both
            strings when some characters are removed

            row = [0] * (len(IN2) + 1)
            for x in IN:
                before = row
                row = [0]
                for j, y in enumerate(IN2):
                    row.append(before[j] + 1 if x == y else max(before[j + 1], row[j]))
            OUT = row[-1]
            ---
            def longest(s, t):
                if not s or not t:
                    return 0
                if s[0] == t[0]:
                    return 1 + longest(s[1:], t[1:])
                return max(longest(s[1:], t), longest(s, t[1:]))
            OUT = longest(IN, IN2)
            """,
            inputs=_two_short,
        ),
        noun(
            _edits,
            """edits | text text -> int | 10 | how few insertions, deletions and replacements of a
            character turn the first string into the second

            row = list(range(len(IN2) + 1))
            for i, x in enumerate(IN):
                before = row
                row = [i + 1]
                for j, y in enumerate(IN2):
                    row.append(min(before[j + 1] + 1, row[j] + 1, before[j] + (x != y)))
            OUT = row[-1]
            ---
            def distance(i, j):
                if i == 0 or j == 0:
                    return i + j
                if IN[i - 1] == IN2[j - 1]:
                    return distance(i - 1, j - 1)
                return 1 + min(distance(i - 1, j), distance(i, j - 1), distance(i - 1, j - 1))
            OUT = distance(len(IN), len(IN2))
            """,
            inputs=_two_short,
        ),
        noun(
            lambda t, words: any(
                "".join(p) == t for n in range(len(t) + 1) for p in itertools.product(words, repeat=n)
            ),
            """is_made_of | text words -> flag | 9 | whether the string is made of words of the list, one
            after another, each as often as needed

            reached = [True] + [False] * len(IN)
            for i in range(1, len(IN) + 1):
                for x in IN2:
                    if IN[:i].endswith(x) and reached[i - len(x)]:
                        reached[i] = True
            OUT = reached[len(IN)]
            ---
            def split(rest):
                if rest == '':
                    return True
                return any(rest.startswith(x) and split(rest[len(x):]) for x in IN2)
            OUT = split(IN)
            """,
            inputs=_text_and_words,
        ),
        noun(
            lambda t, pattern: fnmatch.fnmatchcase(t, pattern),
            """is_match | text text -> flag | 11 | whether the first string matches the second, in which
            '?' stands for one character and '*' for any number of them, also none

            def match(i, j):
                if j == len(IN2):
                    return i == len(IN)
                if IN2[j] == '*':
                    return match(i, j + 1) or (i < len(IN) and match(i + 1, j))
                return i < len(IN) and IN2[j] in (IN[i], '?') and match(i + 1, j + 1)
            OUT = match(0, 0)
            ---
            reached = [True] + [False] * len(IN)
            for y in IN2:
                before = reached
                reached = [before[0] and y == '*']
                for i, x in enumerate(IN):
                    if y == '*':
                        reached.append(reached[i] or before[i + 1])
                    else:
                        reached.append(before[i] and y in (x, '?'))
            OUT = reached[-1]
            """,
            inputs=_text_and_pattern,
        ),
    ]
