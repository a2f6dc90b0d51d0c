"""``${experiment.name}``: values that are made of other values. ``$${`` stands for a plain ``${``."""

import copy
import re
from typing import Any

from wmtp_ds.config.errors import did_you_mean
from wmtp_ds.config.keys import KeyPath, all_keys, format_key, parse_key
from wmtp_ds.config.layers import Layers, look_up

_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<key>[^{}]*)\}|(?P<open>\$\{)")


# Values that refer to one another in a row, and what all of one config may come to.
_LONGEST_CHAIN, _MOST_MADE = 32, 2**18


class _UnresolvedError(Exception):
    """A value that cannot be made. Its message is said once: of the value that holds the wrong reference."""

    def __init__(self, path: KeyPath, message: str, mend: str):
        super().__init__(message)
        self.path, self.message, self.mend = path, message, mend


def interpolate(layers: Layers) -> dict[KeyPath, tuple[str, str]]:
    """Replace every reference in the layers' tree, in place.

    Returns:
        for each value that could not be made, what is wrong and how to mend it; both are "" where the cause is
        another key's problem (a default that refers to a key which is missing, a reference to a wrong reference).
    """
    original = layers.tree
    resolver = _Resolver(layers)
    failed: dict[KeyPath, tuple[str, str]] = {}

    def walk(value: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return {key: walk(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, (*path, index)) for index, item in enumerate(value)]
        try:
            return resolver.resolve(value, path)
        except _UnresolvedError as error:
            own = error.path == path and layers.origin(path).layer != "default"
            failed[path] = (error.message, error.mend) if own else ("", "")
            return value

    layers.tree = walk(original, ())
    return failed


class _Resolver:
    def __init__(self, layers: Layers):
        self.tree = layers.tree
        self.chain: list[KeyPath] = []  # the values that are being made, each for the one before it
        self.spent = 0
        self.told = False

    def resolve(self, value: Any, path: KeyPath) -> Any:
        """The value with its references replaced.

        Raises:
            _UnresolvedError: a reference is malformed, leads nowhere, or leads back here.
        """
        if isinstance(value, list):
            return [self.resolve(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            if self.chain:
                self._spend(0)
            return copy.deepcopy(value)
        if len(self.chain) == _LONGEST_CHAIN:
            message = f"is one of more than {_LONGEST_CHAIN} values that are made one of the other"
            raise self._too_much(message, "give one of them a value of its own")
        if path in self.chain:
            circle = [*self.chain[self.chain.index(path) :], path]
            raise _UnresolvedError(
                path,
                f"refers to itself: {' -> '.join(map(format_key, circle))}",
                "give one of these keys a value of its own",
            )
        self.chain.append(path)
        try:
            whole = _REFERENCE.fullmatch(value)
            if whole and whole["key"] is not None:
                return self._target(whole["key"], path)  # keeps its type: a number stays a number
            text = _REFERENCE.sub(lambda match: self._text(match, path), value)
            self._spend(len(text))
            return text
        finally:
            self.chain.pop()

    def _spend(self, amount: int) -> None:
        """Count a value and its characters: twenty values that hold the next one twice are a million of the last."""
        self.spent += 64 + amount
        if self.spent > _MOST_MADE:
            raise self._too_much("is part of values that refer to each other without end", "write what they stand for")

    def _too_much(self, message: str, mend: str) -> _UnresolvedError:
        """Of the value that was asked for, once: the others are of the same knot."""
        first, self.told = not self.told, True
        return _UnresolvedError(self.chain[0] if first else (), message, mend)

    def _text(self, match: re.Match[str], path: KeyPath) -> str:
        if match["open"]:
            raise _UnresolvedError(
                path, "holds a '${' without its '}'", "close the reference; a plain '${' is written '$${'"
            )
        if match["key"] is None:
            return "${"
        target = self._target(match["key"], path)
        if isinstance(target, list):
            raise _UnresolvedError(
                path,
                f"puts the list {match['key']} into a text",
                f'refer to one item, "${{{match["key"]}[0]}}", or let the reference be the whole value',
            )
        if isinstance(target, int) and target.bit_length() > 64:
            raise _UnresolvedError(path, f"refers to {match['key']}, which is beyond 64 bits", "refer to another key")
        return str(target).lower() if isinstance(target, bool) else str(target)

    def _target(self, key: str, path: KeyPath) -> Any:
        target = parse_key(key.strip())
        if target is None:
            raise _UnresolvedError(
                path, f"holds the malformed reference ${{{key}}}", "a reference is a key: ${experiment.name}"
            )
        found, value = look_up(self.tree, target)
        if not found:
            raise _UnresolvedError(
                path,
                f"refers to {format_key(target)}, which is not set",
                did_you_mean(format_key(target), all_keys()) or f"set {format_key(target)}, or remove the reference",
            )
        if isinstance(value, dict):
            raise _UnresolvedError(
                path, f"refers to {format_key(target)}, which is a table", "refer to one of the table's keys"
            )
        return self.resolve(value, target)
