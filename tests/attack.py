"""A pickle of somebody who means ill."""

import os
from pathlib import Path
from typing import Any


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, never: Path):
        self.never = str(never)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.never,)
