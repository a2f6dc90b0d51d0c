"""Labels a data file by running each row's solution against its tests.

Two passes. The first runs the solutions, many at a time, and enters what came of each in a journal, in the rows'
order; killed in between, the same command goes on behind the last entry. The second reads file and journal side by
side and writes the labelled file. Only counts a problem are held in memory, never rows.
"""

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from wmtp_ds.data.dataset_files import code_version
from wmtp_ds.data.label_file_journal import Journal
from wmtp_ds.data.label_file_report import Report
from wmtp_ds.data.label_file_tests import PROBLEMS, ProblemFile, UnusableTestsError, check_tests, problem_of
from wmtp_ds.data.labels import label
from wmtp_ds.data.labels_output import Comparison
from wmtp_ds.data.output_file import report_path
from wmtp_ds.data.rows import decode_object, parse_row, read_lines
from wmtp_ds.data.sandbox import Limits, sandbox_kind
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.files import open_file, read_json, replace_file, sha256_of, version_of

_VERSION = 1  # raise it whenever the same input and options give another file
_ROWS_AHEAD = 32  # of each worker: so far may rows be done before one that takes long
_NONE_PASSES = "none of the problem's solutions that the source calls correct passes"

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class LabelOptions:
    """How rows are run, and what becomes of those that get no label so.

    ``limit_seconds`` and ``limit_memory_mb`` are for problems without limits of their own, whose time is taken
    times ``limit_factor``. ``untested`` (keep, drop): rows without tests, or in another language than Python 3.
    ``suspicious`` (keep, drop, label): rows whose tests are not to be believed; "label" believes them all the same
    where they can be run, and drops the others.
    """

    limit_seconds: float = 2.0
    limit_memory_mb: int = 512
    limit_factor: float = 2.0
    untested: str = "keep"
    suspicious: str = "drop"
    comparison: Comparison = field(default_factory=Comparison)

    def limits(self) -> Limits:
        """Of one run, where the problem has none."""
        return Limits(cpu_seconds=self.limit_seconds, memory_bytes=self.limit_memory_mb << 20)


def label_file(
    source: Path,
    output: Path,
    options: LabelOptions | None = None,
    *,
    problems: Path | None = None,
    workers: int | None = None,
    force: bool = False,
    on_start: Callable[[int], None] = lambda total: None,
    on_done: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Write ``output`` and beside it ``OUTPUT.report.json``, or leave them if they are there already.

    Args:
        source: a data file.
        output: the labelled file; its name appears when it is complete.
        options: default ``LabelOptions()``.
        problems: tests of rows that bring none; default ``problems.jsonl`` beside the source, if it is there.
        workers: how many solutions run at a time; default one a CPU. What is written does not depend on it.
        force: replace an output that was made otherwise.
        on_start: called with the number of rows before they run.
        on_done: called with how many are done since the last call.

    Returns:
        The report, and ``reused``, whether the file was there.

    Raises:
        UserError: the input is not what it should be, or the output cannot be written.
        RunError: no sandbox works here, or writing failed.
    """
    options = options or LabelOptions()
    if problems is None and (source.parent / PROBLEMS).is_file():
        problems = source.parent / PROBLEMS
    total, digest, version = _survey(source)
    with contextlib.ExitStack() as stack:
        tests = stack.enter_context(contextlib.closing(ProblemFile(problems))) if problems else None
        made_from = {
            "command": "data label",
            "input": digest,
            "problems": sha256_of(problems) if problems else None,
            "options": asdict(options),
            "version": _VERSION,
            "code": code_version(),
        }
        reused = _finished([source, *([problems] if problems else [])], output, made_from, force)
        if reused is not None:
            return {**reused, "reused": True}
        sandbox_kind()  # where there is none, that shows before anything else
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{output}: its folder cannot be made: {error.strerror}: give another --output") from None
        journal = stack.enter_context(Journal(output, made_from, _is_entry))
        if journal.entries > total:
            raise UserError(f"{journal.path}: holds more than the {total} rows of {source}: delete it")
        on_start(total)
        on_done(journal.entries)
        try:
            _run(source, journal, tests, options, workers or os.cpu_count() or 1, on_done)
            report = _write(source, version, output, journal, options, made_from)
        except OSError as error:
            raise RunError(
                f"{output}: writing failed: {error.strerror}; what has run is kept in {journal.path}: mend that, and "
                "run the same command again"
            ) from error
        journal.remove()
    return {**report, "reused": False}


def _survey(source: Path) -> tuple[int, str, tuple[int, int, int]]:
    """How many rows there are, each of which is found to be one, the file's SHA-256, and what `version_of` says."""
    digest = hashlib.sha256()
    total = 0
    try:
        version = version_of(source)
        with open_file(source) as handle:
            for _, number, line in read_lines(handle, source):
                digest.update(line)
                if line.strip():
                    parse_row(line, source, number)
                    total += 1
    except IsADirectoryError:
        raise UserError(f"{source}: is a folder: give --input a data file, such as {source / 'train.jsonl'}") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}: give --input a data file") from None
    if not total:
        raise UserError(f"{source}: has no rows: give --input a data file, one solution a line")
    return total, digest.hexdigest(), version


def _finished(inputs: list[Path], output: Path, made_from: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """The report of a finished output made from exactly this; None if it is to be made."""
    if output.exists() and any(output.samefile(path) for path in inputs):
        raise UserError(f"{output}: is the input, or its tests: give --output another file")
    if output.is_dir():
        raise UserError(f"{output}: is a folder: give --output a file")
    if not output.exists() or force:
        return None
    try:
        found = read_json(report_path(output))
        before, report, digest = found["made_from"], found["report"], found["sha256"]
        differing = [key for key in made_from if before.get(key) != json.loads(json.dumps(made_from[key]))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{output}: exists, and was not made by this command: give another, or --force") from None
    if not differing and digest == sha256_of(output):
        return dict(report)
    if differing == ["code"]:
        return None
    what = f"made with other {', '.join(differing)}" if differing else "changed since it was made"
    raise UserError(f"{output}: exists, {what}: give another --output, or --force to replace it")


def _rows(handle: BinaryIO, source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and row of each line that is not empty."""
    for _, number, line in read_lines(handle, source):
        if line.strip():
            yield number, decode_object(line, f"{source}:{number}")


def _run(
    source: Path,
    journal: Journal,
    problems: ProblemFile | None,
    options: LabelOptions,
    workers: int,
    on_done: Callable[[int], None],
) -> None:
    """Run the rows that are not in the journal yet."""

    def work(numbered: tuple[int, dict[str, Any]]) -> dict[str, Any]:
        return run_row(numbered[1], problems, options)

    with open_file(source) as handle, ThreadPoolExecutor(workers) as pool:
        rows = _rows(handle, source)
        for _ in range(journal.entries):
            if next(rows, None) is None:
                raise _changed(source)
        for entry in _in_order(pool, work, rows, workers * _ROWS_AHEAD):
            journal.append(entry)
            on_done(1)


def _changed(source: Path) -> RunError:
    return RunError(f"{source}: has changed while it was being labelled: run the same command again")


def _with_entries(
    handle: BinaryIO, source: Path, journal: Journal
) -> Iterator[tuple[tuple[int, dict[str, Any]], dict[str, Any]]]:
    """Each row, and what came of it.

    Raises:
        RunError: there are more of one than of the other.
    """
    rows, entries = _rows(handle, source), iter(journal)
    for row in rows:
        entry = next(entries, None)
        if entry is None:
            raise _changed(source)
        yield row, entry
    if next(entries, None) is not None:
        raise _changed(source)


def _is_entry(entry: dict[str, Any]) -> bool:
    """Whether a line of the journal is one that `run_row` has made."""
    texts = [value for name, value in entry.items() if name != "evaluation_only"]
    known = "untested" in entry or "suspicious" in entry or {"verdict", "evidence"} <= entry.keys()
    return known and all(isinstance(text, str) for text in texts)


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int
) -> Iterator[_Result]:
    """Results in the items' order, with at most ``ahead`` items in work."""
    pending: deque[Future[_Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def run_row(row: dict[str, Any], problems: ProblemFile | None, options: LabelOptions) -> dict[str, Any]:
    """What comes of a row: ``{"untested": why}``, ``{"suspicious": why}``, or ``{"verdict", "evidence"}``.

    A problem that is for evaluation only makes it ``"evaluation_only": True``, too.
    """
    try:
        found = problem_of(row, problems, options.comparison)
        if isinstance(found, str):
            return {"untested": found}
        limits = found.limits(options.limits(), options.limit_factor)
        check_tests(found.tests, limits)
    except UnusableTestsError as error:
        return {"suspicious": str(error)}
    told = label(row["output"], found.tests, limits)
    marked = {"evaluation_only": True} if found.evaluation_only else {}
    return {"verdict": str(told.verdict), "evidence": told.evidence, **marked}


def source_label_of(row: dict[str, Any]) -> bool | None:
    """What the source said of a row; None if it said nothing.

    Imports keep it in ``metadata.source_label``, and a row that was labelled before has it there. Elsewhere it is
    the row's ``is_correct``, but that an import of one's own JSONL had to put something there.
    """
    metadata = row.get("metadata") or {}
    if isinstance(metadata.get("source_label"), bool):
        return bool(metadata["source_label"])
    return None if metadata.get("source") == "jsonl" else bool(row["is_correct"])


def _problems_without_a_pass(source: Path, journal: Journal) -> set[str]:
    """Problems with solutions that the source calls correct, of which none passes."""
    passes: dict[str, bool] = {}
    with open_file(source) as handle:
        for (_, row), entry in _with_entries(handle, source, journal):
            if "verdict" in entry and source_label_of(row):
                passes[row["problem_id"]] = passes.get(row["problem_id"], False) or entry["verdict"] == "passed"
    return {problem_id for problem_id, found in passes.items() if not found}


def _write(
    source: Path,
    version: tuple[int, int, int],
    output: Path,
    journal: Journal,
    options: LabelOptions,
    made_from: dict[str, Any],
) -> dict[str, Any]:
    """Write the labelled file and the report."""
    not_believed = _problems_without_a_pass(source, journal)
    seen: set[str] = set()
    report = Report()
    partial = output.with_name(f".partial-{output.name}")
    with open_file(source) as handle, partial.open("wb") as written:
        for (number, row), entry in _with_entries(handle, source, journal):
            report.rows += 1
            if "verdict" in entry and row["problem_id"] in not_believed:
                entry["suspicious"] = _NONE_PASSES
            if _settle(row, entry, number, options, report, seen):
                report.written += 1
                written.write(json.dumps(row).encode() + b"\n")
    if version_of(source) != version:
        raise _changed(source)
    told = {"sandbox": sandbox_kind(), **report.as_dict()}
    partial_report = output.with_name(f".partial-{output.name}.report")
    record = {"made_from": made_from, "sha256": sha256_of(partial), "report": told}
    partial_report.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    # The report first: beside another output it counts for nothing, as its checksum does not fit.
    replace_file(partial_report, report_path(output))
    replace_file(partial, output)
    return told


def _settle(
    row: dict[str, Any], entry: dict[str, Any], number: int, options: LabelOptions, report: Report, seen: set[str]
) -> bool:
    """Enter in the row what came of it; whether the row is written."""
    problem_id = row["problem_id"]
    if "untested" in entry:
        report.untested[entry["untested"]] += 1
        return options.untested == "keep"
    metadata = row["metadata"] = dict(row.get("metadata") or {})
    if entry.get("evaluation_only"):
        metadata["evaluation_only"] = True
    if "suspicious" in entry:
        report.count_suspicious(problem_id, entry["suspicious"], problem_id not in seen)
        seen.add(problem_id)
        if options.suspicious != "label" or "verdict" not in entry:
            metadata["suspicious_tests"] = entry["suspicious"]
            return options.suspicious == "keep"
    said = source_label_of(row)
    row["is_correct"] = entry["verdict"] == "passed"
    metadata |= {"verdict": entry["verdict"], "evidence": entry["evidence"]}
    if said is not None:
        metadata["source_label"] = said
    report.count_label(number, problem_id, entry["verdict"], entry["evidence"], said)
    return True
