"""Values and messages as evidence shows them: short, on one line, the same in every process."""

import re
from typing import Any

_EVIDENCE_CHARACTERS = 300


def show(value: Any, depth: int = 0) -> str:
    """``repr`` that is the same in every process: sets come sorted."""
    if depth > 20:
        return "..."
    if isinstance(value, (set, frozenset)) and value:
        return "{" + ", ".join(sorted(show(item, depth + 1) for item in value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(show(item, depth + 1) for item in value) + "]"
    if isinstance(value, tuple):
        items = [show(item, depth + 1) for item in value]
        return f"({items[0]},)" if len(items) == 1 else "(" + ", ".join(items) + ")"
    if isinstance(value, dict):
        pairs = (f"{show(key, depth + 1)}: {show(item, depth + 1)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, int) and value.bit_length() > 4096:  # repr() refuses these
        return hex(value)[:40] + "..."
    return repr(value)


def tidy(text: str) -> str:
    """Evidence without what changes from run to run (addresses) and without line ends, shortened."""
    text = " ".join(re.sub(r"0x[0-9a-fA-F]{6,}", "0x...", text).split())
    return text if len(text) <= _EVIDENCE_CHARACTERS else text[: _EVIDENCE_CHARACTERS - 3] + "..."
