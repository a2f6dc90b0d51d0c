"""Steps on strings and on lists of words."""

import itertools
from collections import Counter
from random import Random
from typing import Any

from wmtp_ds.data.problem_steps import Fold, Step, clause, each, keep, noun

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = (
    "apple",
    "banana",
    "cat",
    "dog",
    "echo",
    "fig",
    "grape",
    "hat",
    "ice",
    "jam",
    "kite",
    "lemon",
    "moon",
    "noon",
    "owl",
    "pear",
    "queen",
    "rain",
    "sun",
    "tree",
    "under",
    "vase",
    "wind",
    "year",
    "zebra",
    "level",
    "radar",
    "abba",
    "otto",
    "aa",
    "book",
    "see",
    "moss",
)


def _is_vowel(c: str) -> bool:
    return c in set("aeiouAEIOU")


def _runs(text: str) -> list[str]:
    return ["".join(group) for _, group in itertools.groupby(text)]


def _small_text(rng: Random) -> str:
    return "".join(rng.choice("abcab") for _ in range(rng.randint(0, 8)))


def _two_texts(rng: Random) -> tuple[Any, ...]:
    size = rng.randint(0, 7)
    return tuple("".join(rng.choice("abc") for _ in range(size)) for _ in range(2))


def _part_and_text(rng: Random) -> tuple[Any, ...]:
    text = "".join(rng.choice(LETTERS[:8]) for _ in range(rng.randint(0, 8)))
    part = "".join(c for c in text if rng.random() < 0.5)
    return (part if rng.random() < 0.6 else part[::-1]), text


def _anagrams(rng: Random) -> tuple[Any, ...]:
    letters = list(rng.choice(WORDS))
    other = list(letters)
    rng.shuffle(other)
    if rng.random() < 0.5:
        other[-1] = rng.choice("aeo")
    return "".join(letters), "".join(other)


def _lowercase_and_shift(rng: Random) -> tuple[Any, ...]:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(0, 7))), rng.randint(0, 25)


def characters(rng: Random) -> list[Step]:
    """Steps that keep or replace single characters."""
    c = rng.choice("aeostn")
    d = rng.choice("xyz")
    return [
        keep(
            _is_vowel,
            "vowel | text | 1 | keeps only the vowels",
            "x in 'aeiouAEIOU'",
            "x.lower() in 'aeiou'",
            "x.upper() in 'AEIOU'",
        ),
        keep(
            lambda v: not _is_vowel(v),
            "vowelless | text | 1 | removes the vowels",
            "x not in 'aeiouAEIOU'",
            "x.lower() not in 'aeiou'",
        ),
        keep(lambda v: "0" <= v <= "9", "digit | text | 1 | keeps only the digits", "x.isdigit()", "x in '0123456789'"),
        keep(lambda v: v.lower() in LETTERS, "letter | text | 1 | keeps only the letters", "x.isalpha()"),
        keep(lambda v: v != " ", "spaceless | text | 1 | removes the spaces", "x != ' '", "not x == ' '"),
        keep(
            lambda v: ord(v) != ord(c),
            f"without_{c} | text | 1 | removes every '{c}'",
            f"x != '{c}'",
            f"x not in '{c}'",
        ),
        each(
            lambda v: d if ord(v) == ord(c) else v,
            f"{c}_{d} | text | 1 | replaces every '{c}' by '{d}'",
            f"'{d}' if x == '{c}' else x",
            f"x if x != '{c}' else '{d}'",
        ),
        each(
            lambda v: LETTERS[(LETTERS.index(v) + 1) % 26] if v in LETTERS else v,
            "next | text | 3 | replaces each lowercase letter by the next one of the alphabet, and 'z' by 'a'",
            "chr((ord(x) - 97 + 1) % 26 + 97) if 'a' <= x <= 'z' else x",
            "'a' if x == 'z' else chr(ord(x) + 1) if 'a' <= x < 'z' else x",
        ),
    ]


def strings(rng: Random) -> list[Step]:
    """Steps from a string to a string that look at the whole of it."""
    k = rng.randint(2, 5)
    return [
        clause(
            lambda v: "".join(reversed(v)),
            """reversed | text | 1 | reverses it

            OUT = IN[::-1]
            ---
            OUT = ''.join(reversed(IN))
            ---
            OUT = ''
            for x in IN:
                OUT = x + OUT
            """,
        ),
        clause(
            lambda v: "".join(c + c for c in v),
            """doubled | text | 1 | writes each character twice

            OUT = ''.join([x * 2 for x in IN])
            ---
            OUT = ''
            for x in IN:
                OUT += x + x
            """,
        ),
        clause(
            lambda v: "".join(c.upper() for c in v),
            """upper | text | 1 | turns it into upper case

            OUT = IN.upper()
            ---
            OUT = ''.join([x.upper() for x in IN])
            """,
        ),
        clause(
            lambda v: "".join(c.upper() if c.islower() else c.lower() for c in v),
            """swapped | text | 1 | swaps upper and lower case

            OUT = IN.swapcase()
            ---
            OUT = ''.join([x.lower() if x.isupper() else x.upper() for x in IN])
            """,
        ),
        clause(
            lambda v: "".join(sorted(v)),
            """sorted | text | 1 | sorts its characters

            OUT = ''.join(sorted(IN))
            ---
            OUT = ''
            for x in sorted(IN):
                OUT += x
            """,
        ),
        clause(
            lambda v: "".join(itertools.islice(v, k)),
            f"""first | text | 1 | keeps only the first {k} characters

            OUT = IN[:{k}]
            ---
            OUT = ''.join([x for i, x in enumerate(IN) if i < {k}])
            """,
        ),
        clause(
            lambda v: "".join(itertools.compress(v, itertools.cycle((1, 0)))),
            """alternate | text | 1 | keeps every second character, beginning with the first

            OUT = IN[::2]
            ---
            OUT = ''.join([IN[i] for i in range(0, len(IN), 2)])
            ---
            OUT = ''
            for i, x in enumerate(IN):
                if i % 2 == 0:
                    OUT += x
            """,
        ),
        clause(
            lambda v: "".join(c for i, c in enumerate(v) if v.index(c) == i),
            """unique | text | 2 | keeps only the first of each character

            OUT = ''.join(dict.fromkeys(IN))
            ---
            OUT = ''
            for x in IN:
                if x not in OUT:
                    OUT += x
            """,
        ),
        clause(
            lambda v: "".join(run[0] for run in _runs(v)),
            """squeezed | text | 2 | shortens each run of equal neighbouring characters to one

            OUT = ''
            for x in IN:
                if not OUT or OUT[-1] != x:
                    OUT += x
            ---
            OUT = ''.join([x for i, x in enumerate(IN) if i == 0 or x != IN[i - 1]])
            """,
        ),
    ]


def answers() -> list[Step]:
    """What is computed of a string."""
    return [
        noun(
            lambda v: sum(1 for _ in v),
            """length | text -> int | 1 | its length

            OUT = len(IN)
            ---
            OUT = sum(1 for x in IN)
            """,
            fold=Fold("0", "OUT += 1", "1 + REST"),
        ),
        noun(
            lambda v: len([c for c in v if _is_vowel(c)]),
            """vowels | text -> int | 1 | how many vowels it has

            OUT = sum(1 for x in IN if x in 'aeiouAEIOU')
            ---
            OUT = len([x for x in IN.lower() if x in 'aeiou'])
            ---
            OUT = 0
            for x in IN:
                if x.lower() in 'aeiou':
                    OUT += 1
            """,
        ),
        noun(
            lambda v: len(Counter(v)),
            """distinct | text -> int | 1 | how many different characters it has

            OUT = len(set(IN))
            ---
            OUT = len([x for i, x in enumerate(IN) if x not in IN[:i]])
            """,
        ),
        noun(
            lambda v: all(v[i] == v[-1 - i] for i in range(len(v))),
            """is_palindrome | text -> flag | 2 | whether it reads the same backwards

            OUT = IN == IN[::-1]
            ---
            OUT = all(IN[i] == IN[len(IN) - 1 - i] for i in range(len(IN) // 2))
            ---
            OUT = True
            for x, y in zip(IN, reversed(IN)):
                if x != y:
                    OUT = False
            """,
        ),
        noun(
            lambda v: sum(int(c) for c in v if c.isdigit()),
            """digit_sum | text -> int | 2 | the sum of the digits in it

            OUT = sum(int(x) for x in IN if x.isdigit())
            ---
            OUT = 0
            for x in IN:
                if x in '0123456789':
                    OUT += int(x)
            """,
        ),
        noun(
            lambda v: min(v, key=lambda c: (-v.count(c), v.index(c))) if v else "",
            """most_common | text -> text | 3 | the most frequent character (the first of those if there
            are several, an empty string if there is none)

            OUT = ''
            for x in IN:
                if OUT == '' or IN.count(x) > IN.count(OUT):
                    OUT = x
            ---
            OUT = max(IN, key=IN.count) if IN else ''
            """,
        ),
        noun(
            lambda v: max(map(len, _runs(v)), default=0),
            """longest_run | text -> int | 4 | the length of its longest run of equal characters

            OUT = 0
            run = 0
            for i, x in enumerate(IN):
                run = run + 1 if i > 0 and IN[i - 1] == x else 1
                OUT = max(OUT, run)
            ---
            OUT = 0
            for i in range(len(IN)):
                j = i
                while j < len(IN) and IN[j] == IN[i]:
                    j += 1
                OUT = max(OUT, j - i)
            """,
        ),
        noun(
            lambda v: "".join(f"{run[0]}{len(run)}" for run in _runs(v)),
            """encoded | text -> text | 5 | it with each run of equal characters written as the character
            and the run's length

            OUT = ''
            i = 0
            while i < len(IN):
                j = i
                while j < len(IN) and IN[j] == IN[i]:
                    j += 1
                OUT += IN[i] + str(j - i)
                i = j
            ---
            OUT = ''
            run = 0
            for i, x in enumerate(IN):
                run += 1
                if i + 1 == len(IN) or IN[i + 1] != x:
                    OUT += x + str(run)
                    run = 0
            """,
        ),
        noun(
            lambda v: [ord(c) for c in v],
            """codes | text -> ints | 1 | the list of its character codes

            OUT = [ord(x) for x in IN]
            ---
            OUT = list(map(ord, IN))
            ---
            OUT = []
            for x in IN:
                OUT.append(ord(x))
            """,
        ),
        noun(
            lambda v: [w for w in v.split(" ") if w],
            """words | text -> words | 1 | the list of its words (what stands between spaces)

            OUT = IN.split()
            ---
            OUT = [x for x in IN.split(' ') if x != '']
            """,
        ),
    ]


def word_lists(rng: Random) -> list[Step]:
    """Steps on lists of words."""
    k = rng.randint(3, 5)
    c = rng.choice("aeonr")
    return [
        keep(
            lambda v: len(v) not in range(k + 1),
            f"long | words | 1 | keeps only the words longer than {k} letters",
            f"len(x) > {k}",
            f"len(x) >= {k + 1}",
        ),
        keep(
            lambda v: v.count(c) > 0,
            f"with_{c} | words | 1 | keeps only the words with an '{c}'",
            f"'{c}' in x",
            f"x.count('{c}') > 0",
        ),
        keep(
            lambda v: "".join(reversed(v)) == v,
            "palindrome | words | 2 | keeps only the words that read the same backwards",
            "x == x[::-1]",
            "x == ''.join(reversed(x))",
        ),
        each(
            lambda v: "".join(reversed(v)),
            "reversed | words | 1 | reverses each word",
            "x[::-1]",
            "''.join(reversed(x))",
        ),
        each(
            lambda v: "".join(c.lower() if i else c.upper() for i, c in enumerate(v)),
            "capital | words | 1 | writes each word with a capital first letter and the others small",
            "x[:1].upper() + x[1:].lower()",
            "x.capitalize()",
        ),
        each(
            lambda v: next(iter(v), ""), "initial | words | 1 | replaces each word by its first letter", "x[0]", "x[:1]"
        ),
        each(
            lambda v: "".join(sorted(v)),
            "sorted_letter | words | 2 | sorts the letters of each word",
            "''.join(sorted(x))",
        ),
        clause(
            sorted,
            """sorted | words | 1 | sorts the words

            OUT = sorted(IN)
            ---
            OUT = list(IN)
            OUT.sort()
            """,
        ),
        clause(
            lambda v: [w for size in range(20) for w in v if len(w) == size],
            """by_length | words | 2 | sorts the words by length, keeping the order of those of the same
            length

            OUT = sorted(IN, key=len)
            ---
            OUT = []
            for x in IN:
                i = 0
                while i < len(OUT) and len(OUT[i]) <= len(x):
                    i += 1
                OUT.insert(i, x)
            """,
        ),
        clause(
            lambda v: list(reversed(v)),
            """backwards | words | 1 | reverses the order of the words

            OUT = IN[::-1]
            ---
            OUT = list(reversed(IN))
            """,
        ),
        noun(
            lambda v: "".join(f" {w}" for w in v)[1:],
            """joined | words -> text | 1 | the words joined by spaces

            OUT = ' '.join(IN)
            ---
            OUT = ''
            for x in IN:
                if OUT:
                    OUT += ' '
                OUT += x
            """,
        ),
        noun(
            lambda v: sum(1 for _ in v),
            """count | words -> int | 1 | how many words there are

            OUT = len(IN)
            ---
            OUT = sum(1 for x in IN)
            """,
            fold=Fold("0", "OUT += 1", "1 + REST"),
        ),
        noun(
            lambda v: [len(w) for w in v],
            """lengths | words -> ints | 1 | the list of the words' lengths

            OUT = [len(x) for x in IN]
            ---
            OUT = list(map(len, IN))
            ---
            OUT = []
            for x in IN:
                OUT.append(len(x))
            """,
        ),
        noun(
            lambda v: min(v, key=lambda w: -len(w)) if v else "",
            """longest | words -> text | 2 | the longest word (the first of those if there are several, an
            empty string if there is none)

            OUT = max(IN, key=len) if IN else ''
            ---
            OUT = ''
            for x in IN:
                if len(x) > len(OUT):
                    OUT = x
            """,
        ),
    ]


def two_strings() -> list[Step]:
    """Questions about two strings, or a string and a number; they come first in a problem."""
    return [
        noun(
            lambda s, t: sum(a != b for a, b in zip(s, t, strict=True)),
            """hamming | text text -> int | 2 | how many places there are at which the two strings of the
            same length differ

            OUT = sum(1 for x, y in zip(IN, IN2) if x != y)
            ---
            OUT = 0
            for i in range(len(IN)):
                if IN[i] != IN2[i]:
                    OUT += 1
            """,
            inputs=_two_texts,
        ),
        noun(
            lambda s, t: Counter(s) == Counter(t),
            """is_anagram | text text -> flag | 3 | whether the two strings have the same letters, each as
            often

            OUT = sorted(IN) == sorted(IN2)
            ---
            OUT = all(IN.count(x) == IN2.count(x) for x in IN + IN2)
            """,
            inputs=_anagrams,
        ),
        noun(
            lambda s, t: any("".join(p) == s for p in itertools.combinations(t, len(s))),
            """is_subsequence | text text -> flag | 5 | whether the first string is left when some
            characters of the second are removed

            i = 0
            for x in IN2:
                if i < len(IN) and IN[i] == x:
                    i += 1
            OUT = i == len(IN)
            ---
            rest = iter(IN2)
            OUT = all(x in rest for x in IN)
            """,
            inputs=_part_and_text,
        ),
        noun(
            lambda s, k: "".join((LETTERS * 2)[LETTERS.index(c) + k] for c in s),
            """caesar | text int -> text | 4 | the string of lowercase letters with each letter moved
            forward by that many places, going on with 'a' after 'z'

            OUT = ''.join([chr((ord(x) - ord('a') + IN2) % 26 + ord('a')) for x in IN])
            ---
            letters = 'abcdefghijklmnopqrstuvwxyz'
            OUT = ''
            for x in IN:
                OUT += letters[(letters.index(x) + IN2) % 26]
            """,
            inputs=_lowercase_and_shift,
        ),
    ]
