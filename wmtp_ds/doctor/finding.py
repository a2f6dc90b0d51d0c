"""One line of what ``wmtp-ds doctor`` says."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: "ok"; "warning": something will not work, or badly, that not everybody needs; "failure": no run starts.
        text: how it is.
        mend: what to do about it; "" where nothing is to be done.
    """

    name: str
    status: Status
    text: str
    mend: str = ""


Check = Callable[[], Iterator[Finding]]


def examine(name: str, check: Check) -> Iterator[Finding]:
    """The findings of a check; one that breaks is a finding itself, and no other check suffers."""
    try:
        yield from check()
    except Exception as error:  # libraries that are half installed raise whatever they like
        reason = " ".join(str(error).split())[:300] or "no reason given"
        yield Finding(name, "failure", f"{type(error).__name__}: {reason}", "Mend what the message names.")
