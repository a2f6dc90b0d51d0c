"""Libraries that another one imports if they are there, and that nobody needs here: seconds of every start."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def as_if_missing(library: str) -> Iterator[None]:
    """Inside, a library that has not been imported yet cannot be."""
    if library in sys.modules:
        yield
        return
    sys.modules[library] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[library]
