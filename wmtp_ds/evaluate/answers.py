"""From a problem to a prompt, and from what a model answers to a program."""

import re

from wmtp_ds.data.rows import Row

# A block as chat models write it; a last one that was cut off counts, too.
_FENCE = re.compile(r"```[ \t]*([\w+-]*)[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_PYTHON = frozenset(("", "python", "python3", "py"))
# Where a completion of a function is over: the next thing at the left margin (Chen et al. 2021, section 2.1).
_NEXT = re.compile(r"\n(?=(?:class|def|if|print|#|@|assert|import|from)\b|#|@|```)")


def program_of(answer: str) -> str:
    """The program in an answer: its first block of Python between fences, else all of it."""
    for match in _FENCE.finditer(answer):
        if match[1].lower() in _PYTHON:
            return match[2]
    return answer


def completed(beginning: str, answer: str) -> str:
    """A function whose beginning was the prompt, with the answer as far as it belongs to it."""
    return beginning + cut_completion(answer)


def cut_completion(answer: str) -> str:
    """A completion up to where something else begins."""
    match = _NEXT.search(answer)
    return answer if match is None else answer[: match.start()]


def is_over(answer: str) -> bool:
    """Whether a completion has come to where something else begins."""
    return _NEXT.search(answer) is not None


def same_text(answer: str, reference: str) -> bool:
    """Whether two programs are the same text, but for white space at line ends and around."""

    def plain(text: str) -> list[str]:
        return [line.rstrip() for line in text.strip().splitlines()]

    return plain(answer) == plain(reference)


def row_of(problem_id: str, instruction: str, text: str) -> Row:
    """A problem as the prompt's template reads it."""
    return Row(problem_id=problem_id, instruction=instruction, input=text, output="-", is_correct=True)
