"""The schema's verdict on the merged layers: pydantic's errors, said in the words of whoever wrote the config."""

import shlex
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import annotated_types as limits
from pydantic import ValidationError
from pydantic.types import StringConstraints
from pydantic_core import ErrorDetails

from wmtp_ds.config.errors import Origin, Problem, did_you_mean
from wmtp_ds.config.keys import (
    STAGE_KEYS,
    Declared,
    KeyPath,
    all_keys,
    declared_at,
    fields_of,
    format_key,
    stages_with,
)
from wmtp_ds.config.layers import Layers, look_up
from wmtp_ds.config.schema import RunConfig, run_config_class
from wmtp_ds.config.training import stage_names, training_class
from wmtp_ds.masking import mask_urls

_MISSING = object()


class SchemaCheck:
    """Checks a merged tree.

    Attributes:
        config: the frozen config; None if there are problems.
        problems: what is wrong.
        wrong: the keys that are wrong; nothing further can be said about their values.
    """

    def __init__(self, layers: Layers, stage: str | None, file: str, wrong: Iterable[KeyPath] = ()):
        self.layers = layers
        self.stage = stage
        self.file = file
        self.config: RunConfig | None = None
        self.problems: list[Problem] = []
        self.wrong: set[KeyPath] = set(wrong)
        self._check_stage()
        self._check_stage_keys()
        self._check_numbers(layers.tree, ())
        self._check_types()

    def _report(self, path: KeyPath, message: str, mend: str, origin: str | None = None) -> None:
        self.wrong.add(path)
        self.problems.append(Problem(format_key(path), origin or self._origin(path), message, mend))

    def _origin(self, path: KeyPath) -> str:
        return str(self.layers.origin(path))

    def _check_stage(self) -> None:
        path = ("experiment", "stage")
        _, stage = look_up(self.layers.tree, path)
        if isinstance(stage, str) and stage not in stage_names() and path not in self.wrong:
            message = f"there is no stage {show_value(stage)}"
            self._report(path, message, did_you_mean(stage, stage_names()) or f"use {_list(stage_names())}")

    def _check_stage_keys(self) -> None:
        """Keys outside ``training`` that another stage owns (the schema cannot tell them from its own)."""
        if self.stage is None:
            return
        for path, attribute in STAGE_KEYS.items():
            found, _ = look_up(self.layers.tree, path)
            if found and not getattr(training_class(self.stage), attribute):
                for origin in self._setters(path):
                    self._report(path, *self._other_stage(path), str(origin))

    def _setters(self, path: KeyPath) -> list[Origin]:
        """Who set a key or anything in it: a file's first line of it, every variable, every override."""
        origins = self._origins_below.get(path, [])
        filed = [origin for origin in origins if origin.layer in ("file", "extends")]
        return [*filed[:1], *dict.fromkeys(o for o in origins if o.layer in ("environment", "override"))]

    @cached_property
    def _origins_below(self) -> dict[KeyPath, list[Origin]]:
        """For each key the origins of all that it holds, its own first."""
        found: dict[KeyPath, list[Origin]] = {}
        for key, origin in self.layers.origins.items():
            for length in range(1, len(key) + 1):
                found.setdefault(key[:length], []).append(origin)
        return found

    @cached_property
    def _keys(self) -> dict[str, str]:
        """For each name the first key of the schema that ends in it, or the table within a table."""
        keys = list(reversed(list(all_keys())))
        tables = [key.rpartition(".")[0] for key in keys]
        inner = {table.rpartition(".")[2]: table for table in tables if "." in table}
        return inner | {key.rpartition(".")[2]: key for key in keys}

    def _other_stage(self, path: KeyPath) -> tuple[str, str]:
        owners = stages_with(path)
        plural = "s" if len(owners) > 1 else ""
        message = f"belongs to stage{plural} {_list(owners, 'and')}, not to {self.stage}"
        return message, f"remove it, or set experiment.stage to {_list(owners)}"

    def _check_numbers(self, value: Any, path: KeyPath) -> None:
        """Whole numbers are those of TOML: Python takes larger ones, and then cannot even write them."""
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            self._check_numbers(item, (*path, key))
        if type(value) is int and not -(2**63) <= value < 2**63:
            self._report(path, "is beyond 64 bits, in which a whole number must lie", self._example(path))

    def _check_types(self) -> None:
        tree = {key: _frozen(value) for key, value in self.layers.tree.items()}
        for key in [key for key in tree if key not in RunConfig.model_fields]:
            # Taken out here: a keyword like `_env_file` would steer pydantic-settings.
            self._unknown((key,))
            del tree[key]
        try:
            config = run_config_class(self.stage)(**tree)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                self._translate(details)
        else:
            self.config = None if self.wrong else config

    def _translate(self, error: ErrorDetails) -> None:
        path, kind = error["loc"], error["type"]
        if kind == "default_factory_not_called" or any(
            path[:length] in self.wrong for length in range(1, len(path) + 1)
        ):
            return
        if self.stage is None and path[0] == "training" and len(path) > 1:
            # Without a stage nobody can say which fields are missing or foreign: only what no stage has is wrong.
            if kind == "missing" and path[1:2] == path[1:]:
                return
            if kind == "extra_forbidden" and declared_at(path):
                return
        if kind == "missing" and isinstance(path[-1], int):
            self._wrong_value(path[:-1], look_up(self.layers.tree, path[:-1])[1])
        elif kind == "missing":
            self._missing(path)
        elif kind == "extra_forbidden":
            self._unknown(path)
        elif kind == "value_error":
            self._report(path, str(error["ctx"]["error"]), self._example(path))
        else:
            self._wrong_value(path, error["input"])

    def _missing(self, path: KeyPath) -> None:
        declared = declared_at(path)
        holder = path[:-1]
        # A key that is missing from an item of a list has the item's line; from a table, the file.
        origin = self._origin(holder) if any(isinstance(part, int) for part in holder) else self.file
        what = f": {declared.field.description}" if declared and declared.field else ""
        if declared and declared.is_table:
            self._report(path, f"the table is required{what}", f"add [{format_key(path)}]", origin)
            return
        stage = f" by stage {self.stage}" if self.stage and len(stages_with(path)) < len(stage_names()) else ""
        place = f" under [{format_key(holder)}]" if origin == self.file else ""
        example = _example_value(declared) if declared else None
        shown = "..." if example is None else show_value(example)
        self._report(path, f"is required{stage}{what}", f"write {path[-1]} = {shown}{place}", origin)

    def _unknown(self, path: KeyPath) -> None:
        owners = stages_with(path)
        if declared_at(path) and owners and self.stage:
            self._report(path, *self._other_stage(path))
            return
        for origin in self._setters(path):
            self._report(path, *self._unknown_key(path, origin), str(origin))

    def _unknown_key(self, path: KeyPath, origin: Origin) -> tuple[str, str]:
        """What is said of a key that the schema does not know, and what was probably meant."""
        holder = declared_at(path[:-1])
        names = list(fields_of(holder.type)) if holder and holder.is_table else []
        if len(path) == 1 and origin.layer in ("file", "extends"):
            names.append("extends")
        table = format_key(path[:-1])
        hint = self._suggest(path, names)
        if origin.layer == "environment":
            name = origin.where.split()[-1]
            hint = f"did you mean {_variable(hint)}?" if hint else "unset it"
            return f"{name} names no key of the configuration", hint
        message = "there is no such " + ("table" if len(path) == 1 else "key")
        inside = f"[{table}] has" if table else "there are the tables"
        return message, f'did you mean "{hint}"?' if hint else f"remove it; {inside} {', '.join(names)}"

    def _suggest(self, path: KeyPath, names: list[str]) -> str:
        """The key that was probably meant, dotted in full, or ""."""
        word = str(path[-1])
        if moved := self._keys.get(word):
            return moved  # the right name in the wrong table
        close = did_you_mean(word, names)
        return format_key((*path[:-1], close.split('"')[1])) if close else ""

    def _wrong_value(self, path: KeyPath, value: Any) -> None:
        declared = declared_at(path)
        expected = describe_type(declared) if declared else "another value"
        mend = ""
        if declared and declared.choices and isinstance(value, str):
            mend = did_you_mean(value.lower(), declared.choices)
        elif isinstance(value, str) and declared and declared.type in (int, float, bool) and _is_file(self, path):
            mend = "write it without quotes"
        self._report(path, f"must be {expected}, not {show_value(value)}", mend or self._example(path))

    def _example(self, path: KeyPath) -> str:
        """How a right value is written in the layer that holds the wrong one."""
        declared = declared_at(path)
        value = _example_value(declared) if declared else None
        origin = self.layers.origin(path)
        shown = "..." if value is None else show_value(value)
        bare = str(value) if isinstance(value, str) else shown
        if origin.layer == "environment":
            return f"set {shlex.quote(f'{origin.where.split()[-1]}={bare}')}, or unset it"
        if origin.layer == "override":
            return f"write --override {shlex.quote(f'{format_key(path)}={bare}')}"
        return f"write {path[-1]} = {shown}" if not isinstance(path[-1], int) else f"write {shown}"


def _is_file(check: SchemaCheck, path: KeyPath) -> bool:
    return check.layers.origin(path).layer in ("file", "extends")


def _variable(key: str) -> str:
    prefix, delimiter = (str(RunConfig.model_config[name]) for name in ("env_prefix", "env_nested_delimiter"))
    return prefix + key.replace(".", delimiter).upper()


def _frozen(value: Any) -> Any:
    """Lists become tuples: the config is frozen throughout."""
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    return {key: _frozen(item) for key, item in value.items()} if isinstance(value, dict) else value


def _list(words: Iterable[str], link: str = "or") -> str:
    *first, last = words
    return f"{', '.join(first)} {link} {last}" if first else last


def show_value(value: Any) -> str:
    """A value as TOML writes it, short, without passwords."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = '"' + mask_urls(value).replace("\n", "\\n") + '"'
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(map(show_value, value))}]"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key} = {show_value(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, int) and value.bit_length() > 64:
        text = f"a number of {value.bit_length()} bits"
    else:
        text = "null" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def describe_type(declared: Declared) -> str:
    """What the schema wants of a value: ``a number above 0 and at most 1``."""
    kind = declared.type
    if declared.choices:
        return _list(show_value(choice) for choice in declared.choices)
    if declared.is_table:
        return "a table"
    if declared.is_mapping:
        return "a table of names and values"
    if declared.is_text:
        return "a text" + _describe_pattern(declared)
    items = getattr(kind, "__args__", None)
    if items:
        count = "" if items[-1] is Ellipsis else f"{len(items)} "
        item = _PLURALS.get(_item_type(items[0]), "tables")
        return f"a list of {count}{item}"
    return _NAMES.get(kind, "another value") + _describe_limits(declared.limits)


def _item_type(annotation: Any) -> Any:
    return getattr(annotation, "__origin__", annotation)


def _describe_pattern(declared: Declared) -> str:
    if not any(isinstance(limit, StringConstraints) or hasattr(limit, "pattern") for limit in declared.limits):
        return ""
    return f" ({declared.field.description})" if declared.field else " that is not empty"


def _describe_limits(found: Iterable[Any]) -> str:
    words = []
    for limit in found:
        for kind, name, word in (
            (limits.Gt, "gt", "above"),
            (limits.Ge, "ge", "at least"),
            (limits.Lt, "lt", "below"),
            (limits.Le, "le", "at most"),
        ):
            if isinstance(limit, kind):
                words.append(f"{word} {getattr(limit, name):g}")
    # "a number above 0 and at most 1", but "a whole number of at least 1"
    link = " of " if words and words[0].startswith("at ") else " "
    return link + " and ".join(words) if words else ""


def _example_value(declared: Declared) -> Any:
    """A value that the schema would take: the default, or the field's example."""
    field = declared.field
    if field is None:
        return None
    if field.examples:
        return field.examples[0]
    default = field.get_default()
    return None if field.is_required() or default is None or declared.is_table else default
