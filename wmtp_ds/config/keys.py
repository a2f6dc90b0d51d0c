"""Dotted keys, and what the schema says about each: its type, its table, the stages that it belongs to."""

import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from wmtp_ds.config.schema import RunConfig
from wmtp_ds.config.training import TrainingConfig, stage_names, training_class

KeyPath = tuple[str | int, ...]

# Of a key, and levels of tables and lists: the schema has six.
MOST_PARTS = 32

_KEY = re.compile(r"[A-Za-z0-9_-]+(?:\[[0-9]{1,9}\])*(?:\.[A-Za-z0-9_-]+(?:\[[0-9]{1,9}\])*)*")
_PART = re.compile(r"[A-Za-z0-9_-]+|\[[0-9]+\]")

# Keys outside `training` that only some stages may set -> the class attribute of the stages that may.
STAGE_KEYS: dict[KeyPath, str] = {
    ("experiment", "critic_checkpoint"): "needs_critic",
    ("models", "reference"): "needs_reference",
    ("models", "reward"): "uses_rewards",
    ("value_head",): "has_value_head",
    ("early_stopping", "variance_min"): "bounds_value_variance",
    ("early_stopping", "variance_max"): "bounds_value_variance",
    ("deepspeed", "reference_config"): "reads_frozen_models",
}


def parse_key(text: str) -> KeyPath | None:
    """``a.b[0].c`` as its parts, or None where it is no key. ``a.b.0.c`` means the same where b is a list."""
    if not _KEY.fullmatch(text) or len(parts := _PART.findall(text)) > MOST_PARTS:
        return None
    path: KeyPath = ()
    for part in parts:
        path = (*path, int(part[1:-1]) if part.startswith("[") else as_part(part, path))
    return path


def as_part(text: str, parent: KeyPath) -> str | int:
    """A part without brackets: a number where the schema has a list, the text itself elsewhere."""
    declared = declared_at(parent)
    is_item = declared is not None and get_origin(declared.type) is tuple
    return int(text) if is_item and re.fullmatch(r"[0-9]{1,9}", text) else text


def format_key(path: Iterable[str | int]) -> str:
    """The parts as ``a.b[0].c``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


@dataclass(frozen=True)
class Declared:
    """What the schema declares for a key: its type, without ``None``, and the limits on it."""

    type: Any
    limits: tuple[Any, ...] = ()
    field: FieldInfo | None = None  # None for an item of a list or of a free table

    @property
    def is_table(self) -> bool:
        """A table of the schema, whose keys are known and merge one by one."""
        return isinstance(self.type, type) and issubclass(self.type, BaseModel)

    @property
    def is_mapping(self) -> bool:
        """A table of either kind: of the schema, or one whose keys are free."""
        return self.is_table or get_origin(self.type) is dict

    @property
    def is_text(self) -> bool:
        """A value that needs no quotes in an environment variable or an override."""
        if get_origin(self.type) is Literal:
            return all(isinstance(choice, str) for choice in get_args(self.type))
        return self.type in (str, Path)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a literal, or ()."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()


def _declare(annotation: Any, limits: Iterable[Any] = (), field: FieldInfo | None = None) -> Declared:
    """Take ``Annotated`` and ``| None`` off a type."""
    found = list(limits)
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation, *more = get_args(annotation)
            for item in more:
                found += item.metadata if isinstance(item, FieldInfo) else [item]
        elif origin in (Union, types.UnionType):
            annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
        else:
            return Declared(annotation, tuple(found), field)


def fields_of(table: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a table of the schema; those of every stage for the ``training`` table."""
    if table is TrainingConfig:
        return {k: f for stage in stage_names() for k, f in training_class(stage).model_fields.items()}
    return dict(table.model_fields)


def declared_at(path: KeyPath) -> Declared | None:
    """What the schema declares at a key, or None where it knows no such key."""
    return _declared_at(path, tuple(map(training_class, stage_names())))


@cache
def _declared_at(path: KeyPath, _stages: tuple[type[TrainingConfig], ...]) -> Declared | None:
    if not path:
        return Declared(RunConfig)
    parent = _declared_at(path[:-1], _stages)
    part = path[-1]
    if parent is None:
        return None
    if parent.is_table:
        field = fields_of(parent.type).get(str(part))
        return _declare(field.annotation, field.metadata, field) if field else None
    items = get_args(parent.type)
    if get_origin(parent.type) is dict:
        return _declare(items[1])
    if get_origin(parent.type) is tuple and isinstance(part, int):
        item = items[0] if items[-1] is Ellipsis else items[part] if part < len(items) else None
        return _declare(item) if item is not None else None
    return None


def all_keys(table: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, of whatever stage."""
    for name, field in fields_of(table).items():
        declared = _declare(field.annotation)
        if declared.is_table:
            yield from all_keys(declared.type, f"{prefix}{name}.")
        else:
            yield prefix + name


def stages_with(path: KeyPath) -> tuple[str, ...]:
    """The stages that may set a key."""
    names = stage_names()
    for prefix, attribute in STAGE_KEYS.items():
        if path[: len(prefix)] == prefix:
            names = tuple(name for name in names if getattr(training_class(name), attribute))
    if path[0] == "training" and len(path) > 1:
        names = tuple(name for name in names if path[1] in training_class(name).model_fields)
    return names
