"""What a token of Python is: a keyword, a name, a number, …"""

from collections.abc import Sequence

from pygments.lexers.python import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, Punctuation, String

KINDS = ("keyword", "name", "number", "operator", "string", "comment", "indentation", "white space", "end", "other")
_WORDS = ((Keyword, "keyword"), (Operator.Word, "keyword"), (Name, "name"), (Number, "number"), (String, "string"))
_OTHERS = ((Comment, "comment"), (Operator, "operator"), (Punctuation, "operator"))


def kinds_of(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """The kind of each token of a solution: that of its first character that is not white space.

    Args:
        text: a solution; it need not be valid Python.
        spans: where tokens begin and end in it, in characters; the last one, if it is empty, is the end token.

    Returns:
        One of :data:`KINDS` for each. Tokens of white space alone are indentation at the beginning of a line.
    """
    of_character = ["other"] * len(text)
    for begin, found, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens_unprocessed(text):
        kind = next((name for kind, name in (*_WORDS, *_OTHERS) if found in kind), "other")
        of_character[begin : begin + len(value)] = [kind] * len(value)
    kinds = []
    for place, (begin, end) in enumerate(spans):
        if begin == end:
            kinds.append("end" if place == len(spans) - 1 else "other")
            continue
        first = next((at for at in range(begin, end) if not text[at].isspace()), None)
        if first is not None:
            kinds.append(of_character[first])
            continue
        line = (
            text[text.rfind("\n", 0, end) + 1 : end]
            if "\n" in text[begin:end]
            else text[text.rfind("\n", 0, begin) + 1 : end]
        )
        followed = end < len(text) and text[end] != "\n"
        kinds.append("indentation" if line and not line.strip() and followed else "white space")
    return kinds
