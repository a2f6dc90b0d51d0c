"""Imports CodeContests (Li et al. 2022, "Competition-Level Code Generation with AlphaCode") from its Parquet files.

Nothing is run: rows carry the source's label, and ``data label`` earns one of its own. Problems of the published
test set go to evaluation.jsonl, marked as not to be trained on.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp_ds.data.codecontests_files import Shard, find_shards, fingerprint, read_problems
from wmtp_ds.data.codecontests_problem import Converted, Options, convert, problem_id
from wmtp_ds.data.import_folder import ImportFolder, finished_import
from wmtp_ds.data.import_split import DEFAULT_FRACTION, check_splits, held_out
from wmtp_ds.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_VERSION = 1  # raise it whenever the same source and options give other rows
_COMMIT_EVERY = 64  # problems


def import_codecontests(
    source: Path,
    output: Path,
    options: Options | None = None,
    *,
    validation_fraction: float | None = None,
    force: bool = False,
    on_start: Callable[[int], None] = lambda total: None,
    on_done: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Import CodeContests into ``output``, or leave it if it is there already.

    Args:
        source: a Parquet file, or a folder of shards named train-*, valid-*, test-*.
        output: a folder.
        options: language, difficulty, caps; default ``Options()``.
        validation_fraction: share of the training problems held out where no validation set is published with
            them; default 0.1, 0 for none.
        force: replace what another import left in ``output``.
        on_start: called with the number of problems before they are read.
        on_done: called with how many have been read since the last call.

    Returns:
        The summary: counts of each split, what was skipped, and ``reused``.

    Raises:
        UserError: the input is not what it should be, or the folder cannot be written.
        RunError: writing failed.
    """
    options = options or Options()
    shards = find_shards(source)
    published = any(shard.split == "validation" for shard in shards)
    if published and validation_fraction is not None:
        raise UserError(f"--validation-fraction does not go with {source}, whose validation set is used")
    share = 0.0 if published else DEFAULT_FRACTION if validation_fraction is None else validation_fraction
    made_from = {
        "command": "data import codecontests",
        "source": fingerprint(shards),
        **asdict(options),
        "validation_fraction": share,
        "version": _VERSION,
    }
    reused = finished_import(output, made_from, force=force)
    if reused is not None:
        return reused
    with ImportFolder(output, made_from) as folder:
        on_start(sum(shard.problems for shard in shards))
        seen = {note.decode() for note in folder.notes()}
        first = folder.state or {"shard": 0, "problem": 0}
        on_done(sum(shard.problems for shard in shards[: first["shard"]]) + first["problem"])
        for number, shard in enumerate(shards[first["shard"] :], first["shard"]):
            start = first["problem"] if number == first["shard"] else 0
            for at, problem in enumerate(read_problems(shard, start), start + 1):
                _add(folder, problem, shard, options, share, seen)
                on_done(1)
                if at % _COMMIT_EVERY == 0:
                    folder.commit({"shard": number, "problem": at})
        check_splits(folder, source, share)
        return folder.publish({"problems_read": sum(shard.problems for shard in shards), "skipped": folder.skipped})


def _add(
    folder: ImportFolder, problem: "pa.StructScalar", shard: Shard, options: Options, share: float, seen: set[str]
) -> None:
    """Write one problem and its rows, or count why not."""
    try:
        own_id = problem_id(problem)
        converted = Converted(skipped="problems_repeated") if own_id in seen else convert(problem, options)
    except UnicodeDecodeError:
        own_id, converted = f"one in {shard.path.name}", Converted(skipped="problems_not_utf8")
    if converted.skipped:
        folder.skip(converted.skipped, own_id or f"one in {shard.path.name}")
        return
    seen.add(own_id)
    folder.note(own_id.encode())
    split = shard.split or "train"
    if split == "train" and held_out(converted.problem["instruction"], share, options.seed):
        split = "validation"
    evaluation = split == "evaluation"
    folder.add_problem(split, {**converted.problem, "evaluation_only": evaluation})
    for row in converted.rows:
        if evaluation:
            row["metadata"]["evaluation_only"] = True
        folder.add_row(split, row)
    for reason, count in converted.dropped.items():
        if count:
            folder.skip(reason, count=count)
