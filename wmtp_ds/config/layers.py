"""Layers: defaults, the file that ``extends`` names, the file, the environment, overrides. Later wins.

Each value keeps the origin of the layer that set it. Tables of the schema merge key by key; lists, and tables whose
keys are free (tags, difficulty_bins), are replaced whole by a file, while a variable or an override may set one item.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from wmtp_ds.config.errors import Origin
from wmtp_ds.config.keys import STAGE_KEYS, KeyPath, declared_at, format_key
from wmtp_ds.config.schema import run_config_class
from wmtp_ds.config.training import TrainingConfig

DEFAULT = Origin("default", "default")


class UnassignableError(Exception):
    """A key that names a list's item where there is none."""


class Layers:
    """The merged values, as a tree of dicts and lists, and the origin of each."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.origins: dict[KeyPath, Origin] = {}

    def merge(self, values: dict[str, Any], origin: Callable[[KeyPath], Origin]) -> None:
        """Put a table of values on top; ``origin`` says where each key of it was set."""
        self._merge(self.tree, values, (), origin)

    def _merge(
        self, under: dict[str, Any], values: dict[str, Any], path: KeyPath, origin: Callable[[KeyPath], Origin]
    ) -> None:
        for key, value in values.items():
            here = (*path, key)
            declared = declared_at(here)
            merges = isinstance(value, dict) and (declared is None or declared.is_table)
            if merges and isinstance(under.get(key), dict):
                self._merge(under[key], value, here, origin)
            else:
                if key in under:
                    self._forget(here)
                under[key] = copy.deepcopy(value)
                self._note(here, value, origin)

    def assign(self, path: KeyPath, value: Any, origin: Origin) -> None:
        """Put one value on top: that of a variable or an override.

        Raises:
            UnassignableError: the path leads to an item of a list that has none there.
        """
        node: Any = self.tree
        for depth, part in enumerate(path[:-1]):
            _check_index(node, part, path[:depth])
            found, child = look_up(node, (part,))
            declared = declared_at(path[: depth + 1])
            if found and not isinstance(child, dict) and declared and declared.is_table:
                return  # the schema refuses what stands there; a table in its place would hide that
            if not found or not isinstance(child, dict | list):
                child = [] if isinstance(path[depth + 1], int) else {}
                self._put(node, part, child, path[:depth], origin)
                self._forget(path[: depth + 1])
                self.origins[path[: depth + 1]] = origin
            node = child
        _check_index(node, path[-1], path[:-1])
        declared = declared_at(path)
        found, child = look_up(node, path[-1:])
        if isinstance(value, dict) and declared and declared.is_table and isinstance(child, dict):
            self._merge(child, value, path, lambda _: origin)
        else:
            self._put(node, path[-1], copy.deepcopy(value), path[:-1], origin)
            self._forget(path)
            self._note(path, value, lambda _: origin)

    def _put(self, node: Any, part: str | int, value: Any, path: KeyPath, origin: Origin) -> None:
        if isinstance(node, list) and part == len(node):
            node.append(value)
            self.origins[path] = origin  # whoever adds an item answers for the list's length
        else:
            node[part] = value

    def origin(self, path: KeyPath) -> Origin:
        """The origin of a value: its own, or that of the value which holds it."""
        for length in range(len(path), 0, -1):
            if found := self.origins.get(path[:length]):
                return found
        return DEFAULT

    def _forget(self, path: KeyPath) -> None:
        for old in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[old]

    def _note(self, path: KeyPath, value: Any, origin: Callable[[KeyPath], Origin]) -> None:
        self.origins[path] = origin(path)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            self._note((*path, key), item, origin)


def _check_index(node: Any, part: str | int, path: KeyPath) -> None:
    if isinstance(node, list):
        if not isinstance(part, int):
            raise UnassignableError(f"{format_key(path)} is a list: name one of its items, as in {format_key(path)}[0]")
        if part > len(node):
            raise UnassignableError(
                f"{format_key(path)} has {len(node)} item{'s' if len(node) != 1 else ''}: "
                f"[0] to [{len(node) - 1}] change one, [{len(node)}] adds one"
                if node
                else f"{format_key(path)} is empty: [0] adds its first item"
            )
    elif isinstance(part, int):
        raise UnassignableError(f"{format_key(path)} is no list, so it has no item [{part}]")


def look_up(tree: Any, path: KeyPath) -> tuple[bool, Any]:
    """Whether the tree has a value at the path, and the value."""
    for part in path:
        is_item = isinstance(tree, list | tuple) and isinstance(part, int) and part < len(tree)
        if not is_item and not (isinstance(tree, dict) and part in tree):
            return False, None
        tree = tree[part]
    return True, tree


def schema_defaults(stage: str | None) -> dict[str, Any]:
    """The lowest layer: every default of the schema that the stage has, its own defaults included."""
    config_class = run_config_class(stage)
    training = config_class.model_fields["training"].annotation
    assert isinstance(training, type)
    assert issubclass(training, TrainingConfig)
    tree = _defaults(config_class, (), training if stage else None)
    tree["data_sampling"]["correct_ratio"] = training.default_correct_ratio
    tree["early_stopping"].update(training.default_early_stopping)
    return tree


def _defaults(table: type[BaseModel], path: KeyPath, training: type[TrainingConfig] | None) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, field in table.model_fields.items():
        here = (*path, name)
        if training and here in STAGE_KEYS and not getattr(training, STAGE_KEYS[here]):
            continue
        declared = declared_at(here)
        assert declared
        if declared.is_table:
            is_optional = here in STAGE_KEYS and training is None
            inner = training if here == ("training",) and training else declared.type
            if not is_optional:
                tree[name] = _defaults(inner, here, training)
        elif not field.is_required() and field.default_factory is None and field.default is not None:
            tree[name] = _plain(field.default)
    return tree


def _plain(value: Any) -> Any:
    """A default as TOML would give it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
