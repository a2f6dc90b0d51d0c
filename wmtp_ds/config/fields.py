"""What the tables of the schema share: strictness, and the types that TOML has no word for."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints


class Table(BaseModel):
    """A TOML table. Frozen; unknown keys and silent conversions ("2" for 2, 1 for true) are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _as_path(value: Any) -> Any:
    """TOML writes a path as text; an empty one must not silently become the current directory."""
    if not isinstance(value, str):
        return value
    if not value.strip() or "\0" in value:
        raise ValueError("a path must not be empty" if not value.strip() else "a path holds no NUL character")
    return Path(value).expanduser() if value.startswith("~/") else Path(value)


# Attention implementations (config.json) that keep the solutions of a packed row apart: they take a mask.
PACKING_ATTENTION = ("sdpa", "eager")

PathText = Annotated[Path, BeforeValidator(_as_path)]
Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
Share = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16", "float16"]
