"""Reads CodeContests' Parquet shards a few problems at a time, so that memory does not grow with their size."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp_ds.data.dataset_files import fingerprint_of
from wmtp_ds.errors import UserError
from wmtp_ds.files import open_file, sha256_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

# The published columns that are read, and what each must be (see ``_TYPES``).
COLUMNS = {
    "name": "text",
    "description": "text",
    "public_tests": "tests",
    "private_tests": "tests",
    "generated_tests": "tests",
    "source": "number",
    "difficulty": "number",
    "solutions": "solutions",
    "incorrect_solutions": "solutions",
    "cf_rating": "number",
    "time_limit": "time",
    "memory_limit_bytes": "number",
    "input_file": "text",
    "output_file": "text",
}
_TYPES = {
    "text": "a text",
    "number": "a whole number",
    "tests": "a struct of two lists of texts, input and output",
    "solutions": "a struct of two lists, language (numbers) and solution (texts)",
    "time": "a struct of two whole numbers, seconds and nanos",
}
# Problems decoded at once. One of them can have megabytes of solutions and tests.
_BATCH = 4
_BUFFER_BYTES = 1 << 20
# Problems of the published validation and test sets come first: a training problem of the same id is left out.
SPLITS = ("evaluation", "validation", "train")
_SPLIT_OF_NAME = {"train": "train", "valid": "validation", "validation": "validation", "test": "evaluation"}


@dataclass(frozen=True)
class Shard:
    """One Parquet file. ``split`` is "" where its name does not say; ``groups`` are the rows of each row group."""

    path: Path
    split: str
    groups: tuple[int, ...]

    @property
    def problems(self) -> int:
        """How many rows it has."""
        return sum(self.groups)


def find_shards(source: Path) -> list[Shard]:
    """The shards of a Parquet file, a folder of them, or a folder with ``data/``, in the order of reading.

    Raises:
        UserError: there are none, some names tell a split and some do not, or a file is no CodeContests.
    """
    if not source.exists():
        raise UserError(f"{source}: does not exist: give --input a Parquet file, or the folder of shards")
    paths = [source]
    if source.is_dir():
        paths = sorted(source.glob("*.parquet")) or sorted((source / "data").glob("*.parquet"))
        if not paths:
            raise UserError(
                f"{source}: has no *.parquet, nor has {source / 'data'}: give --input CodeContests' Parquet file, or "
                "the folder of its shards (train-00000-of-00039.parquet and so on)"
            )
    splits = {path: _split_of(path.name) for path in paths}
    unknown = [path for path, split in splits.items() if not split]
    if unknown and len(unknown) < len(paths):
        raise UserError(
            f"{unknown[0]}: which split is that? Its name begins with none of train, valid, test, as others in the "
            "folder do: rename it, or move it elsewhere"
        )
    shards = [Shard(path, splits[path], _groups(path)) for path in paths]
    return sorted(shards, key=lambda shard: SPLITS.index(shard.split or "train"))


def _split_of(name: str) -> str:
    found = re.match(r"(train|validation|valid|test)(?![a-z])", name.lower())
    return _SPLIT_OF_NAME[found[1]] if found else ""


def fingerprint(shards: Sequence[Shard]) -> str:
    """A hash of the shards' contents and splits."""
    return fingerprint_of([[shard.split, sha256_of(shard.path)] for shard in shards])


def _open(path: Path) -> "pq.ParquetFile":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        open_file(path).close()  # pyarrow would wait for a pipe
        # A buffer: a column is read piece by piece, not a row group's whole chunk of it at once.
        return pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: is no readable Parquet file: {_first_line(error)}: download it again") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _groups(path: Path) -> tuple[int, ...]:
    with _open(path) as file:
        _check_columns(file.schema_arrow, path)
        return tuple(file.metadata.row_group(number).num_rows for number in range(file.num_row_groups))


def _check_columns(schema: "pa.Schema", path: Path) -> None:
    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise UserError(
            f"{path}: is not CodeContests as published: columns missing: {', '.join(missing)}; found: "
            f"{', '.join(schema.names) or 'none'}"
        )
    for name, kind in COLUMNS.items():
        if not _is(schema.field(name).type, kind):
            raise UserError(
                f"{path}: is not CodeContests as published: column {name} must be {_TYPES[kind]}, not "
                f"{schema.field(name).type}"
            )


def _is(found: "pa.DataType", kind: str) -> bool:
    import pyarrow as pa

    types = pa.types
    if kind == "text":
        return types.is_string(found) or types.is_large_string(found)
    if kind == "number":
        return types.is_integer(found)
    if not types.is_struct(found):
        return False
    inner = {found.field(place).name: found.field(place).type for place in range(found.num_fields)}
    if kind == "time":
        return all(name in inner and _is(inner[name], "number") for name in ("seconds", "nanos"))
    wanted = {"input": "text", "output": "text"} if kind == "tests" else {"language": "number", "solution": "text"}
    return all(
        name in inner
        and (types.is_list(inner[name]) or types.is_large_list(inner[name]))
        and _is(inner[name].value_type, of)
        for name, of in wanted.items()
    )


def read_problems(shard: Shard, skip: int = 0) -> Iterator["pa.StructScalar"]:
    """Yield the problems of a shard from number ``skip`` (0-based) on, a few decoded at a time.

    Raises:
        UserError: the file is damaged; with the number of the problem.
    """
    import pyarrow as pa

    at = 0
    with _open(shard.path) as file:
        for group, rows in enumerate(shard.groups):
            if at + rows <= skip:
                at += rows
                continue
            try:
                for batch in file.iter_batches(_BATCH, row_groups=[group], columns=list(COLUMNS), use_threads=False):
                    table = batch.to_struct_array()
                    for place in range(len(table)):
                        if at >= skip:
                            yield table[place]
                        at += 1
            except (pa.ArrowException, OSError) as error:
                raise UserError(
                    f"{shard.path}: is damaged at problem {at + 1} of {shard.problems}: {_first_line(error)}: "
                    "download it again"
                ) from None
