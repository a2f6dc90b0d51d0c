"""A configuration that has been put together: its values, their origins, and its forms for other programs."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from wmtp_ds.config.deepspeed_file import (
    CONFIG,
    REFERENCE_CONFIG,
    merge_reference,
    merge_training,
    read_deepspeed,
)
from wmtp_ds.config.errors import ConfigError, Origin, Problem
from wmtp_ds.config.keys import STAGE_KEYS, KeyPath, format_key
from wmtp_ds.config.layers import Layers
from wmtp_ds.config.schema import RunConfig
from wmtp_ds.config.toml_writer import format_name, format_value
from wmtp_ds.masking import mask_urls


@dataclass(frozen=True)
class Resolved:
    """What `load_config` returns.

    Attributes:
        path: the config file.
        config: the values, frozen and typed; passwords in it are the real ones.
        origins: of each value (by dotted key) the layer and the place that set it.
        warnings: what is allowed but worth knowing.
        given: the values as they were given, where `cut` has replaced some; `flat`, `toml` and `hash` tell these.
    """

    path: Path
    config: RunConfig
    origins: dict[str, Origin]
    warnings: list[Problem]
    given: RunConfig | None = None

    def cut(self, batch_size: int, accumulation: int) -> "Resolved":
        """The same run with its global batch cut otherwise, for another number of ranks."""
        sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        training = self.config.training.model_copy(update=sizes)
        config = self.config.model_copy(update={"training": training})
        return replace(self, config=config, given=self.given or self.config)

    def flat(self) -> dict[str, object]:
        """Every value that the stage has, by dotted key, without unset ones; credentials in URLs are masked.

        Items of a list of tables have their index as a part of the key (``curriculum_schedule.0.epoch_range``),
        so that every key is a name that MLflow takes. Values are texts, numbers, booleans, and lists of these.
        """
        return {".".join(map(str, path)): value for path, value in leaves(plain_values(self.given or self.config), ())}

    def toml(self) -> str:
        """The resolved config as TOML, without references; it loads to the same values. Credentials are masked."""
        return "\n\n".join(_tables(plain_values(self.given or self.config), "")) + "\n"

    def hash(self) -> str:
        """The first 16 hex digits of a SHA-256 over `flat`: equal for equal values, whatever layers they came from."""
        text = json.dumps(self.flat(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def deepspeed(self, world_size: int) -> dict[str, Any]:
        """DeepSpeed's config for the trained model on ``world_size`` ranks.

        Raises:
            ConfigError: the JSON file cannot be read.
        """
        return merge_training(self.config, self._read(CONFIG, self.config.deepspeed.config), world_size)

    def deepspeed_reference(self) -> dict[str, Any]:
        """DeepSpeed's config for the frozen reference model.

        Raises:
            ConfigError: the JSON file cannot be read.
            ValueError: the stage has no reference model.
        """
        if self.config.models.reference is None:
            raise ValueError(f"stage {self.config.experiment.stage} has no reference model")
        values = self._read(REFERENCE_CONFIG, self.config.deepspeed.reference_config)
        return merge_reference(self.config, self.config.models.reference, values)

    def deepspeed_reward(self) -> dict[str, Any]:
        """DeepSpeed's config for the frozen reward model, from the reference model's file.

        Raises:
            ConfigError: the JSON file cannot be read.
        """
        values = self._read(REFERENCE_CONFIG, self.config.deepspeed.reference_config)
        return merge_reference(self.config, self.config.models.reward, values)

    def _read(self, key: str, path: Path) -> dict[str, Any]:
        try:
            return read_deepspeed(str(path))[0]
        except (OSError, ValueError) as error:
            problem = Problem(key, str(self.origins[key]), f"{path} cannot be used: {error}", "correct the file")
            raise ConfigError(str(self.path), [problem]) from None


def plain_values(config: RunConfig) -> dict[str, Any]:
    """The config as dicts, lists and TOML's own types: what the stage has and what is set, credentials masked."""
    return _plain(config, (), config)


def _plain(value: Any, path: KeyPath, config: RunConfig) -> Any:
    if isinstance(value, BaseModel):
        found = {}
        for name in type(value).model_fields:
            here = (*path, name)
            item = getattr(value, name)
            is_foreign = here in STAGE_KEYS and not getattr(config.training, STAGE_KEYS[here])
            if item is not None and not is_foreign:
                found[name] = _plain(item, here, config)
        return found
    if isinstance(value, dict):
        return {key: _plain(item, (*path, key), config) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item, (*path, index), config) for index, item in enumerate(value)]
    return mask_urls(str(value)) if isinstance(value, str | Path) else value


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value in tables, with its path; items of a list of tables have their index in it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def _tables(values: dict[str, Any], name: str) -> Iterator[str]:
    """TOML's tables, each a block of text: keys first, then the tables within."""
    lines = [f"[{name}]"] if name else []
    inner: list[tuple[str, dict[str, Any]]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            inner.append((f"{name}.{format_name(key)}" if name else format_name(key), value))
        else:
            lines.append(f"{format_name(key)} = {format_value(value)}")
    if len(lines) > 1 or (lines and not inner):
        yield "\n".join(lines)
    for table, item in inner:
        yield from _tables(item, table)


def origins_of(config: RunConfig, layers: Layers) -> dict[str, Origin]:
    """The origin of every value of the config, by dotted key (``a.b[0].c``), inner values included."""
    return {format_key(path): layers.origin(path) for path in _paths(plain_values(config), ())}


def _paths(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        here = (*path, key)
        yield here
        yield from _paths(item, here)
