"""Imports JSONL of one's own: one solution a line, under whatever names."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from wmtp_ds.data.codecontests_problem import without_line_ends
from wmtp_ds.data.dataset_files import fingerprint_of
from wmtp_ds.data.import_folder import ImportFolder, finished_import
from wmtp_ds.data.import_split import DEFAULT_FRACTION, check_splits, held_out
from wmtp_ds.data.jsonl_mapping import FieldMapping, Mapped, UnfitError
from wmtp_ds.data.rows import decode_object, parse_row, read_lines
from wmtp_ds.errors import UserError
from wmtp_ds.files import open_file, sha256_of, version_of

_VERSION = 1  # raise it whenever the same source and options give other rows
_COMMIT_EVERY = 2000  # lines


@dataclass
class _Known:
    """What the lines read so far say: the line of each row, and each problem's contents and first line."""

    rows: dict[str, int] = field(default_factory=dict)
    problems: dict[str, tuple[str, int]] = field(default_factory=dict)

    def add(self, row: str, problem: str, contents: str, line: int) -> None:
        self.rows[row] = line
        self.problems.setdefault(problem, (contents, line))


def import_jsonl(
    source: Path,
    output: Path,
    mapping: FieldMapping | None = None,
    *,
    validation_fraction: float = DEFAULT_FRACTION,
    on_error: str = "stop",
    seed: int = 0,
    force: bool = False,
    on_start: Callable[[int], None] = lambda total: None,
    on_done: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Import a JSONL file into ``output``, or leave it if it is there already.

    Args:
        source: the file.
        output: a folder.
        mapping: where the parts of a row come from; default: keys of their own names.
        validation_fraction: share of the problems held out; 0 for none.
        on_error: "stop" at the first line of which no row can be made, or "skip" and count them.
        seed: decides the split.
        force: replace what another import left in ``output``.
        on_start: called with the number of bytes before they are read.
        on_done: called with how many have been read since the last call.

    Returns:
        The summary: counts of each split, what was skipped, and ``reused``.

    Raises:
        UserError: the input is not what it should be, or the folder cannot be written.
        RunError: writing failed.
    """
    mapping = mapping or FieldMapping()
    fingerprint, version = _fingerprint(source)
    made_from = {
        "command": "data import jsonl",
        "source": fingerprint,
        "map": dict(mapping.paths),
        "set": dict(mapping.constants),
        "id_from": list(mapping.id_from),
        "validation_fraction": validation_fraction,
        "on_error": on_error,
        "seed": seed,
        "version": _VERSION,
    }
    reused = finished_import(output, made_from, force=force)
    if reused is not None:
        return reused
    with ImportFolder(output, made_from) as folder, open_file(source) as handle:
        on_start(source.stat().st_size)
        known = _Known()
        for note in folder.notes():
            row, problem, contents, first = note.decode().split()
            known.add(row, problem, contents, int(first))
        state = folder.state or {"line": 0, "offset": 0, "found": []}
        number, found = state["line"], set(state["found"])
        on_done(state["offset"])
        for offset, number, line in _lines(handle, source, state["offset"], state["line"]):
            try:
                mapped = _map(line, source, number, mapping)
                if mapped is not None:
                    found |= mapped.found
                    _add(folder, mapped, number, known, validation_fraction, seed)
            except UnfitError as error:
                if on_error == "stop":
                    raise UserError(
                        f"{source}:{number}: {error}. Correct the line, or leave such lines out: --on-error skip"
                    ) from None
                folder.skip(error.reason, f"line {number}: {error}")
            on_done(len(line))
            if number % _COMMIT_EVERY == 0:
                folder.commit({"line": number, "offset": offset + len(line), "found": sorted(found)})
        if version_of(source) != version:
            raise UserError(f"{source}: the file is still being written: wait until that is done, then start again")
        check_splits(folder, source, validation_fraction)
        _check_paths(mapping, found, source)
        return folder.publish({"lines_read": number, "skipped": folder.skipped})


def _fingerprint(source: Path) -> tuple[str, tuple[int, int, int]]:
    if source.is_dir():
        raise UserError(f"{source}: is a folder: give --input a JSONL file")
    try:
        version = version_of(source)
        return sha256_of(source)[:16], version
    except FileNotFoundError:
        raise UserError(f"{source}: does not exist: give --input a JSONL file") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None


def _lines(handle: BinaryIO, source: Path, offset: int, line: int) -> Iterator[tuple[int, int, bytes]]:
    """Offset, number and bytes of each line behind the first ``line`` ones, which end at ``offset``."""
    handle.seek(offset)
    for start, number, text in read_lines(handle, source):
        yield offset + start, line + number, text


def _map(line: bytes, source: Path, number: int, mapping: FieldMapping) -> Mapped | None:
    """The row that a line gives; None for an empty line.

    Raises:
        UnfitError: it gives none.
    """
    if not line.strip():
        return None
    where = f"{source}:{number}"
    try:
        record = decode_object(line, where)
    except UserError as error:
        raise UnfitError("lines_malformed", str(error).removeprefix(f"{where}: ")) from None
    mapped = mapping.apply(record)
    try:
        parse_row(json.dumps(mapped.row).encode(), source, number)
    except UserError as error:
        raise UnfitError("rows_unfit", str(error).removeprefix(f"{where}: ")) from None
    return mapped


def _add(folder: ImportFolder, mapped: Mapped, number: int, known: _Known, share: float, seed: int) -> None:
    """Write a row, and its problem where it is the first of it.

    Raises:
        UnfitError: the row is there already, or its problem with other contents.
    """
    row = mapped.row
    key = fingerprint_of([row["problem_id"], without_line_ends(row["output"].rstrip())])
    if key in known.rows:
        raise UnfitError("rows_repeated", f"repeats the solution of line {known.rows[key]}")
    problem_key = fingerprint_of(row["problem_id"])
    contents = fingerprint_of([row["instruction"], row.get("input", ""), mapped.tests])
    before = known.problems.get(problem_key)
    if before is not None and before[0] != contents:
        raise UnfitError(
            "problems_in_conflict",
            f"problem {row['problem_id']} has another instruction, input or tests than on line {before[1]}",
        )
    evaluation = row["metadata"].get("evaluation_only") is True
    text = f"{row['instruction']}\n{row.get('input', '')}"
    split = "evaluation" if evaluation else "validation" if held_out(text, share, seed) else "train"
    if before is None:
        folder.add_problem(split, _problem(mapped, evaluation))
    folder.add_row(split, row)
    known.add(key, problem_key, contents, number)
    folder.note(f"{key} {problem_key} {contents} {number}".encode())


def _problem(mapped: Mapped, evaluation: bool) -> dict[str, Any] | None:
    if mapped.tests is None:
        return None
    row = mapped.row
    return {
        **{key: row[key] for key in ("problem_id", "instruction", "input", "difficulty") if key in row},
        "tests": mapped.tests,
        "language": row["metadata"].get("language", "python"),
        "evaluation_only": evaluation,
        "source": str(row["metadata"]["source"]),
    }


def _check_paths(mapping: FieldMapping, found: set[str], source: Path) -> None:
    """A path that is on no line is mistyped, whatever it was for."""
    for target, path in mapping.paths.items():
        if target not in found:
            raise UserError(f"--map {target}={path}: no line of {source} has {path}: correct the path, or leave it out")
