"""What every check reads and writes: the values that the schema found right, and the list of problems."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from wmtp_ds.config.errors import Problem
from wmtp_ds.config.keys import KeyPath, format_key, parse_key
from wmtp_ds.config.layers import Layers, look_up
from wmtp_ds.config.training import TrainingConfig


@dataclass
class Context:
    """A configuration under examination.

    The checks go by single values, not by the frozen config, so that one wrong value hides no other problem.

    Attributes:
        layers: the merged tree, interpolated, with origins.
        wrong: keys whose value the schema refused.
        training: the stage's class; None where the stage itself is wrong.
        file: the config file as named by the user.
        environ: the environment.
        problems: what has been found so far.
    """

    layers: Layers
    wrong: set[KeyPath]
    training: type[TrainingConfig] | None
    file: str
    environ: Mapping[str, str]
    problems: list[Problem] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """The value of a dotted key, or None where it is not set or was refused, in whole or in part."""
        path = _parse(key)
        if any(path[: len(known)] == known or known[: len(path)] == path for known in self.wrong):
            return None
        return look_up(self.layers.tree, path)[1]

    def path(self, key: str) -> str | None:
        """The value of a key that is a path."""
        value = self.get(key)
        return os.path.expanduser(value) if isinstance(value, str) else None

    def is_set(self, key: str) -> bool:
        """Whether some layer other than the defaults holds the key."""
        path = _parse(key)
        return look_up(self.layers.tree, path)[0] and self.layers.origin(path).layer != "default"

    def origin(self, key: str) -> str:
        """Where the key was set; for one that is not, the file."""
        path = _parse(key)
        return str(self.layers.origin(path)) if look_up(self.layers.tree, path)[0] else self.file

    def report(self, key: str, message: str, mend: str, *, severity: Literal["error", "warning"] = "error") -> None:
        """Add a problem of a key."""
        self.problems.append(Problem(format_key(_parse(key)), self.origin(key), message, mend, severity))

    def warn(self, key: str, message: str, mend: str) -> None:
        """Add a warning about a key."""
        self.report(key, message, mend, severity="warning")


Check = Callable[[Context], None]


def why_no_file(path: str) -> str:
    """What keeps a path from being read as a file, "" for a regular file: a pipe or a device would never end."""
    if os.path.isfile(path):
        return ""
    if os.path.isdir(path):
        return "is a folder, not a file"
    return "is not a regular file" if os.path.exists(path) else "does not exist"


def _parse(key: str) -> KeyPath:
    path = parse_key(key)
    assert path, f"{key} is no key"
    return path
