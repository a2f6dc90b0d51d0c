"""What is said about a configuration that is wrong: every problem, each with its key, its origin and a remedy."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from wmtp_ds.errors import UserError


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """``did you mean "..."?``, or "" where nothing comes near."""
    close = difflib.get_close_matches(word, list(candidates), n=1)
    return f'did you mean "{close[0]}"?' if close else ""


@dataclass(frozen=True)
class Origin:
    """Where a value was set.

    Attributes:
        layer: "default", "extends" (a file that another one extends), "file", "environment" or "override".
        where: for people: file and line, the variable's name, or the override as typed.
    """

    layer: Literal["default", "extends", "file", "environment", "override"]
    where: str

    def __str__(self) -> str:
        return self.where


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, or worth a warning.

    Attributes:
        key: the dotted key; "" where a file as a whole is meant.
        origin: what set the value: file and line, environment variable, override; the file for a missing key.
        message: what is wrong.
        mend: how to mend it.
        severity: an error stops the run, a warning does not.
    """

    key: str
    origin: str
    message: str
    mend: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        where = f"{self.key}  ({self.origin})" if self.key else self.origin
        return f"{where}\n    {self.message}" + (f"\n    -> {self.mend}" if self.mend else "")


class ConfigError(UserError):
    """A configuration that cannot be used; ``problems`` holds everything that is wrong with it."""

    def __init__(self, path: str, problems: Sequence[Problem]):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__(f"{path}: {count}\n" + "\n".join(f"  {problem}" for problem in self.problems))
